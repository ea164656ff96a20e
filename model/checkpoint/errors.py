"""What can be wrong with a checkpoint, told in one line that names the file or tensor."""

from __future__ import annotations

from collections.abc import Collection

from model.refusal import Refusal


class CheckpointError(Refusal):
    """The checkpoint cannot be served; the message says what is wrong and what to do."""


def some_names(names: Collection[str], limit: int = 3) -> str:
    """The first few names in order and how many more there are."""
    shown = sorted(names)[:limit]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
