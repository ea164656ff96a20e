"""From options to a runner that has run: threads, weights, the cache's size, a warm-up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from model.checkpoint import load_config, load_model
from model.host_cache import STAGED, HostCache
from model.kv_cache import KVCache, bytes_per_block
from model.kv_format import format_name
from model.llama import Llama
from model.lora import Adapter, AdapterError
from model.regional import settle_regions
from model.tokenizer import TokenizerError, load_tokenizer
from service.engine.capacity import (
    CPU_SHARE,
    Limits,
    limits_that_fit,
    limits_that_keep_pace,
    limits_wanted,
    num_blocks,
    num_host_slots,
)
from service.engine.costs import StepCosts
from service.engine.drafting import Drafter
from service.engine.machine import available_memory, usable_cores
from service.engine.messages import SamplingSettings, Submit
from service.engine.options import EngineOptions
from service.engine.runner import ModelRunner
from service.engine.sequence import Request, Sequence
from service.engine.speculation import DRAFT
from service.engine.step import Row, Step

logger = logging.getLogger("pronk.engine")

WARM_UP_ROWS = (1, 8, 32)
COST_RUNS = 3  # the first of a width may compile something
PROFILE_MARGIN = 1.05  # allocator rounding between the profiled step and real ones


@dataclass(frozen=True)
class Loaded:
    """A model in memory, a cache of ``num_blocks`` pages beside it."""

    runner: ModelRunner
    limits: Limits
    num_blocks: int
    facts: dict[str, str]
    num_host_slots: int = 0  # pages kept in host memory
    runs_ahead: bool = False  # a step is launched before the one before it is collected
    adapters: dict[str, Adapter] = field(default_factory=dict)  # by name
    adapter_slots: int = 0


def load(options: EngineOptions, progress: Callable[[float], None]) -> Loaded:
    """``progress`` hears 0..1. Raises ``ValueError`` or ``OSError`` with a line for the user."""
    torch.set_num_threads(options.threads or usable_cores())
    device = choose_device(options.device)
    model = load_model(
        options.model,
        dtype=options.dtype,
        device=device,
        attention=options.attention_backend,
        cache_dtype=options.kv_cache_dtype,
        progress=lambda done, total: progress(done / max(1, total)),
        quantization=options.quantization,
    )
    if "layers dense" in model.quantization:
        logger.warning("not all linear layers are quantized: %s", model.quantization)
    compiled = settle_regions(model, options.compile)
    if options.max_loras:
        model.make_adapter_slots(options.max_loras, options.max_lora_rank)
    draft = load_draft(options, model) if options.speculative_model is not None else None
    limits = limits_wanted(options, model.config.max_positions, device.type == "cuda")
    block_bytes = bytes_per_block(model.config, limits.block_size, model.cache_dtype)
    draft_bytes = 0
    if draft is not None:
        draft_bytes = bytes_per_block(draft.config, limits.block_size, draft.cache_dtype)
    budget, available = _memory_for_cache(options, model, limits)
    blocks = num_blocks(options, limits, block_bytes + draft_bytes, budget, available)
    fitting = limits_that_fit(options, limits, blocks)
    if fitting.max_model_len < limits.max_model_len:
        logger.warning(
            "the KV cache holds %d tokens: requests may be that long at most, the model would "
            "handle %d",
            fitting.max_model_len,
            limits.max_model_len,
        )
    cache = KVCache(model.config, blocks, limits.block_size, model.cache_dtype, model.device)
    host = _host_cache(options, cache, block_bytes, blocks * (block_bytes + draft_bytes))
    drafter = None
    if draft is not None:
        pages = KVCache(draft.config, blocks, limits.block_size, draft.cache_dtype, draft.device)
        drafter = Drafter(draft, pages, fitting)
    runner = ModelRunner(model, cache, fitting, drafter, host, options.max_lora_rank)
    adapters = read_adapters(options, runner)
    slots = 0 if host is None else host.num_slots
    facts = _facts(model, fitting, blocks) | _draft_facts(draft)
    facts["host_tokens"] = str(slots * limits.block_size)
    facts["attention"] = ", ".join(filter(None, (facts["attention"], compiled)))
    # On a processor host and device are the same cores: nothing would be gained.
    asked = options.async_scheduling
    runs_ahead = device.type == "cuda" if asked is None else asked
    return Loaded(runner, fitting, blocks, facts, slots, runs_ahead, adapters, options.max_loras)


def read_adapters(options: EngineOptions, runner: ModelRunner) -> dict[str, Adapter]:
    """Those named at the start. Raises ``ValueError`` for the first that cannot be served."""
    found = {}
    if len(options.adapters) > options.max_cpu_loras:
        raise ValueError(f"{len(options.adapters)} adapters are more than {options.max_cpu_loras}")
    for name, folder in options.adapters.items():
        try:
            found[name] = runner.read_adapter(folder)
        except AdapterError as error:
            if not options.skip_bad_adapters:
                raise ValueError(f"adapter {name}: {error}") from error
            logger.error("adapter %s is served no longer: %s", name, error)
    return found


def load_draft(options: EngineOptions, model: Llama) -> Llama:
    """The draft model, beside the one it proposes for. Raises ``ValueError`` where it cannot."""
    assert options.speculative_model is not None, "no draft model is asked for"
    config = load_config(options.speculative_model)
    if config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the draft model has a vocabulary of {config.vocab_size} tokens and the model one of "
            f"{model.config.vocab_size}: speculative_model must have the same tokenizer"
        )
    _check_same_tokens(options.model, options.speculative_model)
    return load_model(
        options.speculative_model,
        dtype=options.dtype,
        device=model.device,
        attention=options.attention_backend,
    )


def _check_same_tokens(path: str, draft_path: str) -> None:
    """Raises ``ValueError`` where an id means something else; no tokenizer tells nothing."""
    try:
        tokenizer, other = load_tokenizer(path), load_tokenizer(draft_path)
    except TokenizerError:
        return
    for token in range(min(tokenizer.vocab_size, other.vocab_size)):
        if tokenizer.token_bytes(token) != other.token_bytes(token):
            raise ValueError(
                f"token {token} is {other.token_text(token)!r} for the draft model and "
                f"{tokenizer.token_text(token)!r} for the model: speculative_model must have the "
                "same tokenizer"
            )


def _host_cache(
    options: EngineOptions, cache: KVCache, block_bytes: int, cache_bytes: int
) -> HostCache | None:
    """What the KV cache may still come to take of the same memory is not available to it."""
    own = 0 if cache.keys[0].is_cuda else cache_bytes
    slots = num_host_slots(options, block_bytes, available_memory() - own)
    return HostCache(cache, slots) if slots else None


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one. Raises ``ValueError`` for one that is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not there: torch sees {_devices()}")
    return device


def warm_up(loaded: Loaded) -> Iterator[tuple[int, float]]:
    """Run a prompt chunk and decodes of several widths; yields (tokens, seconds) of each step."""
    loaded.runner.capture_graphs()
    for step in _warm_up_steps(loaded.limits, loaded.num_blocks):
        began = time.monotonic()
        loaded.runner.run(step)
        yield step.num_tokens, time.monotonic() - began
    if loaded.adapter_slots:
        warm_up_adapters(loaded)


def warm_up_adapters(loaded: Loaded) -> None:
    """The kernels of adapters too: on a GPU they are compiled at their first launch."""
    loaded.runner.fill_slot_for_warm_up(is_used=True)
    for step in _warm_up_steps(loaded.limits, loaded.num_blocks):
        for row in step.rows:
            row.adapter = 0
        loaded.runner.run(step)
    loaded.runner.fill_slot_for_warm_up(is_used=False)


def measure_costs(loaded: Loaded) -> tuple[StepCosts, StepCosts]:
    """Of decoding steps and of the draft model's passes; unknown where nobody may guess ahead."""
    costs, draft_costs = StepCosts(), StepCosts()
    if loaded.limits.max_proposed:
        widths = [rows for rows in WARM_UP_ROWS if rows <= loaded.limits.max_num_seqs]
        costs.start([(rows, min(_seconds(loaded, rows))) for rows in widths])
        if loaded.runner.drafter is not None:
            draft_costs.start([(rows, min(_draft_seconds(loaded, rows))) for rows in widths])
    return costs, draft_costs


def _seconds(loaded: Loaded, num_rows: int) -> Iterator[float]:
    for _ in range(COST_RUNS):
        began = time.monotonic()
        loaded.runner.run(_decodes(loaded, num_rows))
        yield time.monotonic() - began


def _draft_seconds(loaded: Loaded, num_rows: int) -> Iterator[float]:
    for _ in range(COST_RUNS):
        step = _decodes(loaded, num_rows)
        for row in step.rows:
            row.num_ahead = 1
        yield from (seconds for _, seconds in loaded.runner.run(step).draft_passes)


def _decodes(loaded: Loaded, num_rows: int) -> Step:
    settings = SamplingSettings(temperature=0.0, speculative_method=DRAFT)
    return _step([1] * num_rows, [settings] * num_rows, loaded.limits, loaded.num_blocks)


def settle(options: EngineOptions, loaded: Loaded, steps: list[tuple[int, float]]) -> Loaded:
    """``loaded`` with a token budget this machine keeps pace with, judged by its warm-up."""
    rate = max(tokens / seconds for tokens, seconds in steps)
    limits = limits_that_keep_pace(options, loaded.limits, rate)
    facts = loaded.facts | {"max_num_batched_tokens": str(limits.max_num_batched_tokens)}
    return replace(loaded, limits=limits, facts=facts)


def _warm_up_steps(limits: Limits, num_blocks: int) -> Iterator[Step]:
    """Their keys land in pages nobody has been given yet."""
    room = min(limits.max_model_len, (num_blocks - 1) * limits.block_size)
    chunk = min(limits.max_num_batched_tokens, room)
    greedy, drawn = SamplingSettings(temperature=0.0), SamplingSettings(top_p=0.9, logprobs=0)
    yield _step([chunk], [drawn], limits, num_blocks)
    for num_rows in WARM_UP_ROWS:
        if num_rows <= limits.max_num_seqs:
            settings = [greedy if i % 2 else drawn for i in range(num_rows)]
            yield _step([1] * num_rows, settings, limits, num_blocks)


def _step(
    counts: list[int], settings: list[SamplingSettings], limits: Limits, num_blocks: int
) -> Step:
    rows = []
    for number, (count, own) in enumerate(zip(counts, settings, strict=True)):
        request = Request(Submit(id=number, prompt=[0] * count, settings=[own]), -1, -1, 0.0)
        sequence = Sequence.start(request)
        pages = -(-count // limits.block_size)
        sequence.block_table = [1 + (number + i) % (num_blocks - 1) for i in range(pages)]
        rows.append(Row(sequence, 0, count, num_logits=1, choices=sequence.choices))
    return Step(0, rows, num_tokens=sum(counts))


def _memory_for_cache(options: EngineOptions, model: Llama, limits: Limits) -> tuple[int, int]:
    """(bytes the cache gets by default, bytes it could have at all)."""
    if model.device.type == "cuda":
        free = _free_after_profile(options, model, limits)
        if options.host_cache_memory:
            page = bytes_per_block(model.config, limits.block_size, model.cache_dtype)
            free = max(0, free - 2 * STAGED * page)
        return free, free
    available = available_memory()
    return int(available * CPU_SHARE), available


def _free_after_profile(options: EngineOptions, model: Llama, limits: Limits) -> int:
    """What a step of the largest size leaves of the device's share that pronk may use."""
    pages = -(-limits.max_num_batched_tokens // limits.block_size) + 1
    cache = KVCache(model.config, pages, limits.block_size, model.cache_dtype, model.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    largest = Limits(
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        max(limits.max_model_len, limits.max_num_batched_tokens),
        limits.block_size,
        limits.max_proposed,
    )
    ModelRunner(model, cache, largest).run(_largest_step(largest, pages))
    torch.cuda.synchronize(model.device)
    peak = torch.cuda.max_memory_allocated(model.device) - before
    cache.close()
    del cache
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    reserved = total * (1.0 - options.gpu_memory_utilization)
    return max(0, int(free - reserved - PROFILE_MARGIN * peak))


def _largest_step(limits: Limits, num_blocks: int) -> Step:
    """Every row there can be samples, and together they spend the whole budget."""
    count = max(1, limits.max_num_batched_tokens // limits.max_rows)
    settings = [SamplingSettings(top_p=0.9, logprobs=20)] * limits.max_rows
    return _step([count] * limits.max_rows, settings, limits, num_blocks)


def _facts(model: Llama, limits: Limits, num_blocks: int) -> dict[str, str]:
    """What the start-up banner and ``/version`` may tell."""
    return {
        "architecture": model.config.architecture,
        "parameters": str(model.num_parameters),
        "device": _device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": format_name(model.cache_dtype),
        "quantization": model.quantization,
        "attention": model.path,
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "max_num_seqs": str(limits.max_num_seqs),
        "max_num_batched_tokens": str(limits.max_num_batched_tokens),
        "kv_tokens": str((num_blocks - 1) * limits.block_size),
    }


def _draft_facts(draft: Llama | None) -> dict[str, str]:
    if draft is None:
        return {}
    return {"draft": f"{draft.num_parameters / 1e6:.1f}M parameters, {draft.path}"}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _devices() -> str:
    count = torch.cuda.device_count()
    return "no GPU" if count == 0 else f"cuda:0 to cuda:{count - 1}"
