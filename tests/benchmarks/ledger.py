"""What the usage ledger costs: ``python -m tests.benchmarks.ledger [--rate 1000] [--seconds 10]``.

CPU seconds at a rate of requests, with what the HTTP process does for each (a tally, a meter, a
record, the keys' counters), and the writer's thread apart; then what a full file costs to check, to
report on, to ask for a key's tokens and to fold into daily sums.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from service.api.exchange import Caller, Exchange
from service.api.meter import Meter
from service.api.recorder import make_record
from service.engine.messages import Output
from service.ledger.ledger import Ledger
from service.ledger.record import Record
from service.ledger.report import Range, charged_since, summarize
from service.ledger.store import Store
from service.usage_metrics import UsageMetrics

TARGET = 0.01  # of a core at 1,000 requests/s
OUTPUT = Output(1, 0, [300], prompt_tokens=100, cached_tokens=64, queue_time=0.1, prefill_time=0.2)
LAST = Output(1, 0, [300], finish_reason="stop")


def arrived(number: int) -> Exchange:
    """What is there without a ledger, too."""
    exchange = Exchange(f"req-{number:032x}", caller=Caller(f"{number % 16:016x}", "a key"))
    exchange.status = 200
    return exchange


def one_request(exchange: Exchange) -> Record:
    """What the ledger adds to a request of two outputs."""
    exchange.is_recorded = True
    meter = exchange.meter = Meter()
    meter.model, meter.num_prompt, meter.num_choices, meter.num_told = "model", 100, 1, 2
    meter.tally.begin()
    meter.tally.note(OUTPUT)
    meter.tally.note(LAST)
    meter.end_choice(0, "stop")
    meter.tally.end()
    return make_record(
        exchange, "/v1/chat/completions", time.time(), exchange.age, exchange.settle()
    )


def at_rate(path: Path, rate: int, seconds: float, synchronous: str) -> tuple[float, float, float]:
    """(CPU share of the caller, of the writer's thread, bytes a record)."""
    store = Store(path)
    store._connection.execute(f"PRAGMA synchronous = {synchronous}")
    ledger, metrics = Ledger(store), UsageMetrics(CollectorRegistry())
    assert ledger._thread.ident is not None
    clock = time.pthread_getcpuclockid(ledger._thread.ident)
    time.sleep(1)  # the check at the start is over
    count, caller = 0, 0.0
    began, writer = time.monotonic(), time.clock_gettime(clock)
    while (elapsed := time.monotonic() - began) < seconds:
        due = [arrived(number) for number in range(count, int(elapsed * rate))]
        before = time.thread_time()
        for exchange in due:
            record = one_request(exchange)
            metrics.note(record, "finished")
            ledger.add(record)
        caller += time.thread_time() - before
        count += len(due)
        time.sleep(0.005)
    time.sleep(1)  # the last batch
    writer = time.clock_gettime(clock) - writer
    ledger.close()
    return caller / seconds, writer / seconds, path.stat().st_size / count


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def fill(store: Store, num_records: int) -> None:
    batch = 10_000
    for start in range(0, num_records, batch):
        numbers = range(start, min(start + batch, num_records))
        store.append("bench", [(number, one_request(arrived(number))) for number in numbers])


def fold_all(store: Store, most: int) -> None:
    while store.fold(most, 10_000):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=int, default=1_000, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--records", type=int, default=200_000, help="of a full file")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        table = Table("synchronous", "caller", "writer", "together", "bytes a record")
        for mode in ("NORMAL", "FULL"):
            cost = at_rate(Path(folder) / mode, arguments.rate, arguments.seconds, mode)
            shares = [*cost[:2], sum(cost[:2])]
            table.add_row(mode, *(f"{share:.2%}" for share in shares), f"{cost[2]:.0f}")
        console.print(f"CPU of a core at {arguments.rate} requests/s (target {TARGET:.0%})")
        console.print(table)
        full(Path(folder) / "full", arguments.records, console)


def full(path: Path, num_records: int, console: Console) -> None:
    with closing(Store(path)) as store:
        key, hour = f"{1:016x}", time.time() - 3_600
        table = Table("of a full file", "seconds")
        took = {
            f"write {num_records:,} records": timed(lambda: fill(store, num_records)),
            "check all of it": timed(store.check),
            "report by key": timed(lambda: summarize(path, "key", Range())),
            f"a key's tokens ({num_records // 16:,} records)": timed(
                lambda: charged_since(path, key, hour, "", 0)
            ),
            "fold half of it": timed(lambda: fold_all(store, num_records // 2)),
        }
        for name, seconds in took.items():
            table.add_row(name, f"{seconds:.3f}")
        console.print(table)


if __name__ == "__main__":
    main()
