"""Real tokenizers against the token ids that others published for them."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from model.tokenizer import Tokenizer, load_tokenizer

FOLDERS = {
    "llama2": ["llama2", "llama2/tokenizer.model"],
    "llama3": ["llama3", "llama3/tokenizer.model"],
    "qwen2.5": ["qwen2.5"],
}
VECTORS = [
    "meta-llama3",
    "multilingual-llama2",
    "multilingual-qwen2.5",
    "swift-llama2",
    "swift-llama3",
    "swift-long-llama2",
    "swift-long-llama3",
]
TWINS = [
    ("llama3/tokenizer.json", "llama3/tokenizer.model"),
    ("llama2/tokenizer.json", "llama2/tokenizer.model"),
    ("mistral-chatml/tokenizer.json", "mistral-chatml/tokenizer.model"),
    ("llama2/tokenizer.model", "../llama-2-tiny-random.gguf"),
]


@cache
def load(path: Path) -> Tokenizer:
    return load_tokenizer(path)


@pytest.fixture
def tokenizer_dir(shared_dir: Path) -> Path:
    return shared_dir / "models" / "tokenizers"


def corpus(shared_dir: Path) -> str:
    names = ["carroll-alice.txt", "grimm.txt"]
    return "".join((shared_dir / "corpus" / name).read_text(encoding="utf-8") for name in names)


@pytest.mark.parametrize("name", VECTORS)
def test_published_ids_and_texts_match(shared_dir: Path, tokenizer_dir: Path, name: str) -> None:
    vectors: dict[str, Any] = json.loads(
        (shared_dir / "models" / "vectors" / f"{name}.json").read_text(encoding="utf-8")
    )
    for path in FOLDERS[vectors["tokenizer"]]:
        tokenizer = load(tokenizer_dir / path)
        for case in vectors["cases"]:
            wanted = vectors["add_special_tokens"]
            assert tokenizer.encode(case["text"], add_special_tokens=wanted) == case["ids"]
            if "decoded" in case:
                assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize(("left", "right"), TWINS)
def test_two_files_of_one_tokenizer_give_equal_ids(
    shared_dir: Path, tokenizer_dir: Path, left: str, right: str
) -> None:
    one, other = load(tokenizer_dir / left), load(tokenizer_dir / right)
    text = corpus(shared_dir)[:300_000] + "  日本語 😀\t\r\n\n x\u00a0y 12345678 ñ"
    assert one.encode(text, add_special_tokens=False) == other.encode(
        text, add_special_tokens=False
    )


def test_llama3_ends_at_every_end_token(tokenizer_dir: Path) -> None:
    assert set(load(tokenizer_dir / "llama3").eos_ids) == {128001, 128008, 128009}
    assert load(tokenizer_dir / "llama3").bos_id == 128000


def test_qwen_has_no_bos(tokenizer_dir: Path) -> None:
    tokenizer = load(tokenizer_dir / "qwen2.5")
    assert tokenizer.bos_id is None
    assert tokenizer.encode("") == []


def test_mistrals_control_tokens_are_parsed_and_guarded(tokenizer_dir: Path) -> None:
    tokenizer = load(tokenizer_dir / "mistral" / "tokenizer.model.v3")
    assert tokenizer.encode("[INST] hi[/INST]")[:2] == [1, 3]
    assert 3 not in tokenizer.encode("[INST] hi[/INST]", parse_special=False)


@pytest.mark.parametrize(
    "name", ["llama2", "llama2/tokenizer.model", "llama3", "qwen2.5", "smollm2"]
)
def test_a_hundred_thousand_characters_take_well_under_a_second(
    shared_dir: Path, tokenizer_dir: Path, name: str
) -> None:
    tokenizer = load(tokenizer_dir / name)
    text = corpus(shared_dir)[:100_000]
    for parse_special in (True, False):
        begun = time.thread_time()
        tokenizer.encode(text, parse_special=parse_special)
        assert time.thread_time() - begun < 1


def gguf_metadata(path: Path, pre: str) -> dict[str, Any]:
    """What converters write into a GGUF file for a byte-level tokenizer.json."""
    stated = json.loads(path.read_text(encoding="utf-8"))
    texts = {number: text for text, number in stated["model"]["vocab"].items()}
    types = dict.fromkeys(texts, 1)
    for token in stated["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = 3 if token["special"] else 4
    merges = stated["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [texts[number] for number in range(len(texts))],
        "tokenizer.ggml.token_type": [types[number] for number in range(len(texts))],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
    }


@pytest.mark.parametrize(
    ("name", "pre"), [("llama3", "llama-bpe"), ("qwen2.5", "qwen2"), ("smollm2", "smollm")]
)
def test_a_gguf_vocabulary_gives_the_ids_of_its_tokenizer_json(
    shared_dir: Path, tokenizer_dir: Path, name: str, pre: str
) -> None:
    from model.tokenizer.gguf import from_metadata

    path = tokenizer_dir / name / "tokenizer.json"
    one, other = load(path), from_metadata(gguf_metadata(path, pre))
    text = (
        corpus(shared_dir)[:100_000] + " 1234567  e\u0301 don't DON'T\r\n\n\t<|im_end|><|eot_id|>"
    )
    for parse_special in (True, False):
        ids = one.encode(text, add_special_tokens=False, parse_special=parse_special)
        assert ids == other.encode(text, add_special_tokens=False, parse_special=parse_special)
    assert all(one.token_bytes(token) == other.token_bytes(token) for token in set(ids))
