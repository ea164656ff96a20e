"""Damaged checkpoints, tokenizers and adapters are read or refused in one line: soon, in little
memory, by a process that lives on. Each file is read in a process of its own (isolation.py).
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.isolation import Isolation, Outcome, isolation
from tests.fuzz.mutations import GGUFNumbers, damage_of
from tests.model import peft_folders, tiny_tokenizers
from tests.model.checkpoint.quantized_writers import write_quantized
from tests.model.checkpoint.test_prequantized import CASES
from tests.model.checkpoint.writers import llama, write_gguf, write_huggingface, write_meta

MOST_GROWTH = 200 << 10  # KiB; the network itself is smaller than one MiB
MOST_SECONDS = 60.0  # on a machine with other work; most take a hundredth of one
LONGEST_LINE = 1000

TOKENIZER_FILES: dict[str, Any] = {
    "tokenizer_config.json": {
        "bos_token": "<|begin|>",
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "unk_token": None,
        "add_bos_token": True,
        "legacy": False,
        "additional_special_tokens": ["<|im_start|>"],
        "added_tokens_decoder": {
            "400": {"content": "<|begin|>", "special": True, "lstrip": False},
            "450": {"content": "<extra>", "special": True, "single_word": True},
        },
        "chat_template": [
            {"name": "default", "template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
            {"name": "tool_use", "template": "{{ tools | tojson }}"},
        ],
    },
    "special_tokens_map.json": {"bos_token": {"content": "<|begin|>"}, "pad_token": "<pad>"},
    "added_tokens.json": {"<tool>": 460, "<|extra|>": 461},
    "config.json": {"bos_token_id": 1, "eos_token_id": [2, 3]},
    "generation_config.json": {"eos_token_id": [2, 3]},
    "chat_template.json": {"chat_template": "{{ messages }}"},
}
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.content | trim }}{% endfor %}"


def write_sources(folder: Path) -> Iterator[tuple[str, Path]]:
    """(reader, a good folder for it), one of every layout and kind."""
    yield "checkpoint", write_huggingface(llama(), folder / "huggingface")
    yield "checkpoint", write_huggingface(llama(), folder / "shards", shards=True)
    yield "checkpoint", write_meta(llama(), folder / "meta", ranks=2)
    (folder / "gguf").mkdir()
    write_gguf(llama(num_hidden_layers=1), folder / "gguf" / "model.gguf")
    yield "checkpoint", folder / "gguf"
    for name in ("awq", "gptq-act-order", "packed-zeros", "fp8-blocks"):
        config, store, _ = CASES[name]
        write_quantized(llama(num_hidden_layers=1), folder / name, config, store)
        yield "checkpoint", folder / name
    for kind, path in tiny_tokenizers.every_kind(folder / "tokenizers"):
        alone = path if path.is_dir() else Path(shutil.copytree(path.parent, folder / kind))
        if path.is_dir():
            _write_around(path)
        else:
            for other in alone.iterdir():
                if other.name != path.name:
                    shutil.rmtree(other) if other.is_dir() else other.unlink()
        yield "tokenizer", alone
    adapter = peft_folders.random_adapter(llama(), ("q_proj",))
    tensors = peft_folders.tensors_of(adapter)
    options = {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}, "bias": "none"}
    yield "adapter", peft_folders.write_folder(folder / "adapter", tensors, **options)


def _write_around(folder: Path) -> None:
    for name, document in TOKENIZER_FILES.items():
        (folder / name).write_text(json.dumps(document))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


Source = tuple[str, Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    return list(write_sources(tmp_path_factory.mktemp("sources")))


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolation]:
    with isolation() as server:
        yield server


def check(outcome: Outcome) -> None:
    """What a hostile file may do, and no more."""
    assert outcome.kind in ("read", "refused"), outcome
    assert outcome.grown < MOST_GROWTH, outcome
    assert outcome.seconds < MOST_SECONDS, outcome
    if outcome.kind == "refused":
        assert outcome.text
        assert outcome.text.isprintable(), outcome
        assert len(outcome.text) < LONGEST_LINE, outcome


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def test_good_files_are_read(sources: list[Source], isolated: Isolation) -> None:
    """Else every refusal below would prove nothing."""
    for reader, folder in sources:
        outcome = isolated.run(reader, folder)
        assert outcome.kind == "read", (folder, outcome)
        check(outcome)


MANY = [pytest.param(120), pytest.param(10_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("examples", MANY)
def test_any_damage_is_read_or_refused(
    examples: int, sources: list[Source], isolated: Isolation, tmp_path: Path
) -> None:
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(range(len(sources))), st.randoms(use_true_random=False))
    def damage(number: int, chance: Random) -> None:
        reader, source = sources[number]
        folder = copied(source, tmp_path / "copy")
        file = chance.choice(sorted(folder.iterdir()))
        file.write_bytes(damage_of(file.name)(chance, file.read_bytes()))
        check(isolated.run(reader, folder))

    damage()


# --------------------------------------------------------------------------- cuts


def structure(name: str, data: bytes) -> list[int]:
    """Where in a good file one thing ends and the next begins."""
    if name.endswith(".gguf"):
        return [at for at, _ in GGUFNumbers(data).found]
    if name.endswith(".safetensors"):
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        return [0, 4, 8, 9, 8 + length, *(8 + length + end for end in ends)]
    if name.endswith(".pth"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            places = [part.header_offset for part in archive.infolist()]
        return [*places, data.rindex(b"PK\x01\x02"), data.rindex(b"PK\x05\x06"), len(data) - 1]
    if name.endswith(".json"):
        return [at for at, byte in enumerate(data) if byte in b'{}[],:"']
    return list(range(0, len(data), 7))


@pytest.mark.parametrize("cuts", [pytest.param(5), pytest.param(500, marks=pytest.mark.slow)])
def test_a_file_cut_between_any_two_things_is_read_or_refused(
    cuts: int, sources: list[Source], isolated: Isolation, tmp_path: Path
) -> None:
    for number, (reader, source) in enumerate(sources):
        folder = copied(source, tmp_path / "copy")
        for file in sorted(folder.iterdir()):
            data = file.read_bytes()
            places = structure(file.name, data)
            chosen = Random(number).sample(places, min(cuts, len(places)))
            for at in chosen:
                file.write_bytes(data[:at])
                check(isolated.run(reader, folder))
            file.write_bytes(data)


def test_weights_cut_short_are_never_taken_for_whole(
    sources: list[Source], isolated: Isolation, tmp_path: Path
) -> None:
    for reader, source in sources:
        folder = copied(source, tmp_path / "copy")
        for file in sorted(folder.iterdir()):
            if file.suffix in (".safetensors", ".pth", ".gguf") and reader != "tokenizer":
                data = file.read_bytes()
                file.write_bytes(data[:-1])
                assert isolated.run(reader, folder).kind == "refused", file
                file.write_bytes(data)


# --------------------------------------------------------------------------- the guard itself


@pytest.mark.parametrize(
    ("reader", "kind", "text"),
    [
        ("crash", "killed", "SIGSEGV"),
        ("spin", "killed", "SIGXCPU"),
        ("swallow", "escaped", "MemoryError"),
        ("bug", "escaped", "KeyError"),
    ],
)
def test_the_isolation_tells_what_a_reader_died_of(
    reader: str, kind: str, text: str, isolated: Isolation, tmp_path: Path
) -> None:
    outcome = isolated.run(reader, tmp_path)
    assert outcome.kind == kind
    assert text in outcome.text
