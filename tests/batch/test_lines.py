"""Input lines and output records: what is wrong with a line, what is done, what was cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batch.output import Failure, Response, open_output, record
from service.batch.problem import BatchProblem
from service.batch.requests import BatchRequest, Refused, count_lines, read_requests

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"}}

OTHER = GOOD | {"custom_id": "b"}


def read(path: Path, *lines: object, most: int = 10_000) -> list[BatchRequest | Refused]:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts))
    return list(read_requests(path, most))


def test_a_body_is_sent_byte_for_byte(tmp_path: Path) -> None:
    text = b'{"custom_id":"a","method":"POST","url":"/tokenize","body": {"x" :  1.0e0}}'
    (found,) = read(tmp_path / "in", text)
    assert found == BatchRequest(1, "a", "/tokenize", b'{"x" :  1.0e0}')


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"custom_id": "\\ud800"}', "invalid_json"),
        (b"[" * 100_000, "line_too_long"),
        (b'{"custom_id": "q", "body": ' + b"[" * 9000, "invalid_json"),
        (b"5", "invalid_line"),
        ({"custom_id": "b"}, "invalid_line"),
        (GOOD | {"custom_id": 5}, "invalid_line"),
        (GOOD | {"custom_id": ""}, "invalid_custom_id"),
        (GOOD | {"custom_id": "x" * 513}, "invalid_custom_id"),
        (OTHER | {"method": "GET"}, "invalid_method"),
        (OTHER | {"url": "/v1/load_lora_adapter"}, "invalid_url"),
        (OTHER | {"url": "http://elsewhere/v1/completions"}, "invalid_url"),
        (OTHER | {"body": {"stream": True}}, "stream_unsupported"),
        (GOOD, "duplicate_custom_id"),
    ],
)
def test_a_bad_line_spares_those_around_it(tmp_path: Path, line: Any, code: str) -> None:
    before, bad, after = read(tmp_path / "in", GOOD, line, GOOD | {"custom_id": "z"})
    assert isinstance(before, BatchRequest)
    assert isinstance(after, BatchRequest)
    assert isinstance(bad, Refused)
    assert (bad.number, bad.code) == (2, code)
    assert len(bad.message) < 500


def test_blank_lines_marks_and_a_missing_last_end_are_no_matter(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n  \n"
    found = read(tmp_path / "in", text + json.dumps(GOOD | {"custom_id": "b"}).encode())
    assert [type(line) for line in found] == [BatchRequest, BatchRequest]
    assert count_lines(tmp_path / "in") == 4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40).filter(lambda text: b"\n" not in text), max_size=5))
def test_whatever_a_file_holds_each_line_is_a_request_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("odd") / "in"
    found = read(path, *lines, most=10)
    assert all(isinstance(line, BatchRequest | Refused) for line in found)
    assert len(found) <= count_lines(path)


# ---- the output


def write(path: Path, *, tail: bytes = b"") -> None:
    """Two lines answered, one refused by the server, one that was no request."""
    with open_output(path) as output:
        for number, status in ((1, 200), (2, 200), (3, 500)):
            line = BatchRequest(number, f"id-{number}", "/tokenize", b"{}")
            output.append(record(line, Response(status, "req", msgspec.Raw(b"{}")), None))
        bad = Refused(4, None, "invalid_json", "no")
        output.append(record(bad, None, Failure(bad.code, bad.message, None, 4)))
    with path.open("ab") as file:
        file.write(tail)


def done(path: Path, **options: bool) -> list[int]:
    """Numbers of the lines that need not run."""
    lines: list[BatchRequest | Refused] = [
        *(BatchRequest(number, f"id-{number}", "/tokenize", b"{}") for number in (1, 2, 3, 5)),
        Refused(4, None, "invalid_json", "no"),
        Refused(6, None, "invalid_json", "no"),
    ]
    with open_output(path, **options) as output:
        return sorted(line.number for line in lines if output.has(line))


@pytest.mark.parametrize("tail", [b"", b'{"id":"ba', b'{"id":"batch_req_1","custom_id":"id-5"'])
def test_what_is_done_is_known_and_half_a_record_is_taken_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "out"
    write(path, tail=tail)
    assert done(path) == [1, 2, 3, 4]
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [found["custom_id"] for found in records] == ["id-1", "id-2", "id-3", None]
    assert all(list(found) == ["id", "custom_id", "response", "error"] for found in records)


def test_what_failed_can_be_run_again(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write(path, tail=b'{"id":"batch')
    assert done(path, again=True) == [1, 2]
    assert len(path.read_bytes().splitlines()) == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", [b"notes", b"notes\n", b'{"id": 5}\n', b"\x00\x00"])
def test_another_file_is_never_touched(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "out"
    path.write_bytes(text)
    with pytest.raises(BatchProblem, match="another output"):
        done(path)
    assert path.read_bytes() == text


def test_two_runs_never_write_to_one_output(tmp_path: Path) -> None:
    with (
        open_output(tmp_path / "out"),
        pytest.raises(BatchProblem, match="another run"),
        open_output(tmp_path / "out"),
    ):
        raise AssertionError("opened twice")
