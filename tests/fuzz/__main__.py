"""Fuzzing led by coverage: ``python -m tests.fuzz TARGET [libFuzzer's flags]``, for people.

Needs the package atheris, which nothing else here does (``pip install atheris``; wheels for CPython
3.11 to 3.13 on Linux). A finding ends the run with its trace and is written to ``crash-*``; the
suite's own, shorter fuzzing needs none of it. Examples:

    python -m tests.fuzz gguf -max_total_time=120
    python -m tests.fuzz calls -max_total_time=60 -max_len=400
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["model", "service"]):
    from model.chat_template import ChatTemplate, ChatTemplateError
    from model.checkpoint import CheckpointError
    from model.checkpoint.gguf_config import generation_defaults, huggingface_config
    from model.checkpoint.gguf_header import read_header
    from model.checkpoint.meta_config import read_header as read_pickle
    from model.config import InvalidConfig, ModelConfig, UnsupportedModel
    from model.tokenizer import sentencepiece_proto
    from model.tokenizer.gguf import from_metadata
    from service.api.body import parse
    from service.api.schemas.chat import ChatRequest
    from service.bench.events import EventLines, message_of
    from service.engine.framing import BrokenFrame, FrameReader
    from service.engine.messages import ToEngine
    from service.errors import InvalidRequest

from model.tokenizer import load_tokenizer
from tests.api.test_readers import MAKERS, cut, plain, read
from tests.model import tiny_tokenizers as tiny

SECONDS = 10.0
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
TOKENIZER = load_tokenizer(
    tiny.write_folder(FOLDER / "tokenizer", "tokenizer.json", tiny.byte_level_library())
)


def written(data: bytes) -> Path:
    path = FOLDER / "file"
    path.write_bytes(data)
    return path


def gguf(data: bytes) -> None:
    """The header, what it says of the network, and its tokenizer."""
    try:
        header = read_header(written(b"GGUF" + data))
        generation_defaults(header)
        from_metadata(header.metadata)
        ModelConfig.from_huggingface(huggingface_config(header, None))
    except (CheckpointError, InvalidConfig, UnsupportedModel):
        return


def pth(data: bytes) -> None:
    import zipfile

    with zipfile.ZipFile(FOLDER / "file", "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/data/0", b"")
    try:
        read_pickle(FOLDER / "file")
    except CheckpointError:
        return


def proto(data: bytes) -> None:
    try:
        list(sentencepiece_proto.user_defined(data))
        sentencepiece_proto.adds_prefix_space(data)
        sentencepiece_proto.without_prefix_space(data)
        sentencepiece_proto.respelled(data, {"a": "b"})
    except ValueError:
        return


def body(data: bytes) -> None:
    try:
        parse(data, ChatRequest)
    except InvalidRequest as error:
        error.message.encode()


def frames(data: bytes) -> None:
    try:
        FrameReader[object](ToEngine).feed(data)
    except BrokenFrame:
        return


def events(data: bytes) -> None:
    list(EventLines().push(data))
    message_of(data)


def template(data: bytes) -> None:
    text = data.decode(errors="ignore")
    try:
        ChatTemplate(text, TOKENIZER).render([{"role": "user", "content": "a <|im_end|>"}])
    except ChatTemplateError:
        return


def calls(data: bytes) -> None:
    """The first byte says which reader, the second how to cut the text."""
    if len(data) < 2:
        return
    make, text = MAKERS[data[0] % len(MAKERS)], data[2:].decode(errors="replace")
    whole = read(make(), [text])
    assert plain(read(make(), cut(text, list(range(0, len(text), 1 + data[1] % 7))))) == plain(
        whole
    )


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one for one in (gguf, pth, proto, body, frames, events, template, calls)
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(
            f"usage: python -m tests.fuzz {{{','.join(TARGETS)}}} [-max_total_time=60]"
        )
    target = TARGETS[sys.argv[1]]

    def timed(data: bytes) -> None:
        begun = time.thread_time()
        target(data)
        assert time.thread_time() - begun < SECONDS, "it took too long"

    atheris.Setup([sys.argv[0], *sys.argv[2:]], timed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
