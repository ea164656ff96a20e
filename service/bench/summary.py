"""Many traces to a few numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

from msgspec import Struct

from service.bench.client import REFUSED, Trace
from service.bench.load import Level


class Spread(Struct, frozen=True):
    """Seconds. None of them where nothing was measured."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    longest: float | None = None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        if not ordered:
            return cls()
        p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


class Summary(Struct, frozen=True):
    """One level's results. Times and rates are of the requests that succeeded.

    TTFT: from sending (or being due) to the first text. ITL: between two pieces of text, as they
    came. TPOT: first to last text over the tokens after the first, which does not depend on how
    tokens are packed into pieces. E2E: to the end of the answer.
    """

    kind: str  # concurrency, rate
    level: float
    num_requests: int
    num_good: int
    num_refused: int  # 429
    failures: dict[str, int]  # by kind, refusals left out
    examples: dict[str, str]  # what the first of each kind said
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    requests_per_second: float
    mean_in_flight: float
    ttft: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())


def summarize(level: Level, traces: list[Trace], seconds: float) -> Summary:
    good = [trace for trace in traces if trace.is_good]
    bad = [trace for trace in traces if not trace.is_good]
    kinds = Counter(trace.failure for trace in bad)
    output_tokens = sum(trace.tokens for trace in good)
    return Summary(
        kind=level.kind,
        level=level.value,
        num_requests=len(traces),
        num_good=len(good),
        num_refused=kinds.pop(REFUSED, 0),
        failures=dict(kinds),
        examples={trace.failure: trace.detail for trace in reversed(bad)},
        seconds=seconds,
        prompt_tokens=sum(trace.prompt_tokens for trace in good),
        cached_tokens=sum(trace.cached_tokens for trace in good),
        output_tokens=output_tokens,
        output_tokens_per_second=output_tokens / seconds if seconds else 0.0,
        requests_per_second=len(good) / seconds if seconds else 0.0,
        mean_in_flight=sum(t.end - t.start for t in good) / seconds if seconds else 0.0,
        ttft=Spread.of(trace.first_token for trace in good),
        itl=Spread.of(itertools.chain.from_iterable(trace.gaps for trace in good)),
        tpot=Spread.of(_seconds_a_token(trace) for trace in good if trace.tokens > 1),
        e2e=Spread.of(trace.end - trace.start for trace in good),
    )


def _seconds_a_token(trace: Trace) -> float:
    return (trace.chunks[-1] - trace.chunks[0]) / (trace.tokens - 1)


def percentile(ordered: list[float], share: float) -> float:
    """Between the two nearest of ``ordered``, in proportion."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
