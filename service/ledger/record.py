"""One request's line in the ledger. The fields' names and order are the table's columns."""

from __future__ import annotations

from typing import NamedTuple


class Record(NamedTuple):
    """Tokens are counted twice: as the client was told, and as the engines counted them.

    ``engine_generated_tokens`` is ``generated_tokens + discarded_tokens``, and both prompt counts
    are equal, but for beam search, whose rounds compute their prompts again and whose beams share
    tokens, and for what a second engine had to begin anew.
    """

    time: float  # seconds since the epoch, when it had ended
    request_id: str
    key_id: str = ""  # "" is nobody in particular: a server without keys
    key_name: str = ""
    route: str = ""  # the route's template
    model: str = ""  # "" where it was refused before that was known
    adapter: str = ""
    status: int | None = None  # None: no answer began
    finish: str = ""  # stop, length, tool_calls, deadline (joined by +); cancelled, error, rejected
    code: str = ""  # of the error
    num_choices: int = 0
    prompt_tokens: int = 0  # of prompts that were computed, cached tokens included
    cached_tokens: int = 0
    generated_tokens: int = 0  # told to the client
    discarded_tokens: int = 0  # drawn, and told to nobody
    reasoning_tokens: int | None = None  # of the generated; None where they are not told apart
    accepted_tokens: int = 0  # guessed ahead, and right
    rejected_tokens: int = 0
    engine_prompt_tokens: int = 0
    engine_generated_tokens: int = 0
    queue_seconds: float | None = None  # None where it did not come so far
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    total_seconds: float = 0.0
    energy_joules: float | None = None  # nothing measures it yet

    @property
    def num_charged(self) -> int:
        """Tokens that a quota counts: hanging up before the end does not make them free."""
        return self.prompt_tokens + self.generated_tokens + self.discarded_tokens


TEXTS = frozenset(
    {"request_id", "key_id", "key_name", "route", "model", "adapter", "finish", "code"}
)
REALS = frozenset(name for name in Record._fields if name.endswith("_seconds")) | {
    "time",
    "energy_joules",
}
SUMMED = tuple(
    name
    for name in Record._fields
    if name.endswith(("_tokens", "_seconds", "_joules")) or name == "num_choices"
)
FINISHES = ("cancelled", "error", "rejected")  # all others are answers that ended by themselves
