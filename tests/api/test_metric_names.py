"""A real server's /metrics, against the list of what dashboards, balancers and alerts ask for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from model.bundled import bundled_model_path
from tests.running import Running, serving

FIRST_TOKEN = ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
PER_TOKEN = ".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80"
WHOLE = ".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
TOKENS = "1 2 5 10 20 50 100 200 500 1000"
GAUGES = {
    "num_requests_running": "",
    "num_requests_waiting": "",
    "kv_cache_usage_perc": "",
    "gpu_cache_usage_perc": "",
    "cache_config_info": "block_size num_gpu_blocks cache_dtype",
    "lora_requests_info": "max_lora running_lora_adapters waiting_lora_adapters",
}
COUNTERS = {
    "prompt_tokens": "",
    "generation_tokens": "",
    "request_success": "finished_reason",
    "num_preemptions": "",
    "prefix_cache_queries": "",
    "prefix_cache_hits": "",
    "admission_rejections": "reason",
    "spec_decode_num_drafts": "",
    "spec_decode_num_draft_tokens": "",
    "spec_decode_num_accepted_tokens": "",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": FIRST_TOKEN,
    "inter_token_latency_seconds": PER_TOKEN,
    "request_time_per_output_token_seconds": PER_TOKEN,
    "time_per_output_token_seconds": PER_TOKEN,
    "e2e_request_latency_seconds": WHOLE,
    "request_queue_time_seconds": WHOLE,
    "request_inference_time_seconds": WHOLE,
    "request_prefill_time_seconds": WHOLE,
    "request_decode_time_seconds": WHOLE,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "iteration_tokens_total": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384",
}
OWN = {
    "pronk:requests_received": ("counter", ""),
    "pronk:requests_finished": ("counter", ""),
    "pronk:requests_failed": ("counter", ""),
    "pronk:requests_cancelled": ("counter", ""),
    "pronk:requests_rejected": ("counter", ""),
    "pronk:requests_in_flight": ("gauge", ""),
    "pronk:key_requests": ("counter", "key outcome"),
    "pronk:key_prompt_tokens": ("counter", "key"),
    "pronk:key_generation_tokens": ("counter", "key"),
    "pronk:key_rejections": ("counter", "key reason"),
    "pronk:engine_restarts": ("counter", "model_name engine reason"),
    "pronk:draining": ("gauge", ""),
    "pronk:connections": ("gauge", "state"),
    "pronk:ledger_records": ("counter", ""),
    "pronk:ledger_writable": ("gauge", ""),
    "http_requests": ("counter", "method status handler"),
    "http_request_duration_seconds": ("histogram", "method handler"),
}
pytestmark = pytest.mark.skipif(
    not (bundled_model_path() / "model.safetensors").is_file(), reason="no bundled weights here"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    ledger = tmp_path_factory.mktemp("ledger") / "usage.db"
    flags = ["--no-sample", "--threads", "1", "--num-kv-blocks", "16", "--max-model-len", "1024"]
    with serving(*flags, "--metrics-public", PRONK_LEDGER=str(ledger), PRONK_API_KEY="k") as found:
        body = {"prompt": "Once upon a time", "max_tokens": 9, "ignore_eos": True}
        headers = {"Authorization": "Bearer k"}
        answer = httpx.post(f"{found.url}/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        assert httpx.post(f"{found.url}/v1/completions", json=body).status_code == 401
        yield found


@pytest.fixture(scope="module")
def families(server: Running) -> dict[str, Metric]:
    text = httpx.get(f"{server.url}/metrics").text
    return {family.name: family for family in text_string_to_metric_families(text)}


def labels(family: Metric) -> set[str]:
    return {name for sample in family.samples for name in sample.labels} - {"le"}


@pytest.mark.parametrize("prefix", ["vllm:", "pronk:"])
def test_names_types_labels_and_buckets_are_those_dashboards_ask_for(
    families: dict[str, Metric], prefix: str
) -> None:
    for kind, names in (("gauge", GAUGES), ("counter", COUNTERS)):
        for name, more in names.items():
            family = families[prefix + name]
            assert (family.type, labels(family)) == (kind, {"model_name", "engine", *more.split()})
    for name, bounds in HISTOGRAMS.items():
        family = families[prefix + name]
        assert family.type == "histogram"
        assert labels(family) == {"model_name", "engine"}
        found = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
        assert found == [*map(float, bounds.split()), float("inf")], name


def test_pronks_own_are_there_with_their_labels(families: dict[str, Metric]) -> None:
    for name, (kind, more) in OWN.items():
        assert families[name].type == kind, name
        if families[name].samples:  # the engine was never restarted
            assert labels(families[name]) == set(more.split()), name


def test_nothing_is_there_that_the_page_of_metrics_does_not_tell(
    families: dict[str, Metric],
) -> None:
    from docs.metrics import metrics_page

    page = metrics_page()
    for family in families.values():
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"`{name.removeprefix('vllm:')}`" in page or f"`{name[6:]}`" in page, name
        assert family.documentation, name


def test_both_prefixes_say_the_same(families: dict[str, Metric]) -> None:
    for name in (*GAUGES, *COUNTERS, *HISTOGRAMS):
        theirs, own = families[f"vllm:{name}"], families[f"pronk:{name}"]
        assert [s.value for s in theirs.samples] == [s.value for s in own.samples]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (prometheus) is missing")
def test_prometheus_own_check_reads_it(server: Running) -> None:
    text = httpx.get(f"{server.url}/metrics").content
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, check=False
    )
    told = done.stderr.decode() + done.stdout.decode()
    # It parses; its linter dislikes names that are vLLM's: colons, and a histogram named _total.
    unloved = [
        line for line in told.splitlines() if "vllm:" not in line and "contain ':'" not in line
    ]
    assert done.returncode in (0, 3), told
    assert [line for line in unloved if line and "_total" not in line and "_info" not in line] == []
