"""Tokenizers of a few hundred pieces, trained in milliseconds, one of every kind."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from gguf import GGUFWriter, TokenType
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from model.tokenizer.byte_level import LLAMA3_SPLIT, byte_level
from model.tokenizer.huggingface import LETTER_OF_BYTE

LINES = [
    "A llama pronks across the meadow, and then it rests.",
    "The river runs down to the sea; the sea is wide and cold.",
    "Él dijo: «¡Qué día tan bonito!» 日本語のテキスト。",
    "def main():\n    return {'a': 1, 'b': [2, 3]}",
    "She sold 1234 apples, 56 pears and 7 plums for $8.90.",
] * 8
CHATML = "<|im_start|>", "<|im_end|>"


@cache
def sentencepiece_model(kind: str = "bpe", user_defined: tuple[str, ...] = ()) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=out,
        model_type=kind,
        vocab_size=340,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(user_defined),
        minloglevel=2,
    )
    return out.getvalue()


def byte_level_library() -> tokenizers.Tokenizer:
    """Byte-level BPE as Llama 3 has it, with ChatML's tokens and one unspecial markup token."""
    library = byte_level(models.BPE(), [LLAMA3_SPLIT])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(LINES, trainer)
    library.add_special_tokens(["<|begin|>", *CHATML])
    library.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    library.add_tokens([tokenizers.AddedToken("</think>", special=False, normalized=False)])
    begin = library.token_to_id("<|begin|>")
    library.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="$A $B", special_tokens=[("<|begin|>", begin)]
    )
    return library


def metaspace_library(normalized: bool = False) -> tokenizers.Tokenizer:
    """A Llama 2 tokenizer.json: ▁ put before every run of text, byte fallback."""
    raw = sentencepiece.SentencePieceProcessor()
    raw.LoadFromSerializedProto(sentencepiece_model())
    vocabulary = {raw.id_to_piece(i): i for i in range(raw.vocab_size())}
    merges = [
        (text[:cut], text[cut:])
        for text in vocabulary
        if not text.startswith("<")
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    merges.sort(key=lambda pair: vocabulary["".join(pair)])
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    for text in ("<unk>", "<s>", "</s>", *CHATML):
        library.add_special_tokens([tokenizers.AddedToken(text, normalized=normalized)])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="$A $B", special_tokens=[("<s>", 1)]
    )
    return library


def write_folder(folder: Path, file: str, contents: Any, **config: Any) -> Path:
    """A checkpoint folder with one tokenizer file and a tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(contents, bytes):
        (folder / file).write_bytes(contents)
    else:
        contents.save(str(folder / file))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def tiktoken_file(library: tokenizers.Tokenizer) -> bytes:
    """A byte-level vocabulary's pieces as tiktoken's lines, shortest first."""

    byte_of = {letter: byte for byte, letter in LETTER_OF_BYTE.items()}
    size = library.get_vocab_size(with_added_tokens=False)
    pieces = [
        bytes(byte_of[letter] for letter in library.id_to_token(i) or "") for i in range(size)
    ]
    lines = [b"%s %d" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)]
    return b"\n".join(lines) + b"\n"


def sentencepiece_gguf(path: Path, proto: bytes, **flags: bool) -> Path:
    raw = sentencepiece.SentencePieceProcessor()
    raw.LoadFromSerializedProto(proto)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    size = range(raw.vocab_size())
    writer.add_token_list([raw.id_to_piece(i) for i in size])
    writer.add_token_scores([raw.get_score(i) for i in size])
    writer.add_token_types([_piece_type(raw, i) for i in size])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    return _finished(writer, path)


def byte_level_gguf(path: Path, library: tokenizers.Tokenizer, pre: str, template: str) -> Path:
    stated = json.loads(library.to_str())
    added = {token["id"]: token for token in stated["added_tokens"]}
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    size = range(library.get_vocab_size())
    writer.add_token_list([library.id_to_token(i) or "" for i in size])
    writer.add_token_types([_added_type(added.get(i)) for i in size])
    writer.add_token_merges([" ".join(pair) for pair in stated["model"]["merges"]])
    writer.add_bos_token_id(library.token_to_id("<|begin|>"))
    writer.add_eos_token_id(library.token_to_id(CHATML[1]))
    writer.add_chat_template(template)
    return _finished(writer, path)


def _piece_type(raw: sentencepiece.SentencePieceProcessor, piece: int) -> TokenType:
    if raw.is_byte(piece):
        return TokenType.BYTE
    if raw.is_unknown(piece):
        return TokenType.UNKNOWN
    return TokenType.CONTROL if raw.is_control(piece) else TokenType.NORMAL


def _added_type(token: dict[str, Any] | None) -> TokenType:
    if token is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED


def _finished(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def every_kind(folder: Path) -> Iterator[tuple[str, Path]]:
    """A path of each kind of tokenizer that the loader knows."""
    proto, library = sentencepiece_model(), byte_level_library()
    yield "sentencepiece", write_folder(folder / "bpe", "tokenizer.model", proto)
    unigram = sentencepiece_model("unigram")
    yield "unigram", write_folder(folder / "unigram", "tokenizer.model", unigram)
    symbols = sentencepiece_model("bpe", CHATML)
    yield "symbols", write_folder(folder / "symbols", "tokenizer.model", symbols)
    newer = write_folder(folder / "newer", "tokenizer.model", proto, legacy=False)
    yield "newer", newer
    yield "byte-level", write_folder(folder / "byte", "tokenizer.json", library)
    yield "metaspace", write_folder(folder / "meta", "tokenizer.json", metaspace_library())
    yield "tiktoken", write_folder(folder / "tik", "tokenizer.model", tiktoken_file(library))
    yield "gguf-llama", sentencepiece_gguf(folder / "llama.gguf", proto)
    yield "gguf-gpt2", byte_level_gguf(folder / "gpt2.gguf", library, "llama-bpe", "{{ messages }}")
