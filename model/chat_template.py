"""A checkpoint's chat template: a conversation to token ids, what was said kept apart from markup.

A special token's spelling inside a message must stay text. So before rendering a mark, one
character nobody can foresee, is put behind the first character of every such spelling in what the
client sent; after rendering only unmarked spellings, those the template wrote, become tokens, and
the marks go.

Templates look into contents, too (``'</think>' in content``). Two renders guard against both
dangers: the careful one marks every character that could begin a special token, so that nothing a
template does to contents can put a spelling together; the plain one marks whole spellings only and
leaves an assistant's unspecial markup (``<think>``) readable. Where both write the same text the
careful one counts, else the template has looked, and the plain one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from model import template_traits
from model.template_budget import Budget
from model.template_filters import MARK
from model.template_marks import Marked, Marker
from model.template_sandbox import ChatEnvironment, TemplateRefused, render
from model.tokenizer import Segment, Tokenizer
from model.tokenizer.special import private_characters

_MAX_DEPTH = 100  # of nested JSON in a conversation
Messages = Sequence[Mapping[str, Any]]


class ChatTemplateError(ValueError):
    """The template cannot be compiled, refuses the conversation, or wants too much."""


class ChatTemplate:
    """Compiled once; rendering is thread-safe."""

    def __init__(self, source: str | Mapping[str, str], tokenizer: Tokenizer) -> None:
        """``source`` is one template or several by name (default, tool_use, ...)."""
        sources = {"default": source} if isinstance(source, str) else dict(source)
        environment = ChatEnvironment()
        self._templates = {name: _compile(environment, text) for name, text in sources.items()}
        trees = [environment.parse(text) for text in sources.values()]
        self._reads_parts = any(map(template_traits.reads_parts, trees))
        self.reads_tools = any(map(template_traits.reads_tools, trees))
        self.quotes_arguments = any(map(template_traits.quotes_arguments, trees))
        self._tokenizer = tokenizer
        self.source = "".join(sources.values())
        self._plain, self._careful = Marker(tokenizer, eager=False), Marker(tokenizer, eager=True)

    def encode(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The conversation's token ids. The template writes BOS itself where it is wanted."""
        segments = self.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=kwargs,
        )
        return self._tokenizer.encode_segments(segments)

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Segment]:
        """The conversation as the template writes it, cut into text and special tokens.

        ``continue_final_message`` leaves the last message open at its end. Raises
        ChatTemplateError.
        """
        if continue_final_message and add_generation_prompt:
            raise ChatTemplateError(
                "continue_final_message and add_generation_prompt exclude each other: a message "
                "that goes on needs no new turn"
            )
        variables = {
            **self._tokenizer.named_tokens,
            "kwargs": dict(kwargs or {}),
            "messages": [self._message(message) for message in messages],
            "tools": list(tools) if tools else None,
        }
        conversation = _Conversation(variables, add_generation_prompt, continue_final_message)
        return self._segments(self._rendered(self._choose(bool(tools)), conversation))

    def _choose(self, has_tools: bool) -> jinja2.Template:
        """As transformers chooses among named templates."""
        names = ["tool_use", "default"] if has_tools else ["default"]
        found = next((self._templates[name] for name in names if name in self._templates), None)
        if found is None and len(self._templates) == 1:
            found = next(iter(self._templates.values()))
        if found is None:
            raise ChatTemplateError(
                f"the checkpoint names templates {sorted(self._templates)} but none of them default"
            )
        return found

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Text parts are joined by newlines for templates that expect a string, as vLLM does."""
        content = message.get("content")
        if self._reads_parts or not isinstance(content, list):
            return dict(message)
        texts = [str(part.get("text", "")) for part in content if isinstance(part, Mapping)]
        return {**message, "content": "\n".join(texts)}

    def _rendered(self, template: jinja2.Template, conversation: _Conversation) -> Marked:
        mark, end = list(private_characters(2, self.source + conversation.all_text()))
        budget = Budget(conversation.num_characters)
        plain = conversation.render(template, self._plain, mark, end, budget)
        if not conversation.would_mark(self._careful):
            return plain
        try:
            careful = conversation.render(template, self._careful, mark, end, budget)
        except ChatTemplateError:
            return plain
        return careful if careful.text() == plain.text() else plain

    def _segments(self, rendered: Marked) -> list[Segment]:
        runs = self._tokenizer.spellings.split(rendered.marked)
        segments = (
            Segment(run.replace(rendered.mark, ""), False) if token is None else Segment(run, True)
            for run, token in runs
        )
        return [segment for segment in segments if segment.text]


class _Conversation:
    """What the client sent, ready to be marked and rendered."""

    def __init__(
        self, variables: dict[str, Any], add_generation_prompt: bool, continues: bool
    ) -> None:
        self._variables = variables
        self._add_generation_prompt = add_generation_prompt
        self._continues = continues
        self._texts = list(_texts([variables[name] for name in ("messages", "tools", "kwargs")]))
        self.num_characters = sum(map(len, self._texts)) + 20 * len(self._texts)

    def all_text(self) -> str:
        return "".join(self._texts)

    def would_mark(self, marker: Marker) -> bool:
        return any(map(marker.would_mark, self._texts))

    def render(
        self, template: jinja2.Template, marker: Marker, mark: str, end: str, budget: Budget
    ) -> Marked:
        by_client = _mapped(lambda text: marker.mark(text, mark, False))
        by_assistant = _mapped(lambda text: marker.mark(text, mark, True))
        messages = [
            (by_assistant if message.get("role") == "assistant" else by_client)(message)
            for message in self._variables["messages"]
        ]
        if self._continues:
            _leave_open(messages, end)
        variables = {
            **self._variables,
            **by_client(self._variables["kwargs"]),
            "messages": messages,
            "tools": by_client(self._variables["tools"]),
            "add_generation_prompt": self._add_generation_prompt,
            MARK: mark,
        }
        text = _run(template, variables, budget)
        return Marked(_cut(text, end) if self._continues else text, mark)


def _run(template: jinja2.Template, variables: Mapping[str, Any], budget: Budget) -> str:
    try:
        return render(template, variables, budget)
    except TemplateRefused as error:
        raise ChatTemplateError(f"the chat template refuses the messages: {error}") from None
    except RecursionError:
        raise ChatTemplateError("the chat template recurses too deeply") from None
    except Exception as error:  # a template can make Python raise anything
        raise ChatTemplateError(f"the chat template failed: {str(error)[:300]}") from None


def _leave_open(messages: list[Any], end: str) -> None:
    """Ends the last message's text with a mark and a space (which trimming would take away)."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        messages[-1]["content"] = f"{content}{end} "
        return
    parts = [part for part in content or () if isinstance(part, dict) and "text" in part]
    if not parts:
        raise ChatTemplateError(
            "continue_final_message: the last message has no text to go on from"
        )
    parts[-1]["text"] = f"{parts[-1]['text']}{end} "


def _cut(text: str, end: str) -> str:
    at = text.rfind(end)
    if at < 0:
        raise ChatTemplateError(
            "continue_final_message: the chat template leaves the last message's end out"
        )
    kept_spaces = text.startswith(f"{end} ", at)
    return text[:at] if kept_spaces else text[:at].rstrip()


def _mapped(change: Callable[[str], str]) -> Callable[[Any], Any]:
    """Copies plain JSON with every string changed, keys too; other objects become their text."""

    def copy(value: Any, depth: int = 0) -> Any:
        if isinstance(value, str):
            return change(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if depth > _MAX_DEPTH:
            raise ChatTemplateError(f"messages are nested deeper than {_MAX_DEPTH}")
        if isinstance(value, Mapping):
            return {copy(key, depth + 1): copy(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, depth + 1) for item in value]
        return change(str(value))

    return copy


def _texts(value: Any) -> Iterable[str]:
    """Every string in plain JSON, keys too."""
    pending = [value]
    while pending:
        found = pending.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, Mapping):
            pending.extend([*found.keys(), *found.values()])
        elif isinstance(found, list | tuple):
            pending.extend(found)


def _compile(environment: ChatEnvironment, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"chat template, line {error.lineno}: {error.message}") from None
    except Exception as error:  # deep nesting makes Python's own compiler raise several kinds
        raise ChatTemplateError(
            f"the chat template cannot be compiled: {str(error)[:300]}"
        ) from None


def load_chat_template(tokenizer: Tokenizer, override: str | None = None) -> ChatTemplate | None:
    """The checkpoint's template, or the one given by path or as text; None without either."""
    if override is not None:
        return ChatTemplate(_source(override), tokenizer)
    return ChatTemplate(tokenizer.chat_templates, tokenizer) if tokenizer.chat_templates else None


def _source(override: str) -> str:
    if "{" in override or "\n" in override:
        return override
    try:
        return Path(override).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ChatTemplateError(
            f"--chat-template is neither a readable file nor a template: {override}"
        ) from error
