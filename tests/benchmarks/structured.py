"""What structured output costs: compiling, a mask, putting it on a row, its share of a step.

    python -m tests.benchmarks.structured [--vocab 128256] [--rows 8] [--step-ms 100]

The vocabulary is random pieces of English-like text; each row follows a grammar along a text that
satisfies it. Times are medians. ``beside`` is what a step waits for: a mask is filled while the
network computes, so only what takes longer than the network is waited for.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from model.grammar import Grammar, GrammarState, Vocabulary
from model.grammar_masks import MaskFiller, Words, apply_masks
from service.api.constraints import json_schema_grammar, read_constraint
from service.api.schemas.sampling import SamplingFields

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string"},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
SAID = (
    '{"name":"the old man of the sea","age":84,"tags":["red","blue"],'
    '"address":{"street":"harbour lane nine","zip":"12345"}}'
)
MILLI = 1e3


def main() -> None:
    options = read_options()
    began = time.perf_counter()
    vocabulary = Vocabulary(pieces(options.vocab), special=[0, 1])
    print(f"{options.vocab} tokens: automata's trie {time.perf_counter() - began:.2f} s")
    pattern = read_constraint(SamplingFields(guided_regex=r"[a-z]+( [a-z]+){2,40}\."))
    assert pattern is not None
    cases = [
        ("a person's schema", json_schema_grammar(PERSON), SAID),
        ("any JSON object", json_schema_grammar({"type": "object"}), SAID),
        ("a pattern of words", pattern.grammar, "the old man went down to the sea again."),
    ]
    filler = MaskFiller()
    for name, text, said in cases:
        compile_ms = statistics.median(
            timed(lambda t=text: Grammar(t, vocabulary)) for _ in range(3)
        )
        grammar = Grammar(text, vocabulary)
        one = follow(grammar, said, 1, filler, vocabulary)
        many = follow(grammar, said, options.rows, filler, vocabulary)
        print(
            f"{name:20} compile {compile_ms:6.2f} ms; mask of a row {one[0]:6.3f} ms (longest "
            f"{one[1]:.2f}), {many[0] / options.rows:.3f} each of {options.rows}; take a token "
            f"{one[2]:.4f} ms; {one[0] / options.step_ms:.2%} of a step of {options.step_ms:g} ms, "
            "beside it"
        )
    for rows in (1, options.rows):
        spent = put_on(rows, options.vocab, grammar, filler)
        share = spent / rows / options.step_ms
        print(f"put on {rows} rows: {spent:.3f} ms; a row is {share:.2%} of a step")
    filler.close()


def put_on(rows: int, width: int, grammar: Grammar, filler: MaskFiller) -> float:
    """Milliseconds to put masks on rows of logits."""
    logits, words = torch.randn(rows, width), grammar.vocabulary.num_words
    masks: list[Words] = list(filler.start([grammar.start()] * rows, words).wait())
    times = [timed(lambda: apply_masks(logits, range(rows), masks)) for _ in range(20)]
    return statistics.median(times)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--step-ms", type=float, default=100.0, help="a step to compare with")
    return parser.parse_args()


def pieces(size: int) -> list[bytes]:
    """Single bytes and random words, half of them after a space, with some marks."""
    draws = random.Random(0)
    found = dict.fromkeys([b"<s>", b"</s>", *(bytes([byte]) for byte in range(256)), b'":', b'",'])
    while len(found) < size:
        word = "".join(draws.choices("etaoinshrdlucmfwygpbvk", k=draws.randint(2, 9)))
        found[(draws.choice(["", " ", " ", '"']) + word).encode()] = None
    return list(found)[:size]


def follow(
    grammar: Grammar, said: str, rows: int, filler: MaskFiller, vocabulary: Vocabulary
) -> tuple[float, float, float]:
    """Milliseconds of a mask (median, longest) and of taking a token, along a text of bytes."""
    states: list[GrammarState] = [grammar.start() for _ in range(rows)]
    masks, takes = [], []
    for byte in said.encode()[:-1]:
        token = byte + 2  # single bytes come after the two special tokens
        takes.append(timed(lambda t=token: [state.take([t]) for state in states]) / rows)
        masks.append(timed(lambda: filler.start(states, vocabulary.num_words).wait()))
    return statistics.median(masks), max(masks), statistics.median(takes)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * MILLI


if __name__ == "__main__":
    main()
