"""What each key may use: rates, requests at a time, and quotas of tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from service.errors import LimitReached, QuotaSpent, RateLimited
from service.keys.bucket import Bucket, Hold
from service.keys.key import Key
from service.keys.spent import Spent, SpentTokens, day_of, month_of, nothing

MEMORY = 0.2  # share of the latest answer in what is known of a key's answers


@dataclass(frozen=True)
class Clocks:
    wall: Callable[[], float] = time.time  # seconds since the epoch: days and months
    steady: Callable[[], float] = time.monotonic  # rates


@dataclass(frozen=True, slots=True)
class Standing:
    """How one limit stands, for headers and messages. ``reset``: seconds until all of it is there
    again if nothing else is taken; None where that is not known."""

    name: str  # requests, tokens, concurrency, tokens-day, tokens-month
    limit: int
    remaining: int
    reset: float | None


@dataclass(eq=False, slots=True)
class Reservation:
    """Tokens a request may need, taken before it runs; settled once, to what it used."""

    _limits: KeyLimits
    _tokens: int
    _hold: Hold | None

    def settle(self, used: int) -> None:
        self._limits.settle(self._tokens, self._hold, used)


class KeyLimits:
    """One key's limits and how much of them is used. All of a request is let in, or nothing is
    taken."""

    def __init__(self, key: Key, clocks: Clocks, history: SpentTokens = nothing) -> None:
        self.key = key
        self.active = 0  # requests being answered
        self._clocks = clocks
        self._requests = self._fitted(None, key.requests_per_minute)
        self._tokens = self._fitted(None, key.tokens_per_minute)
        self._history = history
        self._spent = self._remembered(None)
        self._reserved = 0  # tokens of requests that run
        self._seconds = 1.0  # an answer takes

    def change(self, key: Key) -> None:
        """Other limits for the same id; what was used stays used."""
        self.key = key
        self._requests = self._fitted(self._requests, key.requests_per_minute)
        self._tokens = self._fitted(self._tokens, key.tokens_per_minute)
        self._spent = self._remembered(self._spent)

    def _remembered(self, spent: Spent | None) -> Spent | None:
        """Counted only where a quota is held against it: the records know the rest."""
        if self.key.tokens_per_day is None and self.key.tokens_per_month is None:
            return None
        return spent or Spent.until(self._clocks.wall(), self.key.id, self._history)

    def _fitted(self, bucket: Bucket | None, capacity: int | None) -> Bucket | None:
        now = self._clocks.steady()
        if capacity is None:
            return None
        if bucket is None:
            return Bucket(capacity, now)
        bucket.resize(capacity, now)
        return bucket

    # ---- requests

    def enter(self) -> None:
        """A request came. Raises ``RateLimited``."""
        now = self._clocks.steady()
        most = self.key.max_concurrency
        if most is not None and self.active >= most:
            raise LimitReached(
                f"The key {self.key.name} has {most} requests being answered, its most at a time; "
                "send the next one when one of them has ended.",
                limit="concurrency",
                retry_after=self._seconds / most,
            )
        if self._requests is not None:
            if wait := self._requests.wait(1, now):
                raise LimitReached(
                    f"The key {self.key.name} may send {self._requests.capacity} requests a minute "
                    f"and has sent them; try again in {duration(wait)}.",
                    limit="requests",
                    retry_after=wait,
                )
            self._requests.take(1, now)
        self.active += 1

    def leave(self, seconds: float) -> None:
        """It was answered, which took so long."""
        self.active -= 1
        self._seconds += MEMORY * (seconds - self._seconds)

    # ---- tokens

    def reserve(self, tokens: int) -> Reservation:
        """For a request that may need so many. Raises ``RateLimited``."""
        now = self._clocks.steady()
        refusals = [self._over_quota(one, tokens) for one in self._quotas() if tokens > one.left]
        if self._tokens is not None and (wait := self._tokens.wait(tokens, now)):
            refusals.append(self._over_rate(self._tokens, tokens, wait, now))
        if refusals:
            raise max(
                refusals, key=lambda one: math.inf if one.retry_after is None else one.retry_after
            )
        hold = None if self._tokens is None else self._tokens.hold(tokens, now)
        self._reserved += tokens
        return Reservation(self, tokens, hold)

    def settle(self, reserved: int, hold: Hold | None, used: int) -> None:
        self._reserved -= reserved
        if self._spent is not None:
            self._spent.add(used, self._clocks.wall())
        if hold is not None:
            hold.settle(used, self._clocks.steady())

    def most_tokens(self) -> int | None:
        """The largest request that could be let in, now or after a while; None: any."""
        most = [quota.left for quota in self._quotas()]
        if self._tokens is not None:
            most.append(self._tokens.capacity)
        return min(most, default=None)

    def _over_rate(self, bucket: Bucket, tokens: int, wait: float, now: float) -> RateLimited:
        if math.isinf(wait):
            return LimitReached(
                f"This request may need {tokens} tokens (its prompt and every choice's max_tokens) "
                f"and the key {self.key.name} may use {bucket.capacity} a minute; send a shorter "
                "prompt or a smaller max_tokens.",
                limit="tokens",
            )
        return LimitReached(
            f"This request may need {tokens} tokens; of the {bucket.capacity} a minute of the key "
            f"{self.key.name} {max(0, math.floor(bucket.level(now)))} are left. Try again in "
            f"{duration(wait)}, or send a smaller max_tokens.",
            limit="tokens",
            retry_after=wait,
        )

    def _over_quota(self, quota: _Quota, tokens: int) -> RateLimited:
        limit, left = f"tokens-{quota.unit}", max(0, quota.left)
        said = (
            f"This request may need {tokens} tokens; of the {quota.limit} a {quota.unit} of the "
            f"key {self.key.name} {left} are left"
        )
        if tokens <= quota.left + self._reserved:
            said += (
                f" beside {self._reserved} held for its requests that run; try again after them."
            )
            return LimitReached(said, limit=limit, retry_after=self._seconds)
        if tokens > quota.limit:
            return QuotaSpent(f"{said}. Send a smaller max_tokens.", limit=limit)
        said += f". The next {quota.unit} begins in {duration(quota.wait)}."
        return QuotaSpent(said, limit=limit, retry_after=quota.wait)

    def _quotas(self) -> Iterator[_Quota]:
        if self._spent is None:
            return
        now = self._clocks.wall()
        for unit, limit, window in (
            ("day", self.key.tokens_per_day, day_of(now)),
            ("month", self.key.tokens_per_month, month_of(now)),
        ):
            if limit is not None:
                left = limit - self._spent.within(window) - self._reserved
                yield _Quota(unit, limit, left, window.end - now)

    # ---- how it stands

    def standings(self) -> Iterator[Standing]:
        now = self._clocks.steady()
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                left = max(0, math.floor(bucket.level(now) + 1e-6))
                yield Standing(name, bucket.capacity, left, bucket.seconds_to_full(now))
        if (most := self.key.max_concurrency) is not None:
            yield Standing("concurrency", most, max(0, most - self.active), None)
        for quota in self._quotas():
            yield Standing(f"tokens-{quota.unit}", quota.limit, max(0, quota.left), quota.wait)


@dataclass(frozen=True, slots=True)
class _Quota:
    unit: str
    limit: int
    left: int  # below 0 where it was lowered
    wait: float  # seconds until the next window


@dataclass
class Limits:
    """Those of every key that came from the file, by id; the others have none."""

    clocks: Clocks = field(default_factory=Clocks)
    history: SpentTokens = nothing
    _by_id: dict[str, KeyLimits] = field(default_factory=dict)

    def of(self, key_id: str) -> KeyLimits | None:
        return self._by_id.get(key_id)

    def install(self, keys: Sequence[Key]) -> None:
        """These keys from now on. Requests that run settle with what they entered."""
        known, self._by_id = self._by_id, {}
        for key in keys:
            limits = known.get(key.id)
            if limits is None:
                limits = KeyLimits(key, self.clocks, self.history)
            else:
                limits.change(key)
            self._by_id[key.id] = limits


def duration(seconds: float) -> str:
    """As OpenAI writes them: 12ms, 7.66s, 6m0s, 23h59m1s. Rounded up: sooner would be too soon."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:g}s"
    if not minutes:
        return text
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + f"{minutes}m{text}"
