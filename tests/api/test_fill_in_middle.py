"""``suffix``: prompts as each family of models writes them, cut at the right ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from model.tokenizer.loading import load_tokenizer
from service.api.fill_in_middle import FillInMiddle, encode_inside, fill_in_middle
from service.errors import InvalidRequest
from tests.api.conftest import refuse, talking_to
from tests.api.fakes import BOS, EOS, ByteTokenizer, FakeEngine

URL = "/v1/completions"
PRE, SUF, MID, END = 260, 261, 262, 263
LLAMA = {"▁<PRE>": PRE, "▁<SUF>": SUF, "▁<MID>": MID, "▁<EOT>": END}


class Filling(ByteTokenizer):
    """With tokens for it, under some family's names."""

    def __init__(self, names: dict[str, int]) -> None:
        super().__init__()
        self._names = names

    def token_to_id(self, text: str) -> int | None:
        return self._names.get(text, super().token_to_id(text))


@pytest.fixture
def ask(make_app: Callable[..., FastAPI], engine: FakeEngine) -> Any:
    async def ask(names: dict[str, int] = LLAMA, **fields: Any) -> list[dict[str, Any]]:
        app = make_app()
        app.state.server.models.get(None, None).tokenizer = Filling(names)
        async with talking_to(app) as client:
            response = await client.post(URL, json=fields)
        assert response.status_code == 200, response.text
        ask.usage = response.json()["usage"]  # type: ignore[attr-defined]
        return engine.submitted

    return ask


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (LLAMA, [BOS, PRE, *b"ab", SUF, *b"yz", MID]),
        (
            {"<|fim_prefix|>": PRE, "<|fim_suffix|>": SUF, "<|fim_middle|>": MID},
            [BOS, PRE, *b"ab", SUF, *b"yz", MID],
        ),
        (
            {"<fim_prefix>": PRE, "<fim_suffix>": SUF, "<fim_middle>": MID},
            [BOS, PRE, *b"ab", SUF, *b"yz", MID],
        ),
        (
            {"<｜fim▁begin｜>": PRE, "<｜fim▁hole｜>": SUF, "<｜fim▁end｜>": MID},
            [BOS, PRE, *b"ab", SUF, *b"yz", MID],
        ),
        ({"[PREFIX]": PRE, "[SUFFIX]": SUF}, [BOS, SUF, *b"yz", PRE, *b"ab"]),
    ],
)
async def test_each_family_is_asked_in_its_own_words(
    ask: Any, names: dict[str, int], expected: list[int]
) -> None:
    (submitted,) = await ask(names, prompt="ab", suffix="yz")
    assert submitted["prompt"] == expected
    assert ask.usage["prompt_tokens"] == len(expected)


async def test_the_end_of_the_middle_ends_the_answer(ask: Any, engine: FakeEngine) -> None:
    engine.script = lambda prompt, one: [*b"middle", END, *b"past it"]
    (submitted,) = await ask(prompt="ab", suffix="yz")
    assert submitted["settings"][0].eos_token_ids == (EOS, END)
    assert ask.usage["completion_tokens"] == 7
    await ask(prompt="ab", suffix="yz", ignore_eos=True)
    assert engine.submitted[1]["settings"][0].eos_token_ids == ()


async def test_prompts_of_every_kind_get_the_same_suffix(ask: Any) -> None:
    submitted = await ask(prompt=[[BOS, 97], [98]], suffix="z")
    assert [one["prompt"] for one in submitted] == [
        [BOS, PRE, 97, SUF, 122, MID],
        [BOS, PRE, 98, SUF, 122, MID],
    ]
    (*_, last) = await ask(prompt="a", suffix="z", add_special_tokens=False)
    assert last["prompt"] == [PRE, 97, SUF, 122, MID]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (14, [BOS, PRE, *b"abcdef", SUF, *b"uvwx", MID]),
        (12, [BOS, PRE, *b"abcdef", SUF, *b"uv", MID]),
        (8, [BOS, PRE, *b"def", SUF, *b"u", MID]),
        (5, [BOS, PRE, *b"f", SUF, MID]),
    ],
)
async def test_what_is_next_to_the_gap_is_kept(ask: Any, length: int, expected: list[int]) -> None:
    (submitted,) = await ask(prompt="abcdef", suffix="uvwx", truncate_prompt_tokens=length)
    assert submitted["prompt"] == expected


async def test_what_cannot_be_is_refused(make_app: Callable[..., FastAPI]) -> None:
    app = make_app()
    async with talking_to(app) as client:
        error = await refuse(client, suffix="end")
        assert error["param"] == "suffix"
        assert "fill-in-the-middle" in error["message"]
        app.state.server.models.get(None, None).tokenizer = Filling(LLAMA)
        assert (await refuse(client, suffix="end", echo=True))["param"] == "echo"
        error = await refuse(client, suffix="end", truncate_prompt_tokens=4)
        assert error["param"] == "truncate_prompt_tokens"
        error = await refuse(client, suffix="z" * 300)
        assert error["code"] == "context_length_exceeded"


def test_a_suffix_does_not_begin_with_a_space_of_the_tokenizers(tmp_path: Any) -> None:
    from tests.model.tiny_tokenizers import sentencepiece_model

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe", tuple(LLAMA)))

    tokenizer = load_tokenizer(tmp_path)
    tokens = fill_in_middle(tokenizer)
    assert isinstance(tokens, FillInMiddle)
    assert len({tokens.prefix, tokens.suffix, tokens.middle, *tokens.ends}) == 4
    ids = encode_inside("meadow, and", tokenizer, parse=True)
    assert b"".join(map(tokenizer.token_bytes, ids)) == b"meadow, and"
    with pytest.raises(InvalidRequest):
        fill_in_middle(ByteTokenizer())
