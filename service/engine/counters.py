"""What the scheduler counts, monotone over the engine's life, and what it shows of the moment."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(slots=True)
class Counters:
    prompt_tokens: int = 0  # of requests whose prompt is computed, cached tokens included
    generation_tokens: int = 0  # tokens sent out
    discarded_tokens: int = 0  # drawn for a choice that was gone by then
    preemptions: int = 0
    yields: int = 0  # of these: for the sake of an account below its share
    prefix_queries: int = 0  # tokens looked up in the prefix cache at a request's first step
    prefix_hits: int = 0  # tokens found there, the host's too
    host_hits: int = 0  # of these: tokens found in host memory alone
    host_stores: int = 0  # pages evicted to host memory
    host_loads: int = 0  # pages brought back
    host_evictions: int = 0  # pages that left host memory for others
    spec_drafts: int = 0  # rows that carried proposed tokens
    spec_draft_tokens: int = 0  # tokens proposed
    spec_accepted_tokens: int = 0  # of those, what the model drew too
    finished: Counter[str] = field(default_factory=Counter)  # choices by reason
    rejected: Counter[str] = field(default_factory=Counter)  # submits by error code

    def as_dict(self) -> dict[str, float]:
        """Flat, for the State message: ``finished_<reason>``, ``rejected_<code>``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "discarded_tokens": self.discarded_tokens,
            "preemptions": self.preemptions,
            "yields": self.yields,
            "prefix_queries": self.prefix_queries,
            "prefix_hits": self.prefix_hits,
            "spec_drafts": self.spec_drafts,
            "spec_draft_tokens": self.spec_draft_tokens,
            "spec_accepted_tokens": self.spec_accepted_tokens,
            "host_hits": self.host_hits,
            "host_stores": self.host_stores,
            "host_loads": self.host_loads,
            "host_evictions": self.host_evictions,
            **{f"finished_{reason}": n for reason, n in self.finished.items()},
            **{f"rejected_{code}": n for code, n in self.rejected.items()},
        }


class Gauges(NamedTuple):
    running: int  # sequences that hold blocks
    waiting: int  # choices queued, preempted ones too
    waiting_tokens: int  # prompt tokens of requests that never had a step
    free_blocks: int  # cached ones too
