"""What sampling costs: pronk's one call a batch against a sort of every row, in one run.

    python -m tests.benchmarks.sampling [--vocab 128256] [--rows 32] [--device cpu] [--no-kernels]

The peer is what a plain implementation does for any filtered row: sort the vocabulary, softmax,
cumulate, mask, draw. Times are the minimum of several runs, in milliseconds for the whole batch,
with the logits on the device and the tokens read back; ``--no-kernels`` draws by tensor operations.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from model.penalties import PenaltyState
from model.sampler import Sampler
from model.sampling_row import SamplingRow

PENALISED = SamplingRow(0, presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.1)

CASES: dict[str, SamplingRow] = {
    "greedy": SamplingRow(0, temperature=0),
    "unfiltered": SamplingRow(0),
    "top-k 40": SamplingRow(0, top_k=40),
    "top-p 0.9, temperature 0.6": SamplingRow(0, temperature=0.6, top_p=0.9),
    "min-p 0.05": SamplingRow(0, min_p=0.05),
    "greedy, logprobs 0": SamplingRow(0, temperature=0, logprobs=0),
    "greedy, logprobs 20": SamplingRow(0, temperature=0, logprobs=20),
    "greedy, three penalties": replace(PENALISED, temperature=0),
    "penalties, top-k, top-p, logprobs 20": replace(
        PENALISED, temperature=0.7, top_k=50, top_p=0.9, logprobs=20, logit_bias={7: 1.0}
    ),
    "flat logits, top-p 0.9": SamplingRow(0, temperature=2.0, top_p=0.9),
}


def main() -> None:
    options = read_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    logits = zipf_logits(options.rows, options.vocab).to(device)
    print(f"{options.rows} rows of {options.vocab} on {device}, {torch.get_num_threads()} threads")
    peer = milliseconds(lambda: sort_and_draw(logits).tolist(), options.repeats)
    print(f"{'sort every row, top-p, multinomial':40}{peer:9.2f} ms")
    sampler = Sampler(options.vocab, device, compiled=not options.no_kernels)
    for name, row in [*CASES.items(), ("a mixture of all of these", None)]:
        rows = batch_of(row, options.rows, options.vocab)
        spent = milliseconds(lambda r=rows: sampler.launch(logits, r).collect(), options.repeats)
        print(f"{name:40}{spent:9.2f} ms   {peer / spent:6.1f} times the peer's speed")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-kernels", action="store_true", help="PyTorch alone")
    return parser.parse_args()


def zipf_logits(num_rows: int, vocab_size: int) -> Tensor:
    """Probability falls as rank to the power of -1.5, in an order of its own for each row."""
    generator = torch.Generator().manual_seed(0)
    falling = -1.5 * torch.arange(1, vocab_size + 1).log()
    orders = [torch.randperm(vocab_size, generator=generator) for _ in range(num_rows)]
    return torch.stack([falling[order] for order in orders])


def batch_of(row: SamplingRow | None, num_rows: int, vocab_size: int) -> list[SamplingRow]:
    kinds = list(CASES.values()) if row is None else [row]
    rows = [replace(kinds[i % len(kinds)], logits_row=i, seed=i) for i in range(num_rows)]
    return [with_history(row, vocab_size) if row.presence_penalty else row for row in rows]


def with_history(row: SamplingRow, vocab_size: int) -> SamplingRow:
    """1,000 tokens of prompt and 200 of output, kept as the runner keeps them."""
    generator = torch.Generator().manual_seed(row.seed)
    tokens = torch.randint(vocab_size, (1_200,), generator=generator).tolist()
    state = PenaltyState(tokens[:1_000])
    state.catch_up(tokens)
    return replace(row, penalties=state)


def sort_and_draw(logits: Tensor, temperature: float = 0.6, top_p: float = 0.9) -> Tensor:
    ordered, ids = torch.sort(logits / temperature, dim=-1, descending=True)
    probabilities = torch.softmax(ordered, dim=-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    place = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1)
    return ids.gather(1, place).squeeze(1)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    spent = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return min(spent[1:]) * 1e3


if __name__ == "__main__":
    main()
