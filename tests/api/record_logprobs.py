"""Writes ``reference_logprobs.json``: what transformers says of the bundled model, in float32.

``python -m tests.api.record_logprobs``; tests read the file and need no transformers. One prompt
at a time, greedy; log-probabilities of the prompt's tokens and of those drawn, with the five
likeliest. The ids are of pronk's own tokenizer: it is the network that is compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from model.bundled import bundled_model_path
from model.tokenizer import load_tokenizer
from service.api.prompts import encode

PLACE = Path(__file__).with_name("reference_logprobs.json")
PROMPTS = ["Once upon a time", "The old man looked at the sea and said", '"Why?" asked Alice.']
TOKENS, TOP = 20, 5


@torch.inference_mode()
def record(network: Any, tokenizer: Any, prompt: str) -> dict[str, Any]:
    ids = encode(prompt, tokenizer, special=True, parse=True)
    for _ in range(TOKENS):
        ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    likely = torch.log_softmax(network(torch.tensor([ids])).logits[0].double(), -1)
    rows = []
    for token, row in zip(ids[1:], likely, strict=False):
        values, tokens = row.topk(TOP)
        top = {str(t): round(v, 7) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)}
        rows.append({"token": token, "logprob": round(float(row[token]), 7), "top": top})
    return {"prompt": prompt, "ids": ids[:-TOKENS], "rows": rows}


def main() -> None:
    folder = bundled_model_path()
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    entries = [record(network, tokenizer, prompt) for prompt in PROMPTS]
    made_with = {"transformers": transformers.__version__, "torch": torch.__version__}
    PLACE.write_text(json.dumps({"made_with": made_with, "entries": entries}) + "\n")


if __name__ == "__main__":
    main()
