"""Truncated, lying and hostile files are refused: soon, in little memory, running nothing."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.checkpoint import CheckpointError, load_config, load_model
from model.checkpoint.gguf_header import read_header
from tests.model.checkpoint.writers import llama, write_gguf, write_huggingface, write_meta

SECONDS = 20.0
MEBIBYTES = 256


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Every test here ends soon and lets the process grow by little."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert time.monotonic() - start < 6 * SECONDS
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < MEBIBYTES * 1024


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_huggingface(llama(), tmp_path_factory.mktemp("huggingface"))


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(llama(), tmp_path_factory.mktemp("meta"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(llama(num_hidden_layers=1), path)
    return path


def refused(path: Path) -> str:
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        load_model(path, dtype="float32")
    assert time.monotonic() - start < SECONDS
    return str(caught.value)


def damaged_copy(source: Path, target: Path, name: str, content: bytes) -> Path:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / name).write_bytes(content)
    return target


# --------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -10_000])
def test_truncated_safetensors_are_refused(keep: int, huggingface: Path, tmp_path: Path):
    content = (huggingface / "model.safetensors").read_bytes()[:keep]
    path = damaged_copy(huggingface, tmp_path / "t", "model.safetensors", content)
    assert "model.safetensors is damaged" in refused(path)


@pytest.mark.parametrize("length", [0, 99_000_000, 1 << 40, (1 << 64) - 1])
def test_safetensors_claiming_a_huge_header_are_refused(
    length: int, huggingface: Path, tmp_path: Path
):
    content = (huggingface / "model.safetensors").read_bytes()
    content = struct.pack("<Q", length) + content[8:]
    refused(damaged_copy(huggingface, tmp_path / "h", "model.safetensors", content))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [1 << 60, (1 << 60) + 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "Z9", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        "nothing",
    ],
)
def test_safetensors_with_a_lying_header_are_refused(entry, huggingface: Path, tmp_path: Path):
    header = json.dumps({"model.norm.weight": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(4)
    refused(damaged_copy(huggingface, tmp_path / "l", "model.safetensors", content))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000, b"null"])
def test_damaged_json_is_refused_by_name(
    content: bytes, name: str, huggingface: Path, tmp_path: Path
):
    assert name in refused(damaged_copy(huggingface, tmp_path / "j", name, content))


def test_config_asking_for_a_huge_network_is_refused(huggingface: Path, tmp_path: Path):
    config = json.loads((huggingface / "config.json").read_text())
    changes = (
        {"max_position_embeddings": 1 << 24, "head_dim": 128},
        {"num_hidden_layers": 10**7},
        {"vocab_size": 1 << 24},
        {"hidden_size": 1 << 20},
    )
    for change in changes:
        path = damaged_copy(
            huggingface, tmp_path / "c", "config.json", json.dumps(config | change).encode()
        )
        refused(path)


# --------------------------------------------------------------------------- pickles


class _Bomb:
    """Would leave a file behind if its pickle ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_pth_is_never_run(meta: Path, tmp_path: Path):
    trace = tmp_path / "it-ran"
    path = damaged_copy(meta, tmp_path / "p", "consolidated.00.pth", b"")
    torch.save({"norm.weight": _Bomb(trace)}, path / "consolidated.00.pth")
    assert "its pickle could run code" in refused(path)
    with pytest.raises(CheckpointError, match="damaged or holds more than tensors"):
        load_config(path)
    (path / "consolidated.00.pth").write_bytes(pickle.dumps(_Bomb(trace)))
    refused(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[], {}, {"a": 1}, {1: torch.ones(1)}, torch.ones(3)])
def test_pth_without_a_table_of_tensors_is_refused(content, meta: Path, tmp_path: Path):
    path = damaged_copy(meta, tmp_path / "p", "consolidated.00.pth", b"")
    torch.save(content, path / "consolidated.00.pth")
    refused(path)


@pytest.mark.parametrize("keep", [0, 10, 1000, -1, -1000])
def test_truncated_pth_is_refused(keep: int, meta: Path, tmp_path: Path):
    content = (meta / "consolidated.00.pth").read_bytes()[:keep]
    path = damaged_copy(meta, tmp_path / "p", "consolidated.00.pth", content)
    assert "consolidated.00.pth is damaged" in refused(path)


def test_compressed_pth_is_refused(meta: Path, tmp_path: Path):
    path = damaged_copy(meta, tmp_path / "p", "consolidated.00.pth", b"")
    with zipfile.ZipFile(path / "consolidated.00.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000_000))
    assert "holds compressed parts" in refused(path)


def test_pth_that_repeats_one_number_without_end_is_refused(meta: Path, tmp_path: Path):
    path = damaged_copy(meta, tmp_path / "p", "consolidated.00.pth", b"")
    endless = {"tok_embeddings.weight": torch.ones(1).expand(1 << 40, 64)}
    torch.save(endless, path / "consolidated.00.pth")
    assert "claims more numbers than the file holds" in refused(path)


@pytest.mark.parametrize(
    "change",
    [
        {"dim": "wide"},
        {"dim": -1},
        {"dim": 10**400},
        {"n_heads": 0},
        {"multiple_of": 0},
        {"ffn_dim_multiplier": "x"},
        {"ffn_dim_multiplier": 1e300},
        {"n_layers": 10**7},
        {"norm_eps": "small"},
    ],
)
def test_damaged_params_are_refused(change, meta: Path, tmp_path: Path):
    params = json.loads((meta / "params.json").read_text()) | change
    path = damaged_copy(meta, tmp_path / "p", "params.json", json.dumps(params).encode())
    with pytest.raises(ValueError):  # noqa: PT011 the config's own error is one as well
        load_model(path)


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def tied_up(levels: int) -> bytes:
    """{t: t} of a tuple t with 2**levels leaves, all of them one: a few bytes a level."""
    nested = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(levels))
    return pickled(b"}", nested, b"h%ch%cs" % (levels, levels))


@pytest.mark.parametrize(
    "table",
    [
        tied_up(100),
        pickled(b"}cos\nsystem\n(X\x04\x00\x00\x00exittR"),
        pickled(b"}(i__main__\nx\n"),
        pickled(b"(", b"d" * 10),
        b"\x80\x05" + b"\x95" + b"\xff" * 8,
    ],
    ids=["tied-up", "system", "inst", "marks", "frame"],
)
def test_hostile_tables_in_a_pth_are_refused_before_they_are_followed(
    table: bytes, meta: Path, tmp_path: Path
) -> None:
    path = damaged_copy(meta, tmp_path / "p", "consolidated.00.pth", b"")
    with zipfile.ZipFile(path / "consolidated.00.pth", "w") as archive:
        archive.writestr("a/data.pkl", table)
        archive.writestr("a/data/0", bytes(64))
    refused(path)
    with pytest.raises(CheckpointError):
        load_config(path)


@pytest.mark.parametrize("names", [("a/data.pkl", "b/data.pkl"), ("a/data.pkl", "a/data.pkl")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_tables_in_a_pth_are_refused(
    names: tuple[str, ...], meta: Path, tmp_path: Path
) -> None:
    """Readers of zip files do not agree on which of the two counts."""
    path = damaged_copy(meta, tmp_path / "p", "consolidated.00.pth", b"")
    with zipfile.ZipFile(path / "consolidated.00.pth", "w") as archive:
        for name in names:
            archive.writestr(name, pickled(b"}"))
    refused(path)


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.00.pth", "model.gguf"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_only_files_are_opened(name: str, kind: str, meta: Path, tmp_path: Path) -> None:
    path = damaged_copy(meta, tmp_path / "p", "config.json", b"{}")
    (path / "consolidated.00.pth").unlink()
    if kind == "pipe":
        os.mkfifo(path / name)  # opening it would wait for a writer
    elif kind == "folder":
        (path / name).mkdir()
    else:
        (path / name).symlink_to("/dev/zero" if kind == "device" else path / name)
    assert "no weights" in refused(path)


def test_what_a_file_says_stays_on_one_line(huggingface: Path, tmp_path: Path) -> None:
    config = json.loads((huggingface / "config.json").read_text())
    for odd in ("a\nERROR forged", "\x1b[2Jcleared", "\ud800", "x" * 100_000):
        content = json.dumps(config | {"architectures": [odd]}).encode()
        path = damaged_copy(huggingface, tmp_path / "o", "config.json", content)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 the config's own error
            load_config(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000


# --------------------------------------------------------------------------- GGUF


def gguf_header(num_tensors: int, num_pairs: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_pairs) + rest


def pair(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + value


HUGE = (1 << 60) + 1
LYING = {
    "empty": b"",
    "magic": b"GGML" + bytes(100),
    "version": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "tensors": gguf_header(HUGE, 0),
    "pairs": gguf_header(0, HUGE),
    "name": gguf_header(0, 1, struct.pack("<Q", HUGE)),
    "string": gguf_header(0, 1, pair(8, struct.pack("<Q", HUGE))),
    "numbers": gguf_header(0, 1, pair(9, struct.pack("<IQ", 4, HUGE))),
    "strings": gguf_header(0, 1, pair(9, struct.pack("<IQ", 8, HUGE))),
    "arrays": gguf_header(0, 1, pair(9, struct.pack("<IQ", 9, HUGE))),
    "type": gguf_header(0, 1, pair(77, bytes(8))),
    "twice": gguf_header(0, 2, 2 * pair(4, bytes(4))),
    "dimensions": gguf_header(1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<I", 1 << 31) * 20),
    "extent": gguf_header(
        1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 1 << 62, 0, 0)
    ),
    "tensor-type": gguf_header(
        1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 1, 999, 0)
    ),
}


@pytest.mark.parametrize("lie", LYING)
def test_lying_gguf_header_is_refused(lie: str, tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(LYING[lie] + (bytes(1000) if lie in {"strings", "numbers"} else b""))
    assert "model.gguf" in refused(path) or lie == "tensor-type"


@pytest.mark.parametrize("keep", [1, 20, 200, 1000, -1, -5000])
def test_truncated_gguf_is_refused(keep: int, gguf_file: Path, tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file.read_bytes()[:keep])
    assert "model.gguf" in refused(path)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.integers(0, 3000), value=st.integers(0, 255), width=st.integers(1, 8))
def test_any_damage_to_a_gguf_header_is_read_or_refused(
    place: int, value: int, width: int, gguf_file: Path, tmp_path: Path
):
    content = bytearray(gguf_file.read_bytes())
    place %= read_header(gguf_file).tensors["token_embd.weight"].offset
    content[place : place + width] = bytes([value]) * width
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    try:
        load_config(path)
        load_model(path, dtype="float32")
    except ValueError as error:
        assert str(error)  # noqa: PT017 whether it is refused depends on the place


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.integers(0, 1 << 20), value=st.integers(0, 255), width=st.integers(1, 8))
def test_any_damage_to_a_pth_is_read_or_refused(
    place: int, value: int, width: int, meta: Path, tmp_path: Path
):
    content = bytearray((meta / "consolidated.00.pth").read_bytes())
    place %= len(content) - 8
    content[place : place + width] = bytes([value]) * width
    path = damaged_copy(meta, tmp_path / "p", "consolidated.00.pth", bytes(content))
    try:
        load_config(path)
        load_model(path, dtype="float32")
    except ValueError as error:
        assert str(error)  # noqa: PT017


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.integers(0, 4000), value=st.integers(0, 255), width=st.integers(1, 8))
def test_any_damage_to_safetensors_is_read_or_refused(
    place: int, value: int, width: int, huggingface: Path, tmp_path: Path
):
    content = bytearray((huggingface / "model.safetensors").read_bytes())
    content[place : place + width] = bytes([value]) * width
    path = damaged_copy(huggingface, tmp_path / "s", "model.safetensors", bytes(content))
    try:
        load_config(path)
        load_model(path, dtype="float32")
    except ValueError as error:
        assert str(error)  # noqa: PT017
