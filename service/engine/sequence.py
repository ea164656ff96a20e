"""A request and its sequences, in integers.

A ``Request`` is one prompt with n choices. It starts as one ``Sequence`` that carries all choices
(``choices``, the first is its own); when its last prompt row has sampled, the others fork off as
sequences of their own. A sequence only catches up: it has tokens and a computed count.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from service.engine.account import Account
from service.engine.messages import Output, SamplingSettings, Submit, TokenLogprob
from service.engine.prefix import GRAIN, PrefixChain, chain_root
from service.redaction import Redacted, redacted

if TYPE_CHECKING:
    from model.grammar import Grammar
    from service.engine.speculation import Speculation


class Status(Enum):
    WAITING = "waiting"  # in the queue: new, preempted, or forked without room to run
    RUNNING = "running"  # holds blocks
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, repr=False)
class Choice(Redacted):
    index: int  # as the client counts
    settings: SamplingSettings


NO_TOKEN = -1


class Draw(NamedTuple):
    """``completes``: the grammar allows nothing after it. With ``NO_TOKEN`` not even a token."""

    token: int
    logprob: TokenLogprob | None = None  # when the choice's settings ask for it
    completes: bool = False

    def __repr__(self) -> str:
        return redacted(self)


class Ending(NamedTuple):
    finish_reason: str
    stop_reason: int | str | None = None
    error: str | None = None

    def __repr__(self) -> str:
        return redacted(self, ("finish_reason",))


class Tally(NamedTuple):
    """What became of the tokens proposed for one output."""

    accepted: int
    rejected: int


NOTHING_PROPOSED = Tally(0, 0)


class Request:
    """What the choices of one submit have in common."""

    __slots__ = (
        "account",
        "arrival",
        "cached_tokens",
        "client",
        "first_scheduled",
        "grammar",
        "is_answered",
        "is_prompt_done",
        "num_pooled",
        "number",
        "pooled",
        "prompt_logprobs",
        "root",
        "sequences",
        "submit",
    )

    def __init__(
        self,
        submit: Submit,
        client: Hashable,
        number: int,
        arrival: float,
        grammar: Grammar | None = None,
        account: Account | None = None,
    ) -> None:
        self.submit = submit
        # Whose share of the device it uses: that of others too, where the scheduler says so.
        self.account = Account(submit.account, submit.weight) if account is None else account
        self.grammar = grammar  # ``submit.grammar``, compiled
        self.client = client
        self.number = number  # order of arrival
        self.arrival = arrival  # the scheduler's clock, seconds
        self.root = chain_root(submit.namespace, submit.adapter, submit.adapter_version)
        self.first_scheduled: float | None = None
        self.cached_tokens: int | None = None  # prompt tokens found cached at its first step
        self.is_prompt_done = False
        self.is_answered = False  # its first output has left
        self.sequences: dict[int, Sequence] = {}  # by unfinished choice
        # One entry a prompt token whose logprob is known; the first token's is None.
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            None if submit.prompt_logprobs is None else [None] * max(1, submit.logprobs_from)
        )
        self.num_pooled = 0  # prompt tokens whose final states are in the pool, from the first on
        self.pooled: bytes | None = None  # once all are

    @property
    def key(self) -> tuple[Hashable, int]:
        return self.client, self.submit.id

    @property
    def lacks_prompt_logprobs(self) -> bool:
        known = self.prompt_logprobs
        return known is not None and len(known) < len(self.submit.prompt)

    def keep_prompt_logprobs(self, logprobs: list[TokenLogprob], num_targets: int) -> None:
        """Of one chunk; they survive the loss of the cache, so each is computed once."""
        assert self.prompt_logprobs is not None, "not asked for"
        assert len(logprobs) == num_targets, "one logprob a target"
        self.prompt_logprobs += logprobs

    def keep_pooled(self, num_tokens: int, pooled: bytes | None) -> None:
        """Of one chunk; like logprobs they outlive the cache."""
        self.num_pooled += num_tokens
        self.pooled = pooled

    def forget_pooled(self) -> None:
        """The runner no longer has the sums: they are made anew, from the first token on."""
        self.num_pooled, self.pooled = 0, None

    def output(
        self,
        choice: int,
        now: float,
        draws: Collection[Draw] = (),
        ending: Ending | None = None,
        tally: Tally = NOTHING_PROPOSED,
    ) -> Output:
        """What one choice gained; the request's first output tells how its prompt fared."""
        reason, stop_reason, error = ending or (None, None, None)
        tokens = [draw.token for draw in draws]
        logprobs = [draw.logprob for draw in draws if draw.logprob is not None] or None
        beside = {} if self.is_answered else self._beside_the_first_output(now)
        self.is_answered = True
        return Output(
            self.submit.id,
            choice,
            tokens,
            logprobs,
            reason,
            stop_reason,
            error,
            num_accepted=tally.accepted,
            num_rejected=tally.rejected,
            **beside,
        )

    def _beside_the_first_output(self, now: float) -> dict[str, Any]:
        started = self.first_scheduled
        return {
            "prompt_tokens": len(self.submit.prompt) if self.is_prompt_done else None,
            "cached_tokens": self.cached_tokens or 0,
            "prompt_logprobs": None if self.lacks_prompt_logprobs else self.prompt_logprobs,
            "queue_time": (now if started is None else started) - self.arrival,
            "prefill_time": None if started is None else now - started,
            "pooled": self.pooled,
        }


@dataclass(slots=True, eq=False, repr=False)
class Sequence(Redacted):
    request: Request
    choices: tuple[Choice, ...]  # more than one until it forks
    tokens: list[int]  # prompt and output
    num_prompt: int
    chain: PrefixChain
    order: tuple[int, int, int]  # (priority, arrival number, choice): who goes first
    num_computed: int = 0
    num_registered: int = 0  # grains told to the block pool
    block_table: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    speculation: Speculation | None = None  # once it was asked whether to guess ahead
    num_reached: int = 0  # tokens that were computed when it last lost its pages
    num_redone: int = 0  # of these: not found cached when it came back
    # Of the rows under way, launched and not yet updated (see ``service.engine.step.Row``):
    num_rows: int = 0
    num_launched: int = 0  # tokens they compute
    num_promised: int = 0  # tokens they draw that it goes on from, whatever these will be

    @classmethod
    def start(cls, request: Request, grain: int = GRAIN) -> Sequence:
        """The sequence that computes the prompt on behalf of every choice."""
        submit = request.submit
        return cls(
            request,
            tuple(Choice(i, settings) for i, settings in enumerate(submit.settings)),
            list(submit.prompt),
            len(submit.prompt),
            PrefixChain(request.root, grain),
            (submit.priority, request.number, 0),
        )

    @property
    def id(self) -> int:
        return self.request.submit.id

    @property
    def account(self) -> Account:
        return self.request.account

    @property
    def may_yield(self) -> bool:
        """Whether it has got on since it last lost its pages, by as much as that cost."""
        gained = self.num_computed - self.num_reached
        return not self.num_reached or gained >= max(self.num_redone, GRAIN)

    @property
    def adapter(self) -> int:
        """Its version; 0 is none."""
        return self.request.submit.adapter_version

    @property
    def grammar(self) -> Grammar | None:
        return self.request.grammar

    @property
    def choice(self) -> int:
        return self.choices[0].index

    @property
    def settings(self) -> SamplingSettings:
        return self.choices[0].settings

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def length(self) -> int:
        """Of its tokens, those promised included."""
        return len(self.tokens) + self.num_promised

    @property
    def num_scheduled(self) -> int:
        """Tokens computed or under way: where its next row starts."""
        return self.num_computed + self.num_launched

    @property
    def num_due(self) -> int:
        """Tokens to schedule until it samples again."""
        return len(self.tokens) + self.num_promised - self.num_computed - self.num_launched

    @property
    def choices_that_draw(self) -> tuple[Choice, ...]:
        """All, but those that asked for no token: max_tokens 0, the prompt alone."""
        if self.num_output or all(choice.settings.max_tokens > 0 for choice in self.choices):
            return self.choices
        return tuple(choice for choice in self.choices if choice.settings.max_tokens > 0)

    @property
    def first_logits(self) -> int:
        """Position of the first row whose logits (or states, to be pooled) are needed.

        Before it, cached pages will do.
        """
        if self.request.lacks_prompt_logprobs:
            assert self.request.prompt_logprobs is not None
            return len(self.request.prompt_logprobs) - 1
        if self.request.submit.pooling == "mean":
            return min(self.request.num_pooled, len(self.tokens) - 1)
        return len(self.tokens) - 1

    def fork(self) -> list[Sequence]:
        """Gives every choice but its own a sequence, with this one's block table, to be shared."""
        children = [self._child(choice) for choice in self.choices[1:]]
        self.choices = self.choices[:1]
        return children

    def _child(self, choice: Choice) -> Sequence:
        priority, number, _ = self.order
        return Sequence(
            self.request,
            (choice,),
            self.tokens.copy(),
            self.num_prompt,
            self.chain.fork(),
            (priority, number, choice.index),
            self.num_computed,
            self.num_registered,
            self.block_table.copy(),
            self.status,
        )

    def forget_pages(self) -> None:
        """What it knows of its pages, once they are given back: nothing is computed."""
        assert not self.num_rows, "a step under way writes to its pages"
        self.block_table = []
        self.num_computed = 0
        self.num_registered = 0

    def drop(self, choice: int) -> None:
        self.choices = tuple(c for c in self.choices if c.index != choice)

    def ending(self, max_model_len: int) -> Ending | None:
        """Whether its last token, drawn just now, ends it. Below min_tokens no end counts.

        An end of sequence gives no stop reason, the client's own stop id gives itself.
        """
        settings, token = self.settings, self.tokens[-1]
        if self.num_output > settings.min_tokens:
            if token in settings.eos_token_ids:
                return Ending("stop")
            if token in settings.stop_token_ids:
                return Ending("stop", token)
        return Ending("length") if self.ends_at(len(self.tokens), max_model_len) else None

    def ends_at(self, length: int, max_model_len: int) -> bool:
        """Whether it ends with that many tokens, whatever they are."""
        return length - self.num_prompt >= self.settings.max_tokens or length >= max_model_len
