"""What one exchange used, gathered while it is answered: the ledger's record is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.messages import DEADLINE, SamplingSettings
from service.engine.tally import Tally


@dataclass(slots=True)
class Meter:
    """``tally`` holds what engines did for it, the rest what its client was told."""

    tally: Tally = field(default_factory=Tally)
    model: str = ""  # as it is served here: never a client's own word
    adapter: str = ""
    num_prompt: int = 0  # tokens of all its prompts
    num_choices: int = 0  # over all its prompts
    sampling: SamplingSettings | None = field(default=None, repr=False)  # of its first choice
    is_stream: bool = False
    response_id: str = ""  # as the client was told, where answers have one
    num_told: int = 0  # generated tokens that left for the client
    num_accepted: int = 0  # of the tokens guessed ahead
    num_rejected: int = 0
    num_reasoning: int | None = None  # None where nobody looked for it
    code: str = ""  # of the error that ended it
    endings: dict[int, str] = field(default_factory=dict)  # finish reasons by choice

    def end_choice(self, index: int, reason: str, stop_reason: int | str | None = None) -> None:
        self.endings[index] = DEADLINE if stop_reason == DEADLINE else reason

    @property
    def finish(self) -> str:
        """The choices' finish reasons, each once: "stop", or "length+stop"."""
        reasons = set(self.endings.values())
        return reasons.pop() if len(reasons) == 1 else "+".join(sorted(reasons))
