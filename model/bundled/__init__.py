"""The small Llama that ships with pronk. Nothing here imports torch; only `train` does."""

from pathlib import Path


def bundled_model_path() -> Path:
    """A plain Hugging Face folder, read by the same loader as any other."""
    return Path(__file__).parent / "weights"


def held_out_text() -> Path:
    """Passages of the public-domain books that training never saw, to measure perplexity by."""
    return Path(__file__).parent / "held_out.txt"
