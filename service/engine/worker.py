"""The engine process: ``python -m service.engine.worker``, options as one line of JSON on stdin.

It listens before it loads, tells every front end how far it is, serves until it is told to stop or
its parent is gone, and leaves no socket behind. Exit codes: 0 asked to stop, 3 the model could not
be loaded, 4 the device is beyond use, 5 no memory is left, 70 the parent died.

``State.counters`` (all only ever rise) are ``service.engine.counters.Counters`` and
    failed_steps    steps that raised
    step_seconds    from one step's end to the next one's, idle time left out
    gap_seconds     of these, outside the network: scheduling, sampling, messages
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from model.grammar import Vocabulary
from model.tokenizer import load_tokenizer
from service.crashes import forbid_core_dumps, log_uncaught
from service.engine.adapter_desk import AdapterDesk
from service.engine.adapters import AdapterTable
from service.engine.blocks import BlockPool
from service.engine.capacity import Limits
from service.engine.compile_cache import use_compile_cache
from service.engine.connections import Connections
from service.engine.cores import hold
from service.engine.costs import StepCosts
from service.engine.flight_recorder import FlightRecorder
from service.engine.grammar_desk import GrammarDesk
from service.engine.host_slots import HostSlots
from service.engine.lifeline import die_with_parent
from service.engine.loop import EngineLoop
from service.engine.messages import State
from service.engine.options import OUT_OF_MEMORY, EngineOptions
from service.engine.pulse import Pulse
from service.engine.rates import StepRates
from service.engine.scheduler import Scheduler
from service.engine.speculation import SpeculationLimits
from service.logs import configure_logging

if TYPE_CHECKING:
    from service.engine.loading import Loaded

logger = logging.getLogger("pronk.engine")

LOAD_FAILED = 3
FAREWELL = 2.0  # seconds a failed engine waits for somebody to hear why
IGNORED = (signal.SIGINT, signal.SIGTERM)  # the parent drains first, then says "shutdown"


class LoadFailure(Exception):
    """The model cannot be served; the text is one line for the operator."""


def main() -> int:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()  # a crash in native code leaves stacks, which hold no values
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the client asks a stuck engine
    forbid_core_dumps()
    options = read_options()
    if options.cpus:
        hold(options.cpus)  # before any thread is started
    configure_logging(options.log_level, options.log_format, has_content=options.log_content)
    log_uncaught()
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(
        logging.WARNING if options.log_level == "debug" else logging.ERROR
    )
    connections = Connections(options.socket)
    die_with_parent(options.parent, connections.unlink)
    pulse = Pulse(connections)
    pulse.start()
    try:
        return serve(options, connections, pulse)
    finally:
        pulse.stop()
        connections.close()


def read_options() -> EngineOptions:
    """One line; what follows on standard input is the life line's."""
    line = bytearray()
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return msgspec.json.decode(line, type=EngineOptions)


def serve(options: EngineOptions, connections: Connections, pulse: Pulse) -> int:
    grammars = GrammarDesk(lambda: read_vocabulary(options.model))  # meanwhile
    try:
        loaded, rates, costs = load_and_warm_up(options, pulse)
    except LoadFailure as failure:
        grammars.close()
        logger.error("the model could not be loaded: %s", failure)
        say_farewell(connections, pulse, str(failure))
        return LOAD_FAILED
    scheduler = make_scheduler(
        options, loaded.limits, loaded.num_blocks, costs, loaded.num_host_slots
    )
    desk = AdapterDesk(scheduler.adapters, loaded.runner)
    desk.open(loaded.adapters)
    loop = EngineLoop(
        connections,
        pulse,
        scheduler,
        loaded.runner,
        rates,
        loaded.facts,
        desk,
        grammars,
        runs_ahead=loaded.runs_ahead,
        recorder=None if options.recorder is None else FlightRecorder(options.recorder),
    )
    try:
        return loop.run()
    except MemoryError:
        logger.error("no memory is left: leaving, to be started again")
        return OUT_OF_MEMORY
    finally:
        desk.close()
        grammars.close()


def read_vocabulary(path: str) -> Vocabulary:
    """A token for every logit, as bytes. Raises ``TokenizerError``."""
    from model.checkpoint import load_config  # torch: seconds

    return Vocabulary.of(load_tokenizer(path), load_config(path).vocab_size)


def make_scheduler(
    options: EngineOptions,
    limits: Limits,
    num_blocks: int,
    costs: tuple[StepCosts, StepCosts] | None = None,
    num_host_slots: int = 0,
) -> Scheduler:
    pool = BlockPool(
        num_blocks,
        limits.block_size,
        enable_prefix_caching=options.enable_prefix_caching,
        host=HostSlots(num_host_slots),
    )
    return Scheduler(
        pool,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        max_queued_requests=options.max_queued_requests,
        max_queued_tokens=options.max_queued_tokens,
        policy=options.scheduling_policy,
        speculation=SpeculationLimits(
            most=options.num_speculative_tokens,
            most_in_step=limits.max_proposed,
            has_draft=options.speculative_model is not None,
            shortest=options.speculative_ngram_min,
            longest=options.speculative_ngram_max,
        ),
        costs=costs,
        adapters=AdapterTable(options.max_loras, options.max_cpu_loras),
    )


def load_and_warm_up(
    options: EngineOptions, pulse: Pulse
) -> tuple[Loaded, StepRates, tuple[StepCosts, StepCosts]]:
    """Tells of its progress; raises ``LoadFailure`` whatever went wrong."""
    with one_line_failures():
        use_compile_cache(options.compile_cache)
        from service.engine.loading import load, measure_costs, settle, warm_up  # torch: seconds

        rates = StepRates()
        loaded = load(options, lambda share: pulse.publish(State("loading", progress=share)))
        pulse.publish(State("warming_up", progress=1.0, facts=loaded.facts), urgent=True)
        steps = list(warm_up(loaded))
        for num_tokens, seconds in steps:
            rates.observe(num_tokens, seconds)
        costs = measure_costs(loaded)
        loaded = settle(options, loaded, steps)
    gc.collect()
    gc.freeze()  # the model's objects live as long as the process: no need to look at them again
    return loaded, rates, costs


@contextlib.contextmanager
def one_line_failures() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise LoadFailure(first_line(error)) from error
    except MemoryError as error:
        raise LoadFailure("not enough memory for the model") from error
    except Exception as error:
        logger.debug("while loading", exc_info=error)
        raise LoadFailure(f"{type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def say_farewell(connections: Connections, pulse: Pulse, reason: str) -> None:
    """Make sure that somebody heard why: the client may not have connected yet."""
    pulse.publish(State("failed", reason=reason), urgent=True)
    give_up = time.monotonic() + FAREWELL
    while not connections.num_connected and time.monotonic() < give_up:
        connections.poll(0.05)


if __name__ == "__main__":
    sys.exit(main())
