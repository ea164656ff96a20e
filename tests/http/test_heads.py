"""Heads and chunks two readers could understand differently are refused, all others are read."""

from __future__ import annotations

import h11
import pytest

from service.http.heads import MAX_FIELDS, MAX_HEAD_BYTES, NUM_FREE_CHUNKS, StrictConnection

HOST = b"Host: x\r\n"
POST = b"POST / HTTP/1.1\r\n" + HOST
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def read(*pieces: bytes) -> list[object]:
    """The events of everything that came, in these pieces."""
    connection = StrictConnection()
    events: list[object] = []
    for piece in pieces:
        connection.receive_data(piece)
        while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            events.append(event)
    return events


REFUSED = {
    "length and encoding": POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "encoding and length": POST + CHUNKED + b"content-length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "one length twice": POST + b"Content-Length: 5\r\ncontent-length: 5\r\n\r\nhello",
    "a list of lengths": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "a signed length": POST + b"Content-Length: +5\r\n\r\nhello",
    "a hexadecimal length": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "a negative length": POST + b"Content-Length: -5\r\n\r\nhello",
    "no length": POST + b"Content-Length:\r\n\r\n",
    "a length of 5,000 digits": POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "another encoding": POST + b"Transfer-Encoding: xchunked\r\n\r\n",
    "two encodings": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "an encoding twice": POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    "an encoding in 1.0": b"POST / HTTP/1.0\r\n" + HOST + CHUNKED + b"\r\n0\r\n\r\n",
    "space before a colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: x\n\n",
    "one bare LF": b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n",
    "bare CR": b"GET / HTTP/1.1\r\nHost: x\rA: b\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
    "a header folded by a tab": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n\tc\r\n\r\n",
    "space before the headers": b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
    "a zero byte": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "TLS's greeting": bytes.fromhex("16030100f8010000f40303") + b"\r\n\r\n",
    "an empty line first": b"\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a space in the path": b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
    "no ASCII in the path": b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "a negative chunk": POST + CHUNKED + b"\r\n-1\r\nx\r\n0\r\n\r\n",
    "a chunk longer than it says": POST + CHUNKED + b"\r\n1\r\nxab0\r\n\r\n",
    "a chunk size of 40 digits": POST + CHUNKED + b"\r\n" + b"f" * 40 + b"\r\nx",
    "an endless chunk extension": POST + CHUNKED + b"\r\n1;" + b"a" * (MAX_HEAD_BYTES + 1),
    "confetti": POST + CHUNKED + b"\r\n" + b"1\r\nx\r\n" * (NUM_FREE_CHUNKS + 20) + b"0\r\n\r\n",
}


@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED)
def test_what_is_ambiguous_or_no_http_is_refused(sent: bytes) -> None:
    with pytest.raises(h11.RemoteProtocolError):
        read(sent)


@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED)
def test_it_is_refused_as_well_when_it_comes_in_pieces(sent: bytes) -> None:
    with pytest.raises(h11.RemoteProtocolError):
        read(*(sent[i : i + 7] for i in range(0, len(sent), 7)))


def test_an_end_of_line_cut_in_two_is_none_the_worse() -> None:
    sent = POST + b"Content-Length: 2\r\n\r\nhi"
    events = read(*(sent[i : i + 1] for i in range(len(sent))))
    assert isinstance(events[0], h11.Request)
    assert b"".join(bytes(event.data) for event in events if isinstance(event, h11.Data)) == b"hi"


@pytest.mark.parametrize("body", [b" starts with a space", b"\na line\n b", b"\0\r\n\r\n"])
def test_bodies_may_hold_what_heads_may_not(body: bytes) -> None:
    events = read(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert b"".join(bytes(e.data) for e in events if isinstance(e, h11.Data)) == body


def test_a_second_request_is_looked_at_as_the_first() -> None:
    connection = StrictConnection()
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\nHost: x\n\n")
    assert isinstance(connection.next_event(), h11.Request)
    assert isinstance(connection.next_event(), h11.EndOfMessage)
    assert connection.next_event() is h11.PAUSED
    for event in (h11.Response(status_code=204, headers=[]), h11.EndOfMessage()):
        connection.send(event)
    connection.start_next_cycle()
    with pytest.raises(h11.RemoteProtocolError):
        connection.next_event()


def test_too_many_and_too_long_headers_are_told_from_what_is_malformed() -> None:
    many = b"".join(b"A%d: b\r\n" % number for number in range(MAX_FIELDS + 1))
    long = b"A: " + b"b" * MAX_HEAD_BYTES + b"\r\n"
    for extra in (many, long):
        connection = StrictConnection()
        connection.receive_data(b"GET / HTTP/1.1\r\n" + HOST + extra + b"\r\n")
        with pytest.raises(h11.RemoteProtocolError):
            connection.next_event()
        assert connection.refusal.status == 431


def test_many_headers_are_no_more_than_too_many() -> None:
    most = b"".join(b"A%d: b\r\n" % number for number in range(MAX_FIELDS - 1))
    assert len(read(b"GET / HTTP/1.1\r\n" + HOST + most + b"\r\n")) == 2


def test_small_chunks_are_fine_until_they_are_a_weapon() -> None:
    few = b"1\r\nx\r\n" * NUM_FREE_CHUNKS
    large = (b"80\r\n" + b"x" * 128 + b"\r\n") * (2 * NUM_FREE_CHUNKS)
    for chunks in (few, large, few + large):
        events = read(POST + CHUNKED + b"\r\n" + chunks + b"0\r\n\r\n")
        assert isinstance(events[-1], h11.EndOfMessage)


def test_chunks_are_counted_anew_for_each_request() -> None:
    connection = StrictConnection()
    request = POST + CHUNKED + b"\r\n" + b"1\r\nx\r\n" * (NUM_FREE_CHUNKS - 1) + b"0\r\n\r\n"
    for _ in range(3):
        connection.receive_data(request)
        while connection.next_event() is not h11.PAUSED and connection.their_state is not h11.DONE:
            pass
        for event in (h11.Response(status_code=204, headers=[]), h11.EndOfMessage()):
            connection.send(event)
        connection.start_next_cycle()
