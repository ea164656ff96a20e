"""JSON objects beside the weights, read with a bound on their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.checkpoint.errors import CheckpointError

MAX_BYTES = 64 << 20  # the index of a 405B checkpoint is under 1 MiB


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; anything else in it is a CheckpointError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path.name} is larger than {MAX_BYTES >> 20} MiB")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path.name} holds no JSON object")
    return document


def read_optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
