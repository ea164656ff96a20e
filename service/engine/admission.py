"""What may enter the waiting queue: nothing that could never run, no more than is bounded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from service.engine.account import Account
from service.engine.messages import Submit
from service.engine.waiting import Standing, WaitingQueue
from service.errors import ContextLengthExceeded, InvalidRequest, Overloaded

SecondsFor = Callable[[float, float], float]  # (sequences, tokens) to work off
MOST_NAMED = 32  # accounts told apart where there is no room; of more, each has to be asked for


@dataclass(frozen=True)
class RequestLimits:
    """What one sequence can have at most."""

    max_model_len: int  # tokens, prompt and output
    num_blocks: int  # blocks that can be given out
    block_size: int

    def check(self, submit: Submit) -> None:
        """Raises InvalidRequest for what could never run, however long it waited."""
        if not submit.prompt:
            raise InvalidRequest("The prompt has no tokens; send at least one.", param="prompt")
        if not submit.settings:
            raise InvalidRequest("No choice is asked for; send n of at least 1.", param="n")
        max_tokens = max(settings.max_tokens for settings in submit.settings)
        self._check_context(len(submit.prompt), max_tokens)
        self._check_blocks(len(submit.prompt), max_tokens)

    def _check_context(self, prompt: int, max_tokens: int) -> None:
        if prompt + max_tokens > self.max_model_len:
            raise ContextLengthExceeded(
                f"The prompt's {prompt} tokens and the {max_tokens} asked for by max_tokens are "
                f"{prompt + max_tokens}, and the context holds {self.max_model_len}. "
                f"{_remedy(prompt, self.max_model_len)}",
                param="max_tokens" if prompt < self.max_model_len else "prompt",
            )

    def _check_blocks(self, prompt: int, max_tokens: int) -> None:
        computed = max(prompt, prompt + max_tokens - 1)  # the last token drawn is never computed
        room = self.num_blocks * self.block_size
        if computed > room:
            raise ContextLengthExceeded(
                f"The prompt's {prompt} tokens and the {max_tokens} asked for by max_tokens need "
                f"{-(-computed // self.block_size)} cache blocks, and there are {self.num_blocks} "
                f"of {self.block_size} tokens. {_remedy(prompt, room)}",
                param="max_tokens" if prompt < room else "prompt",
            )


def _remedy(prompt: int, room: int) -> str:
    if prompt < room:
        return f"Send max_tokens of at most {room - prompt}, or a shorter prompt."
    return f"Send a prompt of fewer than {room} tokens."


class Room(NamedTuple):
    """For how many more; with none, who is refused for how many seconds, and whether all are.

    Accounts that are not named have less than their share in the queue.
    """

    num_sequences: int
    retry_after: float
    refused: Mapping[str, float] = {}
    is_shut: bool = False


@dataclass(frozen=True)
class QueueBounds:
    """An engine with a free slot and nobody waiting takes any one request, whatever its size.

    A full queue still takes what an account below its share of it sends, so that none can shut
    the others out: never more than twice the bounds.
    """

    max_queued_requests: int  # choices
    max_queued_tokens: int  # prompt tokens

    def room(
        self,
        queue: WaitingQueue,
        accounts: Collection[Account],
        free_slots: int,
        seconds_for: SecondsFor,
    ) -> Room:
        """What a lone request with a short prompt would find. ``accounts``: all with requests."""
        seconds = self.retry_after(len(queue) + 1, queue.tokens, free_slots, seconds_for)
        is_full = queue.tokens >= self.max_queued_tokens and (len(queue) or free_slots <= 0)
        most = 0 if is_full else self.max_queued_requests + free_slots - len(queue)
        if most > 0:
            return Room(most, seconds)
        refused = {}
        for account in accounts if len(accounts) <= MOST_NAMED else ():
            own = queue.standing(account.name, account.weight)
            if not self._takes(queue, 1, 1, own, free_slots):
                refused[account.name] = self._seconds(own, 1, 1, free_slots, seconds_for)
        stranger = Standing(0, 0, 0.0, 1)
        is_shut = not self._takes(queue, 1, 1, stranger, free_slots)
        return Room(0, seconds, refused, is_shut)

    def retry_after(
        self,
        num_choices: float,
        num_tokens: float,
        free_slots: int,
        seconds_for: SecondsFor,
    ) -> float:
        """Until half of a queue of so many should have gone."""
        max_choices = self.max_queued_requests + free_slots
        sequences = max(num_choices - max_choices // 2, 1)
        tokens = max(num_tokens - self.max_queued_tokens // 2, 0)
        return seconds_for(sequences, tokens)

    def check(
        self, submit: Submit, queue: WaitingQueue, free_slots: int, seconds_for: SecondsFor
    ) -> None:
        """Raises Overloaded, with the time in which half of the queue should have gone.

        Running slots that are still free count as room: what is to fill them has to pass through
        the queue.
        """
        if not len(queue) and free_slots > 0:
            return
        num_choices, num_tokens = len(submit.settings), len(submit.prompt)
        own = queue.standing(submit.account, submit.weight)
        if self._takes(queue, num_choices, num_tokens, own, free_slots):
            return
        raise Overloaded(
            f"The queue is full: {len(queue)} sequences with {queue.tokens} prompt tokens wait, "
            f"and the bounds are {self.max_queued_requests} and {self.max_queued_tokens}. "
            f"{_told_of_share(own)}Try again after the time in Retry-After.",
            retry_after=self._seconds(own, num_choices, num_tokens, free_slots, seconds_for),
        )

    def _takes(
        self,
        queue: WaitingQueue,
        num_choices: int,
        num_tokens: int,
        own: Standing,
        free_slots: int,
    ) -> bool:
        """Whether so much more of the account that stands so has room."""
        max_choices = self.max_queued_requests + free_slots
        max_tokens = self.max_queued_tokens
        choices, tokens = len(queue) + num_choices, queue.tokens + num_tokens
        if choices <= max_choices and tokens <= max_tokens:
            return True
        own_choices, own_tokens = own.num_choices + num_choices, own.tokens + num_tokens
        return bool(
            own.num_others
            and _has_room(choices, max_choices, own_choices, own.num_choices, own.share)
            and _has_room(tokens, max_tokens, own_tokens, own.num_choices, own.share)
        )

    def _seconds(
        self,
        own: Standing,
        num_choices: int,
        num_tokens: int,
        free_slots: int,
        seconds_for: SecondsFor,
    ) -> float:
        """The account's own requests go at its share of the whole rate."""
        choices = (own.num_choices + num_choices) / own.share
        tokens = (own.tokens + num_tokens) / own.share
        return self.retry_after(choices, tokens, free_slots, seconds_for)


def _has_room(total: int, bound: int, own: int, num_queued: int, share: float) -> bool:
    """Within the bound, or within the share of it; who has nothing waiting may send one request."""
    return total <= bound or (total <= 2 * bound and (own <= share * bound or not num_queued))


def _told_of_share(own: Standing) -> str:
    if not own.num_others:
        return ""
    others = "1 other key" if own.num_others == 1 else f"{own.num_others} other keys"
    return (
        f"{own.num_choices} with {own.tokens} are this key's, whose share beside {others} is "
        f"{own.share:.1%} of that. "
    )
