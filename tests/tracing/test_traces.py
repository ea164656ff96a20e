"""One span a request and its parts below it, whatever becomes of the request; never its words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.api.app import create_app
from service.errors import Overloaded
from service.ledger.record import Record
from service.registry import ModelRegistry
from service.settings import Settings
from tests.api.conftest import Reader, scope_of, talking_to, until
from tests.api.fakes import FakeEngine, FakeGeneration, served

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra otel")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

CANARY = "zanzibarine"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Slow(FakeGeneration):
    """Waited 5 ms, computed its prompt for 10; so says its first output."""

    def _outputs(self, settings: list[Any]) -> Any:
        for output in super()._outputs(settings):
            yield output if output.queue_time is None else _timed(output)


def _timed(output: Any) -> Any:
    from msgspec.structs import replace

    return replace(output, queue_time=0.005, prefill_time=0.01)


class SlowEngine(FakeEngine):
    def generation(self, *given: Any) -> FakeGeneration:
        return Slow(self, *given)


class Spans:
    """What was exported, by name."""

    def __init__(self, engine: FakeEngine, **settings: Any) -> None:
        from service.tracing.exporting import Tracing

        self.exporter = memory.InMemorySpanExporter()
        self.tracing = Tracing(self.exporter, is_batched=False)
        model = served(engine)
        self.app = create_app(
            Settings(**settings), ModelRegistry([model]), None, tracing=self.tracing
        )

    @property
    def all(self) -> list[Any]:
        return list(self.exporter.get_finished_spans())

    @property
    def root(self) -> Any:
        [found] = [span for span in self.all if span.kind.name == "SERVER"]
        return found

    def part(self, name: str) -> Any:
        [found] = [span for span in self.all if span.name == name]
        return found


@pytest.fixture
def engine() -> FakeEngine:
    return SlowEngine()


@pytest.fixture
def spans(engine: FakeEngine) -> Spans:
    return Spans(engine)


def lasted(span: Any) -> float:
    return float(span.end_time - span.start_time) / 1e9


async def ask(spans: Spans, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    async with talking_to(spans.app) as client:
        body = {"prompt": CANARY, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9} | fields
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
        return await client.post(path, json=body, headers=headers)


async def test_a_request_is_one_span_below_its_clients_with_queue_prefill_and_decode(
    spans: Spans, engine: FakeEngine
) -> None:
    engine.pause = 0.02
    answer = await ask(spans, stream=True)
    root = spans.root
    assert root.name == "POST /v1/completions"
    assert format(root.context.trace_id, "032x") == TRACE
    assert format(root.parent.span_id, "016x") == PARENT
    assert root.context.trace_state["vendor"] == "1"
    assert [span.name for span in spans.all] == ["queue", "prefill", "decode", root.name]
    for name in ("queue", "prefill", "decode"):
        part = spans.part(name)
        assert part.parent.span_id == root.context.span_id
        assert part.context.trace_id == root.context.trace_id
    queue, prefill, decode = map(spans.part, ("queue", "prefill", "decode"))
    assert prefill.end_time == decode.start_time
    assert queue.end_time == prefill.start_time
    assert lasted(queue) == pytest.approx(0.005)
    assert lasted(prefill) == pytest.approx(0.01)
    assert lasted(decode) >= 0.08 * 0.9
    assert root.start_time <= queue.start_time <= decode.end_time <= root.end_time
    assert answer.headers["x-request-id"] == root.attributes["pronk.request.id"]


async def test_attributes_are_those_of_the_conventions(spans: Spans) -> None:
    answer = (await ask(spans, n=2, top_k=7, frequency_penalty=0.5)).json()
    found = dict(spans.root.attributes)
    assert found.pop("pronk.request.id")
    assert found.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert found.pop("pronk.decode.seconds") >= 0
    assert found == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/v1/completions",
        "network.protocol.version": "1.1",
        "server.address": "pronk",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "pronk",
        "gen_ai.system": "pronk",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.frequency_penalty": 0.5,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": False,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": len(CANARY) + 1,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 10,
        "pronk.usage.discarded_tokens": 0,
        "pronk.queue.seconds": 0.005,
        "pronk.prefill.seconds": 0.01,
        "pronk.outcome": "finished",
    }
    assert spans.root.status.status_code.name == "UNSET"


MESSAGES = {"messages": [{"role": "user", "content": CANARY}], "prompt": None}


@pytest.mark.parametrize(
    ("path", "fields", "operation"),
    [
        ("/v1/chat/completions", MESSAGES, "chat"),
        ("/v1/responses", {"input": CANARY, "prompt": None, "max_output_tokens": 5}, "chat"),
        ("/v1/messages", {**MESSAGES, "model": "tiny"}, "chat"),
    ],
)
async def test_every_way_to_ask_has_an_operation_and_its_answers_id(
    spans: Spans, path: str, fields: dict[str, Any], operation: str
) -> None:
    answer = await ask(spans, path, **fields)
    assert answer.status_code == 200, answer.text
    found = spans.root.attributes
    assert found["gen_ai.operation.name"] == operation
    assert found["gen_ai.response.id"] == answer.json()["id"]
    assert found["gen_ai.usage.output_tokens"] == 5


async def test_a_failure_is_an_error_with_its_type(spans: Spans, engine: FakeEngine) -> None:
    engine.fail_after = 1
    assert (await ask(spans)).status_code == 500
    assert spans.root.status.status_code.name == "ERROR"
    assert spans.root.attributes["error.type"] == "engine_failure"
    assert spans.root.attributes["http.response.status_code"] == 500


async def test_a_stream_that_fails_after_its_200_is_an_error(
    spans: Spans, engine: FakeEngine
) -> None:
    engine.fail_after = 2
    assert (await ask(spans, stream=True)).status_code == 200
    assert spans.root.status.status_code.name == "ERROR"
    assert spans.root.attributes["pronk.outcome"] == "failed"
    assert spans.part("prefill")


async def test_a_refusal_is_no_error_and_never_ran(spans: Spans, engine: FakeEngine) -> None:
    engine.refusal = Overloaded("full", retry_after=1)
    assert (await ask(spans)).status_code == 429
    [only] = spans.all
    assert only.status.status_code.name == "UNSET"
    assert only.attributes["pronk.outcome"] == "rejected"
    assert only.attributes["pronk.error.code"] == "queue_full"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_who_hangs_up_in_the_queue_ends_the_span_with_the_time_it_waited(
    spans: Spans, engine: FakeEngine, is_stream: bool
) -> None:
    engine.gate = asyncio.Event()
    reader = Reader({"prompt": CANARY, "stream": is_stream})
    reader.may_read.set()
    task = asyncio.create_task(spans.app(scope_of("/v1/completions"), reader.receive, reader.send))
    await until(lambda: engine.live > 0)
    assert spans.all == []
    reader.gone.set()
    await task
    assert spans.root.attributes["pronk.outcome"] == "cancelled"
    assert spans.root.status.status_code.name == "UNSET"
    queue = spans.part("queue")
    assert spans.root.start_time <= queue.start_time < queue.end_time <= spans.root.end_time
    assert len(spans.all) == 2


async def test_no_span_holds_what_was_asked_or_answered(spans: Spans, engine: FakeEngine) -> None:
    engine.script = lambda prompt, settings: list(b"mellifluous") * 9
    await ask(spans, stop=["quux"], max_tokens=60, user=CANARY, cache_salt=CANARY)
    await ask(spans, "/v1/chat/completions", **MESSAGES)
    await ask(spans, "/v1/nowhere")
    told = "".join(span.to_json() for span in spans.all)
    assert len(spans.all) == 9
    for word in (CANARY, "mellifluous", "quux"):
        assert word not in told


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/v2/health/live", "/metrics"])
async def test_what_is_asked_every_second_is_not_traced(spans: Spans, path: str) -> None:
    async with talking_to(spans.app) as client:
        await client.get(path)
        await client.get("/v1/models")
    assert [span.name for span in spans.all] == ["GET /v1/models"]


async def test_a_stranger_is_traced_without_a_key_and_under_no_path_of_his_own(
    engine: FakeEngine,
) -> None:
    spans = Spans(engine, api_key="secret")
    await ask(spans, f"/{'x' * 5_000}")
    assert spans.root.name == "POST"
    assert spans.root.attributes["http.response.status_code"] == 401
    assert len(spans.root.attributes["url.path"]) == 256
    assert "secret" not in spans.root.to_json()


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "\xe9" * 9_000])
async def test_a_bad_traceparent_starts_a_trace_of_its_own(spans: Spans, header: str) -> None:
    async with talking_to(spans.app) as client:
        headers = [(b"traceparent", header.encode("latin-1"))]
        answer = await client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert answer.status_code == 200
    assert spans.root.parent is None
    assert spans.root.context.trace_id


async def test_what_the_client_does_not_sample_is_not_exported(spans: Spans) -> None:
    async with talking_to(spans.app) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        await client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert spans.all == []


async def test_spans_are_counted(spans: Spans) -> None:
    await ask(spans)
    async with talking_to(spans.app) as client:
        told = (await client.get("/metrics")).text
    assert "pronk:trace_spans_exported_total 4.0" in told
    assert "pronk:trace_spans_lost_total 0.0" in told


async def test_an_exporter_that_raises_costs_no_request(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    spans = Spans(engine)
    caplog.set_level("INFO", "pronk.traces")

    def refuse(batch: object) -> None:
        raise OSError("no route")

    spans.exporter.export = refuse
    for _ in range(20):
        assert (await ask(spans)).status_code == 200
    assert spans.tracing.deliveries.num_lost == 80
    lines = [record.message for record in caplog.records if record.name == "pronk.traces"]
    assert lines == ["the collector takes no spans: they are lost until it does"]
    del spans.exporter.export
    await ask(spans)
    assert caplog.records[-1].message == "the collector takes spans again; 80 were lost"
    assert spans.tracing.deliveries.num_exported == 4


def test_a_record_knows_nothing_that_a_span_must_not() -> None:
    assert not {"prompt", "text", "answer"} & set(Record._fields)


async def test_without_tracing_nothing_is_made(make_app: Callable[..., FastAPI]) -> None:
    app = make_app()
    async with talking_to(app) as client:
        await client.post("/v1/completions", json={"prompt": "x"})
        assert "trace_spans" not in (await client.get("/metrics")).text
