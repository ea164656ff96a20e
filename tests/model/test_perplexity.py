"""Perplexity is what its definition says, and every token is scored once."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from model.bundled import bundled_model_path, held_out_text
from model.checkpoint import load_model
from model.perplexity import CONTEXT, score
from model.tokenizer import load_tokenizer
from tests.model.random_llama import random_llama


def test_short_texts_are_scored_as_transformers_does() -> None:
    path = bundled_model_path()
    text = held_out_text().read_text()[:600]
    tokens = load_tokenizer(path).encode(text, add_special_tokens=False)
    assert 20 < len(tokens) <= CONTEXT // 2
    reference = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor([[1, *tokens]])
    with torch.inference_mode():
        wanted = float(reference(ids, labels=ids).loss)
    found = score(load_model(path, dtype="float32"), [tokens], [1])
    assert found.num_tokens == len(tokens)
    assert math.log(found.perplexity) == pytest.approx(wanted, abs=1e-4)


def test_long_texts_are_scored_in_windows_each_token_once() -> None:
    model = random_llama("cpu")
    generator = torch.Generator().manual_seed(1)
    lengths = (1, CONTEXT // 2, CONTEXT // 2 + 1, 3 * CONTEXT + 7)
    texts = [torch.randint(0, 503, (n,), generator=generator).tolist() for n in lengths]
    heard: list[tuple[int, int]] = []
    found = score(model, texts, [1], lambda done, total: heard.append((done, total)))
    assert found.num_tokens == sum(lengths)
    assert heard[-1] == (sum(lengths), sum(lengths))
    alone = [score(model, [text], [1]) for text in texts]
    assert found.loss == pytest.approx(sum(one.loss for one in alone))


def test_without_a_begin_token_the_first_is_not_scored() -> None:
    model = random_llama("cpu")
    assert score(model, [[5, 6, 7], [9]]).num_tokens == 2
    with pytest.raises(ValueError, match="no token to score"):
        score(model, [[5], []])


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="not in the model's vocabulary"):
        score(random_llama("cpu"), [[1, 503]])


@pytest.mark.parametrize(("scheme", "most"), [("int8", 1.003), ("int4", 1.02)])
def test_quantizing_costs_the_bundled_model_little(scheme: str, most: float) -> None:
    path = bundled_model_path()
    tokens = load_tokenizer(path).encode(held_out_text().read_text())
    plain, small = (
        score(load_model(path, dtype="float32", quantization=kind), [tokens]).perplexity
        for kind in ("none", scheme)
    )
    assert 0.99 < small / plain < most
