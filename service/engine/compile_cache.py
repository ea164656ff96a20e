"""Where compiled kernels are kept between starts: Inductor's and Triton's, our own among them."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger("pronk.engine")

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def default_folder() -> Path:
    """Of the user, by the XDG rules: a temporary folder would be empty after a restart."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # a container's user without a home
        root = Path(tempfile.gettempdir())
    return root / "pronk" / "compile"


def use_compile_cache(folder: str | None) -> Path | None:
    """Before torch is imported. What the operator set in the environment stays.

    None where the folder cannot be written: kernels are then compiled anew at each start.
    """
    root = Path(folder) if folder else default_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.info("compiled kernels are not kept: %s", error)
        return None
    if not os.access(root, os.W_OK):
        logger.info("compiled kernels are not kept: %s cannot be written", root)
        return None
    for variable, name in FOLDERS.items():
        os.environ.setdefault(variable, str(root / name))
    return root
