"""What a checkpoint says about its tokenizer beside the vocabulary: names, flags, chat templates.

Read from tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja,
config.json and generation_config.json, as far as they are there. ``clean_up_tokenization_spaces``
is left unread on purpose: it alters text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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


class TokenizerError(ValueError):
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
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TokenizerError(f"{path.name} holds no JSON object")
    return found


def _declared(
    main: dict[str, Any], names: dict[str, Any], added: dict[str, Any]
) -> tuple[AddedToken, ...]:
    """Tokens with a stated id: added_tokens.json, overruled by added_tokens_decoder."""
    special = {_spelling(names.get(name)) for name in _NAMES}
    extra = names.get("additional_special_tokens") or names.get("extra_special_tokens") or []
    special.update(
        _spelling(token) for token in (extra if isinstance(extra, list) else extra.values())
    )
    found = {token: AddedToken(token, text, text in special) for text, token in added.items()}
    for key, stated in (main.get("added_tokens_decoder") or {}).items():
        text = str(stated["content"])
        found[int(key)] = AddedToken(
            id=int(key),
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
    templates = named_templates(stated)
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        templates["default"] = alone.read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    return templates


def named_templates(stated: Any) -> dict[str, str]:
    """One template, or a list of {name, template}, as name to source."""
    if isinstance(stated, str):
        return {"default": stated}
    if isinstance(stated, list):
        return {str(entry["name"]): str(entry["template"]) for entry in stated}
    return {}


def _flag(main: dict[str, Any], name: str) -> bool | None:
    stated = main.get(name)
    return None if stated is None else bool(stated)


def _spelling(stated: Any) -> str | None:
    """A token named by its text or by an object that holds it."""
    text = stated.get("content") if isinstance(stated, dict) else stated
    return text if isinstance(text, str) and text else None


def _ids(stated: Any) -> tuple[int, ...]:
    listed = stated if isinstance(stated, list) else [stated]
    return tuple(token for token in listed if isinstance(token, int))


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None
