"""Metrics: names, labels, and books that always balance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from service.engine.messages import Output, Outputs, State
from service.errors import Overloaded
from service.metrics import token_buckets
from tests.api.conftest import Reader, scope_of, talking_to, until
from tests.api.fakes import FakeEngine

URL = "/v1/completions"
LABELS = {"model_name": "tiny", "engine": "0"}


async def scrape(client: httpx.AsyncClient) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def value(samples: dict, name: str, **labels: str) -> float:
    return samples[name][tuple(sorted((LABELS | labels).items()))]


GAUGES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "gpu_cache_usage_perc",
    "cache_config_info",
    "lora_requests_info",
]
COUNTERS = [
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "admission_rejections_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
]
HISTOGRAMS = [
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
]


@pytest.mark.parametrize("prefix", ["vllm:", "pronk:"])
async def test_every_name_dashboards_ask_for_is_there(
    client: httpx.AsyncClient, prefix: str
) -> None:
    samples = await scrape(client)
    for name in [*GAUGES, *COUNTERS, *(f"{name}_bucket" for name in HISTOGRAMS)]:
        assert prefix + name in samples, name
        labels = dict(next(iter(samples[prefix + name])))
        assert labels.items() >= LABELS.items()


async def test_the_engines_state_is_read_when_scraped(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.state = State(
        stage="ready",
        running=3,
        waiting=4,
        num_blocks=10,
        free_blocks=4,
        block_size=256,
        host_blocks=8,
        used_host_blocks=2,
        counters={
            "preemptions": 2,
            "yields": 1,
            "host_hits": 640,
            "host_loads": 3,
            "step_seconds": 8.0,
            "gap_seconds": 0.5,
        },
        facts={"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    )
    samples = await scrape(client)
    assert value(samples, "vllm:num_requests_running") == 3
    assert value(samples, "vllm:num_requests_waiting") == 4
    assert value(samples, "vllm:kv_cache_usage_perc") == pytest.approx(0.6)
    assert value(samples, "pronk:num_preemptions_total") == 2
    assert value(samples, "pronk:fair_preemptions_total") == 1
    shape = {"block_size": "256", "num_gpu_blocks": "10", "cache_dtype": "fp8"}
    assert value(samples, "vllm:cache_config_info", **shape) == 1
    assert value(samples, "pronk:host_cache_hits_total") == 640
    assert value(samples, "pronk:host_cache_loads_total") == 3
    assert value(samples, "pronk:host_cache_stores_total") == 0
    assert value(samples, "pronk:host_cache_evictions_total") == 0
    assert value(samples, "pronk:host_cache_usage_perc") == 0.25
    assert value(samples, "pronk:engine_step_seconds_total") == 8
    assert value(samples, "pronk:engine_gap_seconds_total") == 0.5
    engine.state = State(stage="ready", num_blocks=10, free_blocks=10)
    samples = await scrape(client)
    assert value(samples, "vllm:num_requests_running") == 0
    assert value(samples, "vllm:kv_cache_usage_perc") == 0
    assert value(samples, "pronk:host_cache_usage_perc") == 0


async def test_a_request_leaves_its_marks(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(URL, json={"prompt": "Hi", "n": 2})
    for observer in engine.observers:
        first = Output(1, choice=0, tokens=[], prompt_tokens=3)
        observer(Outputs(step=1, num_scheduled_tokens=7, step_time=0.1, outputs=[first]))
    samples = await scrape(client)
    assert value(samples, "vllm:prompt_tokens_total") == 3
    assert value(samples, "vllm:request_success_total", finished_reason="stop") == 2
    assert value(samples, "vllm:time_to_first_token_seconds_count") == 2
    assert value(samples, "vllm:inter_token_latency_seconds_count") == 24
    assert value(samples, "vllm:request_generation_tokens_sum") == 26
    assert value(samples, "vllm:iteration_tokens_total_sum") == 7
    assert samples["pronk:requests_finished_total"][()] == 1


async def test_http_labels_are_bounded_whatever_strangers_try(client: httpx.AsyncClient) -> None:
    for path in ("/a", "/b/c", "/v1/models/one", "/v1/models/two/three"):
        await client.get(path)
    await client.request("BREW", "/livez")
    samples = await scrape(client)
    handlers = {dict(labels)["handler"] for labels in samples["http_requests_total"]}
    assert handlers <= {"unmatched", "/v1/models/{model_id:path}", "/livez", "/metrics"}
    methods = {dict(labels)["method"] for labels in samples["http_requests_total"]}
    assert methods == {"GET", "OTHER"}
    assert "http_request_duration_seconds_bucket" in samples


async def test_the_books_balance_after_every_kind_of_end(
    make_app: Callable[..., FastAPI], engine: FakeEngine
) -> None:
    app = make_app()
    async with talking_to(app) as client:
        await client.post(URL, json={"prompt": "Hi"})
        await client.post(URL, json={"prompt": "Hi", "stream": True})
        await client.post(URL, json={"prompt": ""})
        await client.post(URL, content=b"{")
        engine.refusal = Overloaded("full", retry_after=1)
        await client.post(URL, json={"prompt": "Hi"})
        engine.refusal, engine.fail_after = None, 0
        await client.post(URL, json={"prompt": "Hi"})
        engine.fail_after = 2
        await client.post(URL, json={"prompt": "Hi", "stream": True})
        engine.fail_after, engine.gate = None, asyncio.Event()
        for stream in (False, True):
            reader = Reader({"prompt": "Hi", "stream": stream})
            reader.may_read.set()
            task = asyncio.create_task(app(scope_of(URL), reader.receive, reader.send))
            await until(lambda: engine.live > 0)
            during = await scrape(client)
            assert during["pronk:requests_in_flight"][()] == 1
            reader.gone.set()
            await task
        samples = await scrape(client)
    ends = {
        outcome: samples[f"pronk:requests_{outcome}_total"][()]
        for outcome in ("finished", "failed", "cancelled", "rejected")
    }
    assert ends == {"finished": 2, "failed": 2, "cancelled": 2, "rejected": 3}
    assert samples["pronk:requests_received_total"][()] == sum(ends.values())
    assert samples["pronk:requests_in_flight"][()] == 0
    assert value(samples, "vllm:admission_rejections_total", reason="queue_full") == 1
    assert value(samples, "vllm:request_success_total", finished_reason="cancelled") == 2
    assert value(samples, "vllm:request_success_total", finished_reason="error") == 2


async def test_a_quantity_has_one_series_and_no_birthday(client: httpx.AsyncClient) -> None:
    await client.post(URL, json={"prompt": "Hi"})
    assert not [name for name in await scrape(client) if name.endswith("_created")]


def test_token_buckets_go_up_to_the_context() -> None:
    assert token_buckets(200) == [1, 2, 5, 10, 20, 50, 100, 200]
