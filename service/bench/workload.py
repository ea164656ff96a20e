"""What a load generator asks for: prompts, lengths, times of arrival. All drawn from one seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from service.bench.problem import BenchProblem

LEAST_ID = 300  # below lie control tokens and single bytes, which some servers treat apart
_WORDS = (  # short and frequent: most tokenizers know each as one token, with its space
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city name team minute idea body back parent face level office door health "
    "person art war history party result change morning reason research girl guy moment air force"
)

WORDS = _WORDS.split()


@dataclass(frozen=True)
class Lengths:
    """A number of tokens between ``low`` and ``high``, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """``128``, or ``64:512``."""
        low, colon, high = text.partition(":")
        try:
            lengths = cls(int(low), int(high if colon else low))
        except ValueError:
            raise BenchProblem(f"{text!r} is no length: give 128, or a range 64:512") from None
        if not 1 <= lengths.low <= lengths.high:
            raise BenchProblem(f"{text!r} is no length: at least 1, the smaller number first")
        return lengths

    def draw(self, source: random.Random) -> int:
        return self.low if self.low == self.high else source.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True)
class Job:
    """One request: a prompt of ids or text, and how many tokens it wants."""

    prompt: list[int] | str
    output_len: int


@dataclass(frozen=True)
class Workload:
    """``shared_prefix`` tokens begin every prompt and count into its length.

    Prompts are random ids below ``vocabulary``, so that no two share more than they are told to; or
    text of random words, ``words_per_token`` of them for each token wanted.
    """

    input_len: Lengths = Lengths(128, 128)
    output_len: Lengths = Lengths(128, 128)
    shared_prefix: int = 0
    prompt_format: str = "ids"
    vocabulary: int = 2000
    words_per_token: float = 1.0
    seed: int = 0

    def jobs(self, count: int, stream: int = 0) -> list[Job]:
        """``count`` requests. Another ``stream`` draws others, and another shared prefix: no level
        finds what one before it left in the server's cache.
        """
        if self.shared_prefix >= self.input_len.low:
            raise BenchProblem(
                f"a shared prefix of {self.shared_prefix} tokens leaves none of its own to a "
                f"prompt of {self.input_len.low}"
            )
        prefix = self._tokens(self.shared_prefix, random.Random(f"prefix {self.seed} {stream}"))
        draw = random.Random(f"jobs {self.seed} {stream}")
        return [self._job(prefix, draw) for _ in range(count)]

    def _job(self, prefix: list[int] | list[str], draw: random.Random) -> Job:
        own = self._tokens(self.input_len.draw(draw) - self.shared_prefix, draw)
        prompt = [*prefix, *own]
        output_len = self.output_len.draw(draw)
        if self.prompt_format == "text":
            return Job(" ".join(map(str, prompt)), output_len)
        return Job([int(token) for token in prompt], output_len)

    def _tokens(self, count: int, draw: random.Random) -> list[int] | list[str]:
        if self.prompt_format == "text":
            words = round(count * self.words_per_token)
            return draw.choices(WORDS, k=max(words, 1 if count else 0))
        low = min(LEAST_ID, self.vocabulary // 2)
        return [draw.randrange(low, self.vocabulary) for _ in range(count)]


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which each of ``count`` requests arrives, ``rate`` a second."""
    draw = random.Random(f"arrivals {seed}")
    gaps: Iterator[float] = (draw.expovariate(rate) for _ in range(count))
    return list(itertools.accumulate(gaps))
