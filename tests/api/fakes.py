"""Small real things for these tests: a byte tokenizer, an engine that says what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from msgspec.structs import replace

from model.tokenizer import Segment, Tokenizer
from model.tokenizer.config import TokenizerConfig
from model.tokenizer.special import AddedToken
from service.engine.messages import Output, Outputs, SamplingSettings, State, Submit, TokenLogprob
from service.engine.tally import Tally
from service.errors import EngineFailure, PronkError
from service.registry import ServedModel

BOS, EOS, USER, ASSISTANT = 256, 257, 258, 259
SPECIAL = {"<s>": BOS, "</s>": EOS, "<|user|>": USER, "<|assistant|>": ASSISTANT}
WORDS = {260: "ab", 261: "STO", 262: " the", 263: "é!"}
VOCABULARY = 264
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|user|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class ByteTokenizer(Tokenizer):
    """One token a byte, four special tokens, and a few longer ones that are only ever drawn."""

    def __init__(self) -> None:
        super().__init__(
            TokenizerConfig(
                named_tokens={"bos_token": "<s>", "eos_token": "</s>"},
                chat_templates={"default": TEMPLATE},
            ),
            [AddedToken(token, text) for text, token in SPECIAL.items()],
            vocab_size=VOCABULARY,
            prefix=(BOS,),
            suffix=(),
            drops_first_space=False,
        )

    def token_to_id(self, text: str) -> int | None:
        return SPECIAL.get(text)

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return list(text.encode())
        ids: list[int] = []
        for run, token in self.spellings.split(text):
            ids += [token.id] if token else list(run.encode())
        return ids

    def _encode_segments(self, segments: list[Segment]) -> list[int]:
        ids: list[int] = []
        for segment in segments:
            ids += [SPECIAL[segment.text]] if segment.is_special else list(segment.text.encode())
        return ids

    def _token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else WORDS.get(token, "").encode()

    def _is_spelled_out(self, token: int) -> bool:
        return token >= 256


def say(text: str) -> list[int]:
    """The tokens of ``text``, then the end."""
    return [*text.encode(), EOS]


Script = Callable[[list[int], SamplingSettings], Sequence[int]]


@dataclass
class FakeEngine:
    """Draws what ``script`` says and obeys ends, stop ids and budgets as the real engine does."""

    script: Script = lambda prompt, settings: say("Hello, world")
    group: int = 1  # tokens in one output
    refusal: PronkError | None = None
    refusals: dict[int, PronkError] = field(default_factory=dict)  # by number of the submit
    fail_after: int | None = None  # outputs, over all choices of a generation
    pause: float = 0.0  # seconds before each output
    gate: asyncio.Event | None = None  # nothing comes before it is set
    cached: int = 0
    pooled: bytes | None = None  # what is said where pooling is asked for
    state: State = field(default_factory=lambda: State(stage="ready"))
    observers: list[Callable[[Outputs | State], None]] = field(default_factory=list)
    submitted: list[dict[str, object]] = field(default_factory=list)
    stopped: list[tuple[int, int]] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)  # by reason
    num_retried: int = 0
    num_poisonous: int = 0
    num_discarded: int = 0
    loaded: dict[str, str] = field(default_factory=dict)  # adapters: name to folder
    num_loads: int = 0
    asked_about: list[Submit] = field(default_factory=list)
    live: int = 0  # generations somebody holds
    generations: list[FakeGeneration] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        return self.state.stage == "ready"

    def retry_after(self) -> float:
        return 1.5

    async def estimate(self, submits: list[Submit]) -> dict[str, object]:
        self.asked_about = submits
        if self.refusal is not None:
            raise self.refusal
        names = ("queue", "prefill", "decode", "total")
        return {"cached_tokens": self.cached} | {f"{name}_seconds": 0.5 for name in names}

    async def load_adapter(self, name: str, folder: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.loaded[name] = folder
        self.num_loads += 1
        self.state = replace(self.state, adapters=self.state.adapters | {name: self.num_loads})

    async def unload_adapter(self, name: str) -> None:
        del self.loaded[name]
        left = {known: v for known, v in self.state.adapters.items() if known != name}
        self.state = replace(self.state, adapters=left)

    @asynccontextmanager
    async def submit(
        self, prompt: list[int], settings: Sequence[SamplingSettings], **rest: object
    ) -> AsyncIterator[FakeGeneration]:
        number = len(self.submitted)
        self.submitted.append({"prompt": prompt, "settings": list(settings), **rest})
        await asyncio.sleep(0)
        if refusal := self.refusals.get(number, self.refusal):
            raise refusal
        self.live += 1
        tally = rest.get("tally") or Tally()
        assert isinstance(tally, Tally)
        tally.begin()
        wanted = rest.get("prompt_logprobs")
        generation = self.generation(number, prompt, list(settings), wanted)
        generation.tally = tally
        self.generations.append(generation)
        try:
            yield generation
        finally:
            self.live -= 1
            generation.close()
            tally.end()

    def generation(
        self, number: int, prompt: list[int], settings: list[SamplingSettings], wanted: object
    ) -> FakeGeneration:
        return FakeGeneration(self, number, prompt, settings, wanted)

    @property
    def busy(self) -> int:
        """Generations that are not finished yet."""
        return sum(bool(generation.unfinished) for generation in self.generations)


class FakeGeneration:
    def __init__(
        self,
        engine: FakeEngine,
        number: int,
        prompt: list[int],
        settings: list[SamplingSettings],
        prompt_logprobs: object,
    ) -> None:
        self.engine = engine
        self.number = number
        self.prompt = prompt
        self.unfinished = {one.choice for one in settings}
        self.prompt_logprobs = prompt_logprobs
        self.outputs = self._outputs(settings)
        self.given = 0
        self.tally = Tally()

    def __aiter__(self) -> FakeGeneration:
        return self

    async def __anext__(self) -> Output:
        if self.engine.gate is not None:
            await self.engine.gate.wait()
        await asyncio.sleep(self.engine.pause)
        if self.engine.fail_after is not None and self.given >= self.engine.fail_after:
            raise EngineFailure("the engine failed while it answered; try again")
        for output in self.outputs:
            if output.choice in self.unfinished:
                self.given += 1
                self.tally.note(output)
                if output.finish_reason:
                    self.unfinished.discard(output.choice)
                return output
        raise StopAsyncIteration

    def close(self) -> None:
        self.unfinished.clear()

    def stop(self, choice: int) -> None:
        self.engine.stopped.append((self.number, choice))
        self.unfinished.discard(choice)

    def _outputs(self, settings: list[SamplingSettings]) -> Iterator[Output]:
        """Round robin over the choices, ``group`` tokens a turn."""
        queues = [(one, list(self._groups(one))) for one in settings]
        is_first = True
        while any(queue for _, queue in queues):
            for one, queue in queues:
                if not queue:
                    continue
                tokens, reason, stop = queue.pop(0)
                first = (
                    {
                        "prompt_tokens": len(self.prompt),
                        "cached_tokens": self.engine.cached,
                        "queue_time": 0.0,
                        "prefill_time": 0.0,
                    }
                    if is_first
                    else {}
                )
                if is_first and self.prompt_logprobs is not None:
                    first["prompt_logprobs"] = [None, *map(fake_logprob, self.prompt[1:])]
                is_first = False
                if reason is not None and self.engine.pooled is not None:
                    first["pooled"] = self.engine.pooled
                yield Output(
                    id=self.number,
                    choice=one.choice,
                    tokens=tokens,
                    logprobs=None if one.logprobs is None else [*map(fake_logprob, tokens)],
                    finish_reason=reason,
                    stop_reason=stop,
                    **first,
                )

    def _groups(
        self, one: SamplingSettings
    ) -> Iterator[tuple[list[int], str | None, int | str | None]]:
        drawn, reason, stop = draw(self.engine.script(self.prompt, one), one)
        size = self.engine.group
        for start in range(0, max(1, len(drawn)), size):
            is_last = start + size >= len(drawn)
            yield (
                drawn[start : start + size],
                reason if is_last else None,
                stop if is_last else None,
            )


def draw(script: Sequence[int], one: SamplingSettings) -> tuple[list[int], str, int | None]:
    """The script until an end id, a stop id or the budget; it is repeated where it is too short."""
    drawn: list[int] = []
    position = 0
    if one.max_tokens == 0:
        return drawn, "length", None
    while True:
        token = script[position % len(script)]
        position += 1
        ends = token in one.eos_token_ids or token in one.stop_token_ids
        if ends and len(drawn) < one.min_tokens:
            continue
        drawn.append(token)
        if ends:
            return drawn, "stop", token if token in one.stop_token_ids else None
        if len(drawn) >= one.max_tokens:
            return drawn, "length", None


def fake_logprob(token: int) -> TokenLogprob:
    """A token's own is -token/100; the alternatives are always the same three."""
    return TokenLogprob(-token / 100, 1 + token % 5, [65, 66, 67], [-0.65, -0.66, -0.67])


def served(engine: FakeEngine | Sequence[FakeEngine], name: str = "tiny") -> ServedModel:
    from model.chat_template import ChatTemplate

    engines = [engine] if isinstance(engine, FakeEngine) else list(engine)
    tokenizer = ByteTokenizer()
    return ServedModel(
        names=[name, "org/alias"],
        engines=engines,
        max_model_len=200,
        tokenizer=tokenizer,
        chat_template=ChatTemplate(TEMPLATE, tokenizer),
        eos_token_ids=(EOS,),
        fingerprint="fp_test",
    )
