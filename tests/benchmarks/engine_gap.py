"""How much of a step the engine spends outside the network: the whole loop, real messages.

    python -m tests.benchmarks.engine_gap --shape 135m --rows 32 --tokens 64

One client process asks for ``--rows`` streams at once over the engine's socket. Prints milliseconds
a step, of these outside the network (scheduling, building, sampling, messages), and their share;
``--profile`` lists where the host's time goes. Steps with prompts in them are counted too.
"""

from __future__ import annotations

import argparse
import cProfile
import multiprocessing
import os
import pstats
import socket
import sys
import tempfile
from pathlib import Path

import torch

from model.kv_cache import KVCache
from model.random_checkpoint import SHAPES
from service.engine.blocks import BlockPool
from service.engine.capacity import Limits
from service.engine.connections import Connections
from service.engine.framing import FrameReader, encode_frame
from service.engine.loop import EngineLoop
from service.engine.messages import Control, FromEngine, Outputs, SamplingSettings, Submit
from service.engine.process import BRIEF_SPIN, engine_environment
from service.engine.pulse import Pulse
from service.engine.rates import StepRates
from service.engine.runner import ModelRunner
from service.engine.scheduler import Scheduler
from tests.benchmarks.decode_step import config_of, random_model

BLOCK_SIZE, PROMPT, BUDGET = 256, 64, 512

SAMPLINGS = {
    "greedy": SamplingSettings(temperature=0.0),
    "drawn": SamplingSettings(),
    "filtered": SamplingSettings(top_p=0.95, top_k=40),
    "penalised": SamplingSettings(top_p=0.95, top_k=40, presence_penalty=0.2, logprobs=2),
}


def client(path: str, rows: int, tokens: int, name: str) -> None:
    """Asks for all streams, reads until each has ended, and stops the engine."""
    settings = SAMPLINGS[name]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        for number in range(rows):
            own = SamplingSettings(
                max_tokens=tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                presence_penalty=settings.presence_penalty,
                logprobs=settings.logprobs,
                seed=number,
            )
            submit = Submit(number, [(7 * number + i) % 1000 + 3 for i in range(PROMPT)], [own])
            connection.sendall(encode_frame(submit))
        reader: FrameReader[FromEngine] = FrameReader(FromEngine)
        ended = 0
        while ended < rows:
            for message in reader.feed(connection.recv(1 << 16)):
                if isinstance(message, Outputs):
                    ended += sum(output.finish_reason is not None for output in message.outputs)
        connection.sendall(encode_frame(Control(0, "shutdown")))
        while connection.recv(1 << 16):  # until the engine has taken it and gone
            pass


def run(
    options: argparse.Namespace, sampling: str, runner: ModelRunner, limits: Limits, blocks: int
) -> float:
    """The share of the steps that was spent outside the network."""
    scheduler = Scheduler(
        BlockPool(blocks, BLOCK_SIZE),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "engine.sock")
        connections = Connections(path)
        loop = EngineLoop(
            connections,
            Pulse(connections),
            scheduler,
            runner,
            StepRates(),
            {},
            runs_ahead=options.ahead,
        )
        arguments = (path, options.rows, options.tokens, sampling)
        asking = multiprocessing.get_context("spawn").Process(target=client, args=arguments)
        asking.start()
        profile = cProfile.Profile()
        if options.profile:
            profile.runcall(loop.run)
        else:
            loop.run()
        connections.close()
        asking.join()
    counters = loop.counters()
    steps = loop.num_steps
    step, gap = counters["step_seconds"], counters["gap_seconds"]
    print(
        f"{sampling}: {steps} steps of {step / steps * 1e3:.2f} ms, "
        f"{gap / steps * 1e3:.2f} ms of it outside the network: {gap / step:.1%}"
    )
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(28)
    return gap / step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["bundled", *SHAPES], default="135m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sampling", choices=SAMPLINGS, nargs="+", default=["greedy", "filtered"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--no-kernels", action="store_true", help="PyTorch alone")
    parser.add_argument("--ahead", action="store_true", help="as --async-scheduling")
    parser.add_argument("--profile", action="store_true")
    parser.set_defaults(kv_cache_dtype="auto", quantization="none")
    options = parser.parse_args()
    if BRIEF_SPIN[0] not in os.environ:  # read as OpenMP is loaded: as the engine has it
        arguments = [sys.executable, "-m", "tests.benchmarks.engine_gap", *sys.argv[1:]]
        os.execve(sys.executable, arguments, engine_environment(dict(os.environ)))
    model = random_model(config_of(options.shape), options)
    pages = -(-(PROMPT + options.tokens) // BLOCK_SIZE)
    blocks = 1 + options.rows * (pages + 1)
    limits = Limits(options.rows, BUDGET, pages * BLOCK_SIZE, BLOCK_SIZE)
    cache = KVCache(model.config, blocks, BLOCK_SIZE, model.cache_dtype, model.device)
    runner = ModelRunner(model, cache, limits)
    print(f"{options.shape}, {options.rows} rows, {torch.get_num_threads()} threads, {model.path}")
    for name in options.sampling:
        run(options, name, runner, limits, blocks)


if __name__ == "__main__":
    main()
