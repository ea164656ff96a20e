"""Real checkpoints against recorded references (shared/models; skips where it is missing)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load_model
from model.llama import Llama
from tests.model.checkpoint.logits import logits_of

TOLERANCE = 2e-5  # references are rounded to six decimals


def references(shared: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((shared / "models" / "refs" / f"{name}.json").read_text())["entries"]


def check_logprobs(model: Llama, entry: dict[str, Any], tolerance: float) -> None:
    """Of prompt and answer, computed in one pass over both."""
    prompt, answer = entry["prompt_token_ids"], entry["token_ids"]
    tokens = prompt + answer
    logprobs = logits_of(model, tokens).log_softmax(-1)
    found = logprobs[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    expected = torch.tensor(entry["prompt_logprobs"][1:] + entry["logprobs"])
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def check_greedy(model: Llama, entry: dict[str, Any]) -> None:
    """Every token of the answer is the likeliest after those before it."""
    prompt, answer = entry["prompt_token_ids"], entry["token_ids"]
    logits = logits_of(model, prompt + answer[:-1])
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == answer


@pytest.mark.parametrize("folder", ["stories260K", "stories260K-meta"])
def test_stories_match_their_references(folder: str, shared_dir: Path):
    model = load_model(shared_dir / "models" / folder, dtype="float32")
    assert model.config.tie_embeddings
    for entry in references(shared_dir, "stories260K"):
        check_greedy(model, entry)
        check_logprobs(model, entry, TOLERANCE)


@pytest.mark.parametrize("path", ["tiny-random-llama-2", "llama-2-tiny-random.gguf"])
def test_tiny_random_llama_matches_its_references(path: str, shared_dir: Path):
    model = load_model(shared_dir / "models" / path, dtype="float32")
    for entry in references(shared_dir, "tiny-random-llama-2"):
        check_logprobs(model, entry, TOLERANCE)
