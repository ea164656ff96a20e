"""The seam: what the HTTP process and the engine process say to each other.

Frames are a 4-byte little-endian length and a msgpack body (msgspec tagged structs), over one Unix
socket. Token ids only, never text. Everything is validated on the HTTP side; the engine still
refuses what could never fit.
"""

from __future__ import annotations

from typing import ClassVar

from msgspec import Struct

from service.redaction import Redacted

DEADLINE = "deadline"
UNKNOWN_ROOM = 1 << 30  # sequences: of an engine that has not said how many it would take
REFUSED = "refused"  # beside the reason "error": what was asked for cannot be done


class SamplingSettings(Redacted, Struct, frozen=True, omit_defaults=True):
    """How one choice draws its tokens. Field meanings and bounds are the wire's (docs/wire)."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # always set: the API draws one where the client sent none
    choice: int = 0  # choice i draws from (seed, i, position)
    stop_token_ids: tuple[int, ...] = ()  # the client's own
    eos_token_ids: tuple[int, ...] = ()  # the checkpoint's, empty under ignore_eos
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    logprobs: int | None = None  # 0..20; None is off, 0 is the drawn token's alone
    speculative_method: str = "none"  # none, ngram or draft
    num_speculative_tokens: int = 0  # proposed at a time, at most


# ---- HTTP process -> engine process ------------------------------------------------------------


class Submit(Redacted, Struct, frozen=True, tag="submit", omit_defaults=True):
    """One prompt, ``len(settings)`` choices: computed once, forked at its first token."""

    printed: ClassVar[tuple[str, ...]] = ("id", "request_id")
    id: int  # unique per connection
    prompt: list[int]
    settings: list[SamplingSettings]
    namespace: bytes = b""  # prefix-cache namespace: derived from the caller's key and cache_salt
    account: str = ""  # key id, for fair shares and the ledger
    weight: float = 1.0
    priority: int = 0  # lower runs earlier
    deadline: float | None = None  # seconds from receipt to the partial answer
    max_queue: float | None = None  # seconds it may wait for its first step
    prompt_logprobs: int | None = None  # 0..20
    logprobs_from: int = 1  # the first prompt token that has one
    request_id: str = ""  # for logs only
    adapter: str = ""  # its name, and which loading of it: from State.adapters
    adapter_version: int = 0  # 0: the model itself
    grammar: str = ""  # JSON of what the text must be, see grammar_trial; "" is anything
    is_continuation: bool = False  # of a request taken before: a draining engine takes it too
    is_owed: bool = False  # it was taken itself, by an engine that died: a full one takes it too
    pooling: str = ""  # "mean" or "last" of the prompt's final hidden states; beside max_tokens 0


class Cancel(Struct, frozen=True, tag="cancel", omit_defaults=True):
    """Drop a request, or one of its choices (a stop string was found in it)."""

    id: int
    choice: int | None = None


class Control(Redacted, Struct, frozen=True, tag="control", omit_defaults=True):
    """``verb``: "drain" (refuse new work), "shutdown", "ping"; "load_adapter", "unload_adapter";
    "estimate" (what ``submits`` would take if they came now).

    Answered by a Reply, or Refused. An adapter is told by its name, a folder to load by its path.
    """

    printed: ClassVar[tuple[str, ...]] = ("id", "verb")
    id: int
    verb: str
    adapter: str = ""
    path: str = ""
    submits: list[Submit] = []


# ---- engine process -> HTTP process ------------------------------------------------------------


class Accepted(Struct, frozen=True, tag="accepted"):
    id: int


class Refused(Redacted, Struct, frozen=True, tag="refused", omit_defaults=True):
    """Sent instead of ``Accepted`` or ``Reply``. ``kind`` names a class of ``service.errors``."""

    printed: ClassVar[tuple[str, ...]] = ("id", "kind", "code")
    id: int
    kind: str
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None


class Cancelled(Struct, frozen=True, tag="cancelled"):
    """Answer to every ``Cancel``: no more outputs come of what it named."""

    id: int


class TokenLogprob(Redacted, Struct, frozen=True, array_like=True):
    """Raw log-probabilities (before bias, penalties and temperature), natural log."""

    logprob: float
    rank: int  # 1 is the most likely
    top_ids: list[int]
    top_logprobs: list[float]


class Output(Redacted, Struct, frozen=True, tag="output", omit_defaults=True):
    """What one choice gained in one step. The last one of a choice carries ``finish_reason``."""

    printed: ClassVar[tuple[str, ...]] = ("id", "choice", "finish_reason")
    id: int
    choice: int
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None  # one a token, when asked for
    finish_reason: str | None = None  # stop, length; or error, cancelled (never on the wire)
    stop_reason: int | str | None = None  # stop token id, "deadline"; "grammar" of an error
    error: str | None = None  # with finish_reason "error": what may be told
    prompt_tokens: int | None = None  # with the first output, where its prompt was computed
    cached_tokens: int | None = None  # with the first output of a request
    prompt_logprobs: list[TokenLogprob | None] | None = None  # with the first output
    queue_time: float | None = None  # seconds, with the first output
    prefill_time: float | None = None
    num_accepted: int = 0  # of ``tokens``, the first so many had been proposed
    num_rejected: int = 0  # proposed tokens that were not said
    pooled: bytes | None = None  # float32, little-endian: what ``pooling`` asked for


class Outputs(Redacted, Struct, frozen=True, tag="outputs"):
    """Everything one step produced: one message a step, never one a token."""

    printed: ClassVar[tuple[str, ...]] = ("step",)
    step: int
    num_scheduled_tokens: int
    step_time: float  # seconds
    outputs: list[Output]


class Reply(Struct, frozen=True, tag="reply", omit_defaults=True):
    id: int
    result: dict[str, object] = {}


class State(Struct, frozen=True, tag="state", omit_defaults=True):
    """Sent on every change of stage, at least once a second also when idle: the heartbeat."""

    stage: str  # loading, warming_up, ready, draining, failed
    progress: float = 0.0  # 0..1 within loading
    reason: str = ""
    steps: int = 0  # steps completed: the heartbeat under work
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    room: int = UNKNOWN_ROOM  # sequences the queue would take in now
    retry_after: float = 1.0  # seconds: what a request is told that finds no room
    refused: dict[str, float] = {}  # without room: accounts that get none, and for how long
    is_shut: bool = False  # not even an account without requests would be taken
    num_blocks: int = 0
    free_blocks: int = 0  # cached pages count as free: they can be evicted
    block_size: int = 0
    host_blocks: int = 0  # pages host memory can keep of those evicted
    used_host_blocks: int = 0
    max_model_len: int = 0
    counters: dict[str, float] = {}  # monotone: see service/engine/worker.py
    facts: dict[str, str] = {}  # device, dtype, attention backend, torch version...: the banner
    step_elapsed: float = 0.0  # seconds the step now running has taken, 0 between steps
    step_estimate: float = 0.0  # seconds it should take, from the rate of the steps before it
    adapters: dict[str, int] = {}  # name: version of what is loaded
    running_adapters: list[str] = []  # names
    waiting_adapters: list[str] = []
    max_loras: int = 0  # different adapters in one step


ToEngine = Submit | Cancel | Control
FromEngine = Accepted | Refused | Cancelled | Outputs | Reply | State
