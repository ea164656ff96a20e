"""From a request's fields to what the engine needs, with the server's and the model's bounds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from service.api.schemas.sampling import SamplingFields, Speculation
from service.engine.messages import SamplingSettings
from service.errors import ContextLengthExceeded, InvalidRequest

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer
    from service.registry import ServedModel
    from service.settings import Settings

DEFAULTS = {  # where neither the request nor the checkpoint's generation_config says otherwise
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
SEED_BITS = 63
MAX_BEST_OF = 20
NOT_WITH_BEAMS: dict[str, Any] = {  # and what they may say all the same
    "stop": [],
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "allowed_token_ids": [],
    "bad_words": [],
}


def check_limits(fields: SamplingFields, settings: Settings) -> None:
    """The bounds an operator can move, and fields that make sense only together."""
    n = fields.n or 1
    if n > settings.max_n:
        raise _bound("n", f"must be at most {settings.max_n} on this server")
    if fields.stop and len(fields.stop) > settings.max_stop:
        raise _bound("stop", f"takes at most {settings.max_stop} strings on this server")
    if fields.best_of is not None and fields.best_of != n:
        _check_best_of(fields, n, settings)
    check_beams(fields)
    if fields.stream_options is not None and not fields.stream:
        raise _bound("stream_options", "needs stream: true")
    if fields.prompt_logprobs is not None and fields.stream:
        raise _bound("prompt_logprobs", "cannot be streamed; leave out stream")
    if fields.truncate_prompt_tokens == 0:
        raise _bound("truncate_prompt_tokens", "must be at least 1, or -1 for what fits")
    if fields.speculation is not None:
        _check_speculation(fields.speculation, settings)


def _check_speculation(wanted: Speculation, settings: Settings) -> None:
    if wanted.method == "draft" and settings.speculative_model is None:
        raise _bound(
            "speculation.method", "this server has no draft model; use ngram, or leave it out"
        )
    most = settings.num_speculative_tokens
    if wanted.num_tokens is not None and wanted.num_tokens > most:
        raise _bound("speculation.num_tokens", f"must be at most {most} on this server")


def speculation(fields: SamplingFields, settings: Settings) -> tuple[str, int]:
    """Who proposes how many tokens: what the request says, else the server's default."""
    wanted = fields.speculation or Speculation()
    most = settings.num_speculative_tokens
    return (
        settings.speculative_method if wanted.method is None else wanted.method,
        most if wanted.num_tokens is None else wanted.num_tokens,
    )


def _check_best_of(fields: SamplingFields, n: int, settings: Settings) -> None:
    most, best_of = min(MAX_BEST_OF, settings.max_n), fields.best_of or n
    if not n <= best_of <= most:
        raise _bound("best_of", f"must be n ({n}), or more and at most {most}")
    if fields.stream:
        raise _bound("best_of", f"more than n ({n}) cannot be streamed; leave out stream")


def check_beams(fields: SamplingFields) -> None:
    """Beams are the likeliest texts of the model itself: what would change it has no place."""
    if not fields.use_beam_search:
        if fields.length_penalty not in (None, 1):
            raise _bound("length_penalty", "needs use_beam_search: true")
        return
    if fields.stream:
        raise _bound("use_beam_search", "cannot be streamed; leave out stream")
    if fields.max_tokens == 0:
        raise _bound("max_tokens", "must be at least 1 with use_beam_search")
    for name, neutral in NOT_WITH_BEAMS.items():
        if getattr(fields, name) not in (None, neutral):
            raise _bound(name, "cannot be used with use_beam_search, which ranks raw probabilities")


def num_choices(fields: SamplingFields) -> int:
    """That are generated for each prompt; the answer shows the ``n`` best."""
    return fields.best_of or fields.n or 1


def choice_share(
    num_choices: int, logprobs: int | None, stated: int | None, param: str, most: int
) -> int | None:
    """Tokens each choice may have, so that all together, with the alternatives shown for each, are
    at most ``most``; None is no bound: a lone choice has the context's.

    Raises ``InvalidRequest`` where more is stated: before a prompt is looked at, because the
    choices themselves take memory.
    """
    if num_choices == 1:
        return None
    weight = num_choices * (1 + (logprobs or 0))
    share = most // weight
    asked = 1 if stated is None else stated
    if asked <= share:
        return share
    alternatives = f", with logprobs {asked * weight}," if logprobs else ""
    remedy = f"{param} of at most {share}, or fewer choices" if share else "fewer choices"
    raise _bound(
        param,
        f"{num_choices} choices of {asked} tokens are {asked * num_choices}{alternatives} and this "
        f"server takes {most} in one request. Send {remedy}.",
    )


def _bound(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {message}", param=param)


def check_ids(ids: Sequence[int], vocabulary: int, param: str) -> None:
    """Raises ``InvalidRequest`` for the first id outside ``0 .. vocabulary - 1``."""
    if ids and (min(ids) < 0 or max(ids) >= vocabulary):
        wrong = next(index for index, token in enumerate(ids) if not 0 <= token < vocabulary)
        raise _bound(f"{param}[{wrong}]", f"is no token id: the vocabulary has {vocabulary}")


class Sampling:
    """One request's settings, read once; ``for_prompt`` makes them the engine's."""

    def __init__(
        self,
        fields: SamplingFields,
        model: ServedModel,
        *,
        logprobs: int | None,
        max_tokens: int | None,
        default_max_tokens: int | None,
        prompt_param: str,
        budget_param: str,
        seeds: random.Random,
        speculation: tuple[str, int] = ("none", 0),
        num_prompts: int = 1,
        max_request_tokens: int = 1 << 20,
        most_tokens: int | None = None,
    ) -> None:
        """``most_tokens`` the caller's key lets a prompt and its choices have: a default is cut to
        it, what is stated is judged when the request runs."""
        self.n = num_choices(fields)
        self.context = model.context
        self._max_tokens = max_tokens
        self._default = default_max_tokens
        self._most_tokens = most_tokens
        self._min_tokens = fields.min_tokens or 0
        self._seed = fields.seed
        self._seeds = seeds
        self._params = prompt_param, budget_param  # the fields errors name
        self._share = choice_share(
            self.n * num_prompts, logprobs, max_tokens, budget_param, max_request_tokens
        )
        self._model = model
        self._speculation = speculation
        self._base = self._read(fields, logprobs)

    def _read(self, fields: SamplingFields, logprobs: int | None) -> SamplingSettings:
        numbers = {name: _number(fields, self._model, name) for name in DEFAULTS}
        vocabulary = self._model.vocabulary
        check_ids(fields.stop_token_ids or (), vocabulary, "stop_token_ids")
        check_ids(fields.allowed_token_ids or (), vocabulary, "allowed_token_ids")
        tokenizer = self._model.tokenizer
        assert tokenizer is not None
        eos = () if fields.ignore_eos else self._model.eos_token_ids
        bad_words = bad_word_ids(fields.bad_words or (), tokenizer)
        _check_allowed(fields, (*eos, *(fields.stop_token_ids or ())), bad_words)
        return SamplingSettings(
            temperature=numbers["temperature"],
            top_p=numbers["top_p"],
            top_k=_read_top_k(int(numbers["top_k"]), vocabulary),
            min_p=numbers["min_p"],
            presence_penalty=numbers["presence_penalty"],
            frequency_penalty=numbers["frequency_penalty"],
            repetition_penalty=numbers["repetition_penalty"],
            min_tokens=self._min_tokens,
            stop_token_ids=_distinct(fields.stop_token_ids or ()),
            eos_token_ids=eos,
            logit_bias=read_bias(fields.logit_bias or {}, vocabulary),
            allowed_token_ids=_distinct(fields.allowed_token_ids or ()) or None,
            bad_words=bad_words,
            logprobs=logprobs,
            speculative_method=self._speculation[0],
            num_speculative_tokens=self._speculation[1],
        )

    def for_prompt(self, num_prompt: int) -> list[SamplingSettings]:
        """The n choices of a prompt of so many tokens. Raises ``ContextLengthExceeded``."""
        budget = self.budget(num_prompt)
        seed = self._seeds.getrandbits(SEED_BITS) if self._seed is None else self._seed
        return [
            replace(self._base, max_tokens=budget, seed=seed, choice=choice)
            for choice in range(self.n)
        ]

    def most_prompt_tokens(self) -> int:
        """What ``truncate_prompt_tokens: -1`` keeps: all that leaves room for the answer."""
        answer = self._default if self._max_tokens is None else self._max_tokens
        return max(1, self.context - max(1, answer or 1))

    def budget(self, num_prompt: int) -> int:
        """How many tokens may be generated: what was asked for, or as much of a default as fits."""
        room = self.context - num_prompt
        stated = self._max_tokens
        if (stated is not None and stated > room) or (room < 1 and stated != 0):
            raise self._too_long(num_prompt)
        default = min(room, self._share or room, self._default_budget(num_prompt, room))
        budget = default if stated is None else stated
        if self._min_tokens > budget:
            raise _bound("min_tokens", f"must be at most {self._params[1]} ({budget})")
        return budget

    def _default_budget(self, num_prompt: int, room: int) -> int:
        default = self._default or room
        if self._most_tokens is None:
            return default
        return max(1, min(default, (self._most_tokens - num_prompt) // self.n))

    def _too_long(self, num_prompt: int) -> ContextLengthExceeded:
        room = self.context - num_prompt
        if room < 1:
            longest = self.context if self._max_tokens == 0 else self.context - 1
            return ContextLengthExceeded(
                f"The model's context is {self.context} tokens and the prompt has {num_prompt}; "
                f"send a prompt of at most {longest} tokens, or truncate_prompt_tokens.",
                param=self._params[0],
            )
        stated, name = self._max_tokens or 0, self._params[1]
        return ContextLengthExceeded(
            f"The model's context is {self.context} tokens, but the prompt has {num_prompt} and "
            f"{name} asks for {stated}: {num_prompt + stated} in all. With this prompt "
            f"{name} may be at most {room}.",
            param=name,
        )


def _check_allowed(
    fields: SamplingFields, ends: Sequence[int], bad_words: Sequence[Sequence[int]]
) -> None:
    """Raises ``InvalidRequest`` where not even the first token could be drawn."""
    if fields.allowed_token_ids is None:
        return
    banned = {word[0] for word in bad_words if len(word) == 1}
    banned |= set(ends) if fields.min_tokens else set()
    if banned.issuperset(fields.allowed_token_ids):
        raise _bound("allowed_token_ids", "min_tokens and bad_words leave none of them")


def _distinct(ids: Sequence[int]) -> tuple[int, ...]:
    """Each id once, however often a client wrote it: never more than the vocabulary."""
    return tuple(dict.fromkeys(ids))


def _read_top_k(top_k: int, vocabulary: int) -> int:
    """0 is off: what clients say as 0, as -1, or as more tokens than there are."""
    return top_k if 0 < top_k < vocabulary else 0


def _number(fields: SamplingFields, model: ServedModel, name: str) -> float:
    value: float | None = getattr(fields, name)
    return float(model.generation_defaults.get(name, DEFAULTS[name]) if value is None else value)


def read_bias(bias: dict[str, float], vocabulary: int) -> dict[int, float]:
    """JSON keys are strings; they must spell ids of the vocabulary."""
    read = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
            raise _bound(
                f"logit_bias.{key[:20]}", f"is no token id: the vocabulary has {vocabulary}"
            )
        read[int(key)] = float(value)
    return read


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as the tokens that spell it, as a text begins with it and after a space."""
    spelled: list[tuple[int, ...]] = []
    for index, word in enumerate(words):
        bare = _spell(word.lstrip(), tokenizer)
        if not bare:
            raise _bound(f"bad_words[{index}]", "spells no token")
        spelled.append(bare)
        spaced = _spell(" " + word.lstrip(), tokenizer)
        if spaced and spaced != bare and spaced[0] != bare[0]:
            spelled.append(spaced)
    return tuple(dict.fromkeys(spelled))


def _spell(word: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode(word, add_special_tokens=False, parse_special=False))
