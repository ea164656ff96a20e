"""Native libraries fail in their own ways: bare exceptions, and panics that are no exceptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from model.checkpoint.errors import CheckpointError


@contextmanager
def refusing(refusal: Callable[[str], Exception]) -> Iterator[None]:
    """Whatever fails inside becomes the refusal, which is given the reason.

    Refusals that are ones already and what the system says of files pass. A panic in a Rust library
    is a BaseException, which nothing above would catch: threads and tasks would end without a word.
    """
    try:
        yield
    except (CheckpointError, OSError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refusal(str(error) or type(error).__name__) from error
