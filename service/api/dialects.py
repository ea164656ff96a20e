"""How models write calls and thoughts: the dialects pronk reads, which one a template speaks."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.api.readers import hermes, llama_json, mistral, pythonic
from service.api.readers.scanning import make_call_id
from service.api.readers.thinking import Marks
from service.api.reading import AnswerReader

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

MakeReader = Callable[[Collection[str], int | None, Callable[[], str]], AnswerReader]
INTRODUCTION = "You may call functions. These are there, as JSON, one a line:\n\n"


@dataclass(frozen=True, slots=True)
class Dialect:
    """``markers`` may be special tokens, which the text then has to show; ``instructions`` tell a
    model whose template knows no tools how to call one, and ``write_call`` shows its own calls.
    """

    name: str
    make: MakeReader  # of names known, most calls (None: any number), call ids
    markers: tuple[str, ...]
    instructions: str
    write_call: Callable[[str, str], str]  # name and arguments (JSON)
    make_id: Callable[[], str] = make_call_id

    def reader(self, names: Collection[str], most_calls: int | None) -> AnswerReader:
        return self.make(names, most_calls, self.make_id)

    def prompt(self, tools: Sequence[dict[str, Any]]) -> str:
        lines = [json.dumps(tool, ensure_ascii=False) for tool in tools]
        return INTRODUCTION + "\n".join(lines) + "\n\n" + self.instructions


def _hermes_call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'


def _llama_call(name: str, arguments: str) -> str:
    return f'{{"name": {json.dumps(name)}, "parameters": {arguments}}}'


def _mistral_call(name: str, arguments: str) -> str:
    return f'[TOOL_CALLS][{{"name": {json.dumps(name)}, "arguments": {arguments}}}]'


def _pythonic_call(name: str, arguments: str) -> str:
    try:
        values = json.loads(arguments)
    except ValueError:
        values = {}
    keywords = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return f"[{name}({keywords})]"


HERMES = Dialect(
    "hermes",
    lambda _, most, make_id: hermes.HermesReader(most_calls=most, make_id=make_id),
    (hermes.OPEN, hermes.CLOSE),
    "To call one, write a JSON object with its name and arguments within tags, once for each "
    'call:\n<tool_call>\n{"name": <function name>, "arguments": <object of arguments>}\n'
    "</tool_call>",
    _hermes_call,
)
LLAMA_JSON = Dialect(
    "llama3_json",
    lambda names, most, make_id: llama_json.LlamaJsonReader(
        names, most_calls=most, make_id=make_id
    ),
    (llama_json.TAG,),
    "To call one, answer with nothing but a JSON object of this form:\n"
    '{"name": <function name>, "parameters": <object of arguments>}',
    _llama_call,
)
PYTHONIC = Dialect(
    "pythonic",
    lambda names, most, make_id: pythonic.PythonicReader(names, most_calls=most, make_id=make_id),
    (pythonic.OPEN, pythonic.CLOSE),
    "To call some, answer with nothing but a list of calls of this form:\n"
    "[first_function(name=value, other=value), second_function(name=value)]",
    _pythonic_call,
)
MISTRAL = Dialect(
    "mistral",
    lambda _, most, make_id: mistral.MistralReader(most_calls=most, make_id=make_id),
    (mistral.OPEN, mistral.CALL_ID, mistral.ARGUMENTS),
    "To call some, answer with a list of calls of this form:\n"
    '[TOOL_CALLS][{"name": <function name>, "arguments": <object of arguments>}]',
    _mistral_call,
    mistral.make_short_id,
)
DIALECTS = {
    "hermes": HERMES,
    "llama3_json": LLAMA_JSON,
    "pythonic": PYTHONIC,
    "llama4_pythonic": PYTHONIC,
    "mistral": MISTRAL,
}
THINK = Marks("<think>", "</think>")
BRACKETS = Marks("[THINK]", "[/THINK]")
THOUGHTS = {"think": THINK, "deepseek_r1": THINK, "qwen3": THINK, "mistral": BRACKETS}

SIGNS = (  # what a template says only where its model writes this dialect, the surest first
    (hermes.OPEN, HERMES),
    (mistral.OPEN, MISTRAL),
    (pythonic.OPEN, PYTHONIC),
    ("[func_name1(", PYTHONIC),
    (llama_json.TAG, LLAMA_JSON),
    ('"parameters": dictionary', LLAMA_JSON),
)


def dialect_of(template: str, tokenizer: Tokenizer, wanted: str) -> Dialect:
    """``wanted`` is the operator's word; ``auto`` goes by the template, then by the vocabulary."""
    if wanted != "auto":
        return DIALECTS[wanted]
    for sign, dialect in SIGNS:
        if sign in template:
            return dialect
    for marker, dialect in ((mistral.OPEN, MISTRAL), (llama_json.TAG, LLAMA_JSON)):
        if marker in tokenizer.special_tokens:
            return dialect
    return HERMES


def marks_of(template: str, tokenizer: Tokenizer, wanted: str) -> Marks | None:
    """How the model fences its thoughts; None where it does not think."""
    if wanted == "none":
        return None
    if wanted != "auto":
        return THOUGHTS[wanted]
    for marks in (THINK, BRACKETS):
        if marks.close in template or marks.close in tokenizer.spellings.tokens:
            return marks
    return None


def shown_ids(markers: Iterable[str], tokenizer: Tokenizer) -> frozenset[int]:
    """Those of the markers that are special tokens, which a text leaves out by default."""
    found = (tokenizer.special_tokens.get(marker) for marker in markers)
    return frozenset(token for token in found if token is not None)
