"""What a checkpoint says about its tokenizer beside the vocabulary: names, flags, chat templates.

Read from tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja,
config.json and generation_config.json, as far as they are there. ``clean_up_tokenization_spaces``
is left unread on purpose: it alters text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model.checkpoint.documents import MAX_BYTES, read_optional_json
from model.checkpoint.errors import CheckpointError
from model.tokenizer.special import AddedToken

_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_MAX_ID = 1 << 31


class TokenizerError(CheckpointError):
    """A tokenizer file that is missing, damaged or of a kind not known; the message says what to
    do.
    """


@dataclass(frozen=True)
class TokenizerConfig:
    """``add_bos`` and ``add_eos`` are None where the vocabulary file decides."""

    named_tokens: Mapping[str, str] = field(default_factory=dict)
    declared: tuple[AddedToken, ...] = ()
    add_bos: bool | None = None
    add_eos: bool | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    legacy: bool = (
        True  # sentencepiece: every run of text between special tokens gets its own leading space
    )

    def with_defaults(self, **values: Any) -> TokenizerConfig:
        """Fills in what the checkpoint's files left unsaid."""
        unsaid = {name: value for name, value in values.items() if not self._says(name)}
        return replace(self, **unsaid)

    def _says(self, name: str) -> bool:
        said = getattr(self, name)
        return said is not None and said not in ((), {})


def read_config(folder: Path) -> TokenizerConfig:
    """Everything the folder says; raises TokenizerError for JSON that is none."""
    main = read_json(folder / "tokenizer_config.json")
    names = {**read_json(folder / "special_tokens_map.json"), **main}
    model = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json")
    return TokenizerConfig(
        named_tokens={name: text for name in _NAMES if (text := _spelling(names.get(name)))},
        declared=_declared(main, names, read_json(folder / "added_tokens.json")),
        add_bos=_flag(main, "add_bos_token"),
        add_eos=_flag(main, "add_eos_token"),
        bos_id=None if "bos_token" in names else _first(_ids(model.get("bos_token_id"))),
        eos_ids=_ids(generation.get("eos_token_id")) + _ids(model.get("eos_token_id")),
        chat_templates=_chat_templates(folder, main),
        legacy=main.get("legacy") is not False,
    )


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; empty when there is no such file."""
    try:
        return read_optional_json(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error


def _declared(
    main: dict[str, Any], names: dict[str, Any], added: dict[str, Any]
) -> tuple[AddedToken, ...]:
    """Tokens with a stated id: added_tokens.json, overruled by added_tokens_decoder."""
    special = {_spelling(names.get(name)) for name in _NAMES}
    extra = names.get("additional_special_tokens") or names.get("extra_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise TokenizerError(f"the additional special tokens are {extra!r}, not a list of tokens")
    special.update(map(_spelling, extra if isinstance(extra, list) else extra.values()))
    found = {}
    for text, stated in added.items():
        token = _token_id(stated)
        found[token] = AddedToken(token, require_text(text), text in special)
    decoder = main.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError("added_tokens_decoder is no table of tokens")
    for key, stated in decoder.items():
        if not isinstance(stated, dict):
            raise TokenizerError(f"added_tokens_decoder says {stated!r} of token {key}")
        token, text = _token_id(key), require_text(stated.get("content"))
        found[token] = AddedToken(
            id=token,
            text=text,
            special=bool(stated.get("special")) or text in special,
            lstrip=bool(stated.get("lstrip")),
            rstrip=bool(stated.get("rstrip")),
            single_word=bool(stated.get("single_word")),
        )
    return tuple(found[token] for token in sorted(found))


def _chat_templates(folder: Path, main: dict[str, Any]) -> dict[str, str]:
    """Templates by name; files of their own overrule tokenizer_config.json, as in transformers."""
    stated = main.get("chat_template")
    if not stated:
        stated = read_json(folder / "chat_template.json").get("chat_template")
    templates = _named_templates(stated)
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        templates["default"] = _read_template(alone)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        if path.is_file():
            templates[path.stem] = _read_template(path)
    return templates


def _read_template(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TokenizerError(f"{path.name} is larger than {MAX_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path.name} is not UTF-8: {error}") from error


def _named_templates(stated: Any) -> dict[str, str]:
    """One template, or a list of {name, template}, as name to source."""
    if isinstance(stated, str):
        return {"default": require_text(stated)}
    if not isinstance(stated, list):
        return {}
    named = {}
    for entry in stated:
        if not isinstance(entry, dict):
            raise TokenizerError("chat_template is neither a text nor a list of named ones")
        named[require_text(entry.get("name"))] = require_text(entry.get("template"))
    return named


def require_text(stated: Any) -> str:
    """What is no text, or one that UTF-8 cannot carry, is refused before a client meets it."""
    if not isinstance(stated, str):
        raise TokenizerError(f"{stated!r} stands where a text should be")
    try:
        stated.encode()
    except UnicodeEncodeError:
        raise TokenizerError(f"{stated!r} is no text: it holds half a character") from None
    return stated


def _token_id(stated: Any) -> int:
    """A number, or its digits."""
    is_number = isinstance(stated, int) and not isinstance(stated, bool)
    if isinstance(stated, str) and re.fullmatch("[0-9]{1,10}", stated):
        stated, is_number = int(stated), True
    if not is_number or not 0 <= stated < _MAX_ID:
        raise TokenizerError(f"{stated!r} stands where a token's number should be")
    return int(stated)


def _flag(main: dict[str, Any], name: str) -> bool | None:
    stated = main.get(name)
    return None if stated is None else bool(stated)


def _spelling(stated: Any) -> str | None:
    """A token named by its text or by an object that holds it."""
    text = stated.get("content") if isinstance(stated, dict) else stated
    return require_text(text) if isinstance(text, str) and text else None


def _ids(stated: Any) -> tuple[int, ...]:
    listed = stated if isinstance(stated, list) else [stated]
    return tuple(token for token in listed if type(token) is int and 0 <= token < _MAX_ID)


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None
