"""Sequences: where they end, what they still need, how they part."""

from __future__ import annotations

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from service.engine.messages import SamplingSettings, Submit, TokenLogprob
from service.engine.prefix import PrefixChain, chain_root
from service.engine.sequence import Ending, Request, Sequence


def a_sequence(*settings: SamplingSettings, prompt: int = 5, **fields: object) -> Sequence:
    submit = Submit(1, list(range(prompt)), list(settings or [SamplingSettings()]), **fields)  # type: ignore[arg-type]
    return Sequence.start(Request(submit, "client", 0, 0.0))


def after(sequence: Sequence, *tokens: int) -> Sequence:
    sequence.tokens.extend(tokens)
    return sequence


def test_an_end_of_sequence_has_no_stop_reason_and_a_stop_id_is_its_own() -> None:
    settings = SamplingSettings(eos_token_ids=(2,), stop_token_ids=(2, 9))
    assert after(a_sequence(settings), 2).ending(100) == Ending("stop")
    assert after(a_sequence(settings), 9).ending(100) == Ending("stop", 9)
    assert after(a_sequence(settings), 3).ending(100) is None


def test_below_min_tokens_no_end_counts() -> None:
    settings = SamplingSettings(min_tokens=2, eos_token_ids=(2,))
    assert after(a_sequence(settings), 7, 2).ending(100) is None
    assert after(a_sequence(settings), 7, 7, 2).ending(100) == Ending("stop")


def test_an_end_in_the_last_token_allowed_is_a_stop() -> None:
    settings = SamplingSettings(max_tokens=1, eos_token_ids=(2,))
    assert after(a_sequence(settings), 2).ending(100) == Ending("stop")
    assert after(a_sequence(settings), 3).ending(100) == Ending("length")


def test_the_context_ends_a_sequence_like_max_tokens() -> None:
    assert after(a_sequence(prompt=5), 7).ending(7) is None
    assert after(a_sequence(prompt=5), 7, 7).ending(7) == Ending("length")


def test_forks_share_the_table_and_then_go_their_own_way() -> None:
    parent = a_sequence(*[SamplingSettings(choice=i) for i in range(3)])
    parent.block_table = [4, 2]
    parent.num_computed = 5
    children = parent.fork()
    assert [c.choice for c in (parent, *children)] == [0, 1, 2]
    assert all(c.block_table == [4, 2] and c.num_computed == 5 for c in children)
    children[0].tokens.append(9)
    children[0].block_table[1] = 7
    assert (len(parent.tokens), parent.block_table) == (5, [4, 2])
    assert sorted(s.order for s in (parent, *children)) == [s.order for s in (parent, *children)]


def test_logits_are_needed_from_the_first_prompt_logprob_not_known() -> None:
    assert a_sequence(prompt=5).first_logits == 4
    sequence = a_sequence(prompt=5, prompt_logprobs=0)
    assert sequence.first_logits == 0
    sequence.request.keep_prompt_logprobs([TokenLogprob(-1.0, 1, [], [])] * 2, 2)
    assert sequence.first_logits == 2
    sequence.request.keep_prompt_logprobs([TokenLogprob(-1.0, 1, [], [])] * 2, 2)
    assert sequence.first_logits == 4


def test_the_first_output_alone_tells_how_the_prompt_fared() -> None:
    request = a_sequence(prompt=1, prompt_logprobs=0).request
    request.first_scheduled, request.cached_tokens = 2.0, 0
    first, second = request.output(0, 5.0), request.output(0, 6.0)
    assert (first.queue_time, first.prefill_time, first.cached_tokens) == (2.0, 3.0, 0)
    assert first.prompt_logprobs == [None]
    assert (second.queue_time, second.prefill_time, second.cached_tokens) == (None, None, None)


# ---- the hash chain ----------------------------------------------------------------------------


def test_the_chain_is_sha256_over_the_digest_before_and_int32_tokens() -> None:
    tokens = list(range(1000, 1064))
    chain = PrefixChain(chain_root(b"key"))
    chain.extend(tokens, 64)
    first = hashlib.sha256(chain_root(b"key") + struct.pack("<32i", *tokens[:32])).digest()
    assert chain.digests[0] == first
    assert chain.digests[1] == hashlib.sha256(first + struct.pack("<32i", *tokens[32:])).digest()


@given(st.lists(st.integers(0, 200_000), max_size=200), st.lists(st.integers(0, 200), max_size=9))
def test_a_chain_grown_in_pieces_is_the_chain_of_the_whole(
    tokens: list[int], pieces: list[int]
) -> None:
    grown, whole = PrefixChain(chain_root(b"")), PrefixChain(chain_root(b""))
    for num_tokens in pieces:
        grown.extend(tokens, min(num_tokens, len(tokens)))
    grown.extend(tokens, len(tokens))
    whole.extend(tokens, len(tokens))
    assert grown.digests == whole.digests
    assert len(whole.digests) == len(tokens) // 32


def test_namespaces_share_no_digest() -> None:
    chains = [PrefixChain(chain_root(namespace)) for namespace in (b"", b"a", b"b")]
    for chain in chains:
        chain.extend(list(range(96)), 96)
    assert len({digest for chain in chains for digest in chain.digests}) == 9
