"""A real server and a small collector over loopback: spans arrive, and a dead one costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from model.bundled import bundled_model_path
from tests.running import ROOT, Running, free_port, serving, wait_until

protocol = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="needs the extra otel"
)
pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
pytestmark = pytest.mark.skipif(
    not (bundled_model_path() / "model.safetensors").is_file(), reason="no bundled weights here"
)

ARGUMENTS = ["--no-sample", "--threads", "1", "--num-kv-blocks", "64", "--log-format", "json"]
BODY = {"prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}


class Collector:
    """Takes OTLP over HTTP as protobuf; keeps the spans and what came beside them."""

    def __init__(self) -> None:
        collector = self
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self.paths: set[str] = set()
        self.headers: list[dict[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(self.path, dict(self.headers), body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        told = protocol.ExportTraceServiceRequest.FromString(body)
        self.paths.add(path)
        self.headers.append({name.lower(): value for name, value in headers.items()})
        for group in told.resource_spans:
            pairs = {pair.key: pair.value.string_value for pair in group.resource.attributes}
            self.resources.append(pairs)
            for scope in group.scope_spans:
                self.spans += scope.spans

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        collector.server.server_close()


def ask(server: Running, name: str = "one") -> float:
    """Seconds it took."""
    headers = {"x-request-id": name, "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    began = time.monotonic()
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return time.monotonic() - began


def log_lines(server: Running) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]


def lasted(span: Any) -> float:
    return float(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_spans_of_a_real_request_arrive_and_its_lines_carry_the_trace() -> None:
    environment = {
        **SOON,
        "OTEL_SERVICE_NAME": "llama",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=me",
    }
    with collecting() as collector:
        flags = [*ARGUMENTS, "--access-log", "--otlp-traces-endpoint", collector.url]
        with serving(*flags, **environment) as server:
            took = ask(server)
            wait_until(lambda: collector.named("POST /v1/completions"), "spans", server)
            ask(server, "last")
            lines = log_lines(server)
            assert server.end() == 0
        assert len(collector.named("POST /v1/completions")) == 2, "the last ones leave at the end"
    root = collector.named("POST /v1/completions")[0]
    assert root.trace_id.hex() == TRACE
    assert 0 < lasted(root) <= took
    parts = [collector.named(name)[0] for name in ("queue", "prefill", "decode")]
    assert {part.parent_span_id for part in parts} == {root.span_id}
    ends = [
        moment for part in parts for moment in (part.start_time_unix_nano, part.end_time_unix_nano)
    ]
    assert ends == sorted(ends)
    assert ends[0] >= root.start_time_unix_nano
    assert ends[-1] <= root.end_time_unix_nano
    assert sum(map(lasted, parts)) <= lasted(root)
    assert collector.paths == {"/v1/traces"}
    assert collector.headers[0]["x-tenant"] == "me"
    assert collector.headers[0]["content-type"] == "application/x-protobuf"
    assert collector.resources[0]["service.name"] == "llama"
    assert collector.resources[0]["deployment.environment"] == "test"
    [line] = [one for one in lines if one.get("request_id") == "one"]
    assert line["logger"] == "pronk.access"
    assert line["trace_id"] == TRACE


def test_a_dead_collector_costs_no_request_no_memory_and_no_log() -> None:
    environment = {**SOON, "OTEL_BSP_MAX_QUEUE_SIZE": "16", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4"}
    environment |= {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    dead = f"http://127.0.0.1:{free_port()}"
    with serving(*ARGUMENTS, "--otlp-traces-endpoint", dead, **environment) as server:
        for number in range(40):
            ask(server, f"r{number}")
        told = "pronk:trace_spans_lost_total"
        metrics = f"{server.url}/metrics"
        wait_until(lambda: f"{told} 0.0" not in httpx.get(metrics).text, "spans to be lost", server)
        began = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - began < 20
        lines = [line for line in log_lines(server) if line["logger"].startswith("pronk.traces")]
        assert len(lines) == 1
        assert "opentelemetry" not in server.output()


def test_the_standards_variables_alone_turn_traces_on_and_off() -> None:
    with collecting() as collector:
        environment = {**SOON, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        with serving(*ARGUMENTS, **environment) as server:
            ask(server)
            wait_until(lambda: collector.spans, "spans", server)
        count = len(collector.spans)
        with serving(*ARGUMENTS, **environment, OTEL_SDK_DISABLED="true") as server:
            ask(server)
            server.end()
        assert len(collector.spans) == count


START = "import service.cli; service.cli.main()"
WITHOUT = f"import sys; sys.modules['opentelemetry.sdk'] = None; {START}"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://127.0.0.1:4318", "traces need the extra otel: pip install '.[otel]'"),
        ("collector:4318", "must be an http or https URL"),
    ],
)
def test_traces_that_cannot_be_made_are_one_clear_line(url: str, told: str) -> None:
    code = WITHOUT if "extra" in told else START
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--ledger", "none"]
    command += ["--otlp-traces-endpoint", url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_of_opentelemetry_is_imported_unless_asked_for() -> None:
    code = (  # FastAPI itself imports the API alone, which exports nothing
        "import sys, service.serve, service.api.app\n"
        "from service.tracing.exporting import traced\n"
        "with traced(None) as tracing: assert tracing is None\n"
        "ours = ('opentelemetry.sdk', 'opentelemetry.exporter', 'google.protobuf')\n"
        "sys.exit(any(name.startswith(ours) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
