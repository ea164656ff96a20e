"""The runner alone: a scheduler's steps through a real, tiny network in this process."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import LlamaForCausalLM

from model import sampler as sampler_module
from model.host_cache import HostCache
from service.engine import runner as runner_module
from service.engine.blocks import BlockPool
from service.engine.counters import Counters
from service.engine.host_slots import HostSlots
from service.engine.loading import Loaded, choose_device, load, warm_up
from service.engine.messages import Output, SamplingSettings, Submit, TokenLogprob
from service.engine.options import EngineOptions
from service.engine.runner import Launched
from service.engine.scheduler import Scheduler
from tests.engine.checkpoints import NAN_TOKEN, write_tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK, NUM_BLOCKS, CHUNK = 32, 40, 24
PROMPT = [(7 * i) % 150 + 3 for i in range(70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def network(folder: Path) -> LlamaForCausalLM:
    return write_tiny_llama(folder)


def options(folder: Path, **fields: object) -> EngineOptions:
    return EngineOptions(
        model=str(folder),
        socket="",
        device="cpu",
        threads=1,
        block_size=BLOCK,
        num_kv_blocks=NUM_BLOCKS,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=16,
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def loaded(folder: Path, network: LlamaForCausalLM) -> Loaded:
    heard: list[float] = []
    loaded = load(options(folder), heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    return loaded


def answer(
    loaded: Loaded,
    *submits: Submit,
    scheduler: Scheduler | None = None,
    ahead: bool = False,
    counters: list[Counters] | None = None,
) -> dict[tuple[int, int], list[Output]]:
    """Every output by (request, choice); by default with a scheduler and a pool of its own."""
    scheduler = scheduler or scheduler_of(loaded)
    answers: dict[tuple[int, int], list[Output]] = {}
    for submit in submits:
        scheduler.add(submit)
    before: Launched | None = None
    while before is not None or scheduler.has_work:
        step = scheduler.schedule()
        launched = None if step is None else loaded.runner.launch(step, before)
        if not ahead:
            before, launched = launched, None
        if before is not None:
            deliveries = scheduler.update(before.step, loaded.runner.collect(before))
            for output in itertools.chain.from_iterable(deliveries.values()):
                answers.setdefault((output.id, output.choice), []).append(output)
        before = launched
    if counters is not None:
        counters.append(scheduler.counters)
    return answers


def scheduler_of(loaded: Loaded) -> Scheduler:
    limits, host = loaded.limits, HostSlots(loaded.num_host_slots)
    return Scheduler(
        BlockPool(loaded.num_blocks, limits.block_size, host=host),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
    )


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def greedy(**fields: object) -> SamplingSettings:
    return SamplingSettings(temperature=0.0, **fields)  # type: ignore[arg-type]


def test_choices_drawn_from_one_row_differ_by_their_settings_alone(loaded: Loaded) -> None:
    settings = [greedy(), greedy(logit_bias={9: 100.0}), SamplingSettings(seed=3), greedy()]
    together = answer(loaded, Submit(1, PROMPT, settings))
    for i, own in enumerate(settings):
        alone = answer(loaded, Submit(1, PROMPT, [own]))
        assert tokens(together[1, i]) == tokens(alone[1, 0])
    assert tokens(together[1, 1]) == [9] * 16


def test_prompt_logprobs_are_the_same_in_slices_and_chunks(
    loaded: Loaded, network: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = Submit(1, PROMPT, [greedy(max_tokens=1)], prompt_logprobs=2)
    whole = answer(loaded, submit)[1, 0][0].prompt_logprobs
    monkeypatch.setattr(runner_module, "HEAD_SLICE", 5)
    sliced = answer(loaded, submit)[1, 0][0].prompt_logprobs
    assert whole is not None
    assert sliced is not None
    assert len(whole) == len(sliced) == len(PROMPT)
    with torch.inference_mode():
        expected = network(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    for i, (one, other) in enumerate(zip(whole[1:], sliced[1:], strict=True)):
        assert isinstance(one, TokenLogprob)
        assert isinstance(other, TokenLogprob)
        assert one.logprob == pytest.approx(expected[i, PROMPT[i + 1]].item(), abs=1e-4)
        assert other.logprob == pytest.approx(one.logprob, abs=1e-5)
        assert one.top_ids == other.top_ids


def test_a_prompt_scored_and_not_continued_needs_no_draw(loaded: Loaded) -> None:
    submit = Submit(1, PROMPT, [greedy(max_tokens=0)], prompt_logprobs=0)
    (output,) = answer(loaded, submit)[1, 0]
    assert (output.tokens, output.finish_reason) == ([], "length")
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(PROMPT)


def test_what_draws_have_in_common_is_forgotten_with_their_sequences(loaded: Loaded) -> None:
    penalised = greedy(repetition_penalty=1.5, frequency_penalty=0.5, max_tokens=12)
    together = answer(loaded, *(Submit(i, PROMPT[i:], [penalised] * 2) for i in range(3)))
    assert all(len(tokens(outputs)) == 12 for outputs in together.values())
    answer(loaded, Submit(9, PROMPT, [greedy(max_tokens=1)]))
    assert loaded.runner.num_kept_choices == 1  # of the step before none is left


def test_a_bad_word_is_barred_only_where_it_would_be_completed(loaded: Loaded) -> None:
    plain = tokens(answer(loaded, Submit(1, PROMPT, [greedy()]))[1, 0])
    whole, start = (plain[2], plain[3]), (plain[3], plain[2])
    barred = tokens(answer(loaded, Submit(1, PROMPT, [greedy(bad_words=(whole,))]))[1, 0])
    assert barred[:3] == plain[:3]
    assert barred[3] != plain[3]
    other = tokens(answer(loaded, Submit(1, PROMPT, [greedy(bad_words=(start,))]))[1, 0])
    assert other[:4] == plain[:4]


def mixed_crowd() -> list[Submit]:
    """Every kind of row beside every other, some of which have to wait for their own last token."""
    own = [
        greedy(max_tokens=20, logprobs=2),
        SamplingSettings(seed=1, max_tokens=25),
        SamplingSettings(seed=2, top_p=0.9, max_tokens=18, min_tokens=6, stop_token_ids=(5, 6, 7)),
        SamplingSettings(seed=3, top_k=5, max_tokens=9, logit_bias={11: 2.0}),
        greedy(max_tokens=12, repetition_penalty=1.3),
    ]
    settings = [[one] for one in own] + [[SamplingSettings(seed=9, choice=i) for i in range(3)]]
    return [Submit(i, PROMPT[i : 60 + i], each) for i, each in enumerate(settings)]


def test_running_ahead_changes_no_token(loaded: Loaded) -> None:
    in_turn, ahead = answer(loaded, *mixed_crowd()), answer(loaded, *mixed_crowd(), ahead=True)
    assert in_turn.keys() == ahead.keys()
    for key, outputs in in_turn.items():
        assert tokens(ahead[key]) == tokens(outputs), key
        assert ahead[key][-1].finish_reason == outputs[-1].finish_reason
        ranks = [
            [logprob.rank for o in own for logprob in o.logprobs or []]
            for own in (outputs, ahead[key])
        ]
        assert ranks[0] == ranks[1]


def test_a_draw_that_a_few_candidates_cannot_settle_is_exact_ahead_too(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device goes on from what the candidates gave: that row must not count."""
    flat = [SamplingSettings(seed=i, top_p=0.97, temperature=2.0, max_tokens=24) for i in range(3)]
    submits = [Submit(i, PROMPT[i:], [one]) for i, one in enumerate([*flat, greedy()])]
    # The compiled sampler settles every draw at once.
    monkeypatch.setattr(loaded.runner._sampler, "_kernel", None)
    expected = answer(loaded, *submits)
    monkeypatch.setattr(sampler_module, "_MANY", 8)
    counters: list[Counters] = []
    found = answer(loaded, *submits, ahead=True, counters=counters)
    assert {key: tokens(own) for key, own in found.items()} == {
        key: tokens(own) for key, own in expected.items()
    }
    assert counters[0].discarded_tokens > 10, "hardly a draw was late: the test shows nothing"


def test_a_step_knows_how_long_it_was_in_the_network(loaded: Loaded) -> None:
    scheduler = Scheduler(
        BlockPool(NUM_BLOCKS, BLOCK), max_num_seqs=4, max_num_batched_tokens=CHUNK, max_model_len=99
    )
    scheduler.add(Submit(1, PROMPT, [greedy()]))
    step = scheduler.schedule()
    assert step is not None
    began = time.perf_counter()
    result = loaded.runner.run(step)
    assert 0 < result.model_seconds < time.perf_counter() - began


def test_a_warm_up_leaves_nothing_behind(loaded: Loaded) -> None:
    before = tokens(answer(loaded, Submit(1, PROMPT, [greedy()]))[1, 0])
    steps = list(warm_up(loaded))
    assert [count for count, _ in steps] == [CHUNK, 1, 8]
    assert tokens(answer(loaded, Submit(1, PROMPT, [greedy()]))[1, 0]) == before


def test_a_device_that_is_not_there_is_a_readable_error() -> None:
    with pytest.raises(ValueError, match="device cuda:63 is not there"):
        choose_device("cuda:63")


# ---- quantized pages


@pytest.fixture(scope="module", params=["fp8", "int8"])
def quantized(request: pytest.FixtureRequest, folder: Path, network: LlamaForCausalLM) -> Loaded:
    return load(options(folder, kv_cache_dtype=request.param), lambda _: None)


def test_quantized_pages_give_about_the_same_logprobs(
    quantized: Loaded, network: LlamaForCausalLM
) -> None:
    name = quantized.facts["kv_cache_dtype"]
    assert quantized.facts["dtype"] == "float32"
    assert name in quantized.facts["attention"] or "bf16" in quantized.facts["attention"]
    submit = Submit(1, PROMPT, [greedy(max_tokens=1)], prompt_logprobs=0)
    known = answer(quantized, submit)[1, 0][0].prompt_logprobs
    assert known is not None
    with torch.inference_mode():
        expected = network(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    moved = [
        abs(one.logprob - expected[i, PROMPT[i + 1]].item())
        for i, one in enumerate(known[1:])
        if one is not None
    ]
    # Weights so wide that nearly every logit depends on one key: bounds of such a network alone.
    assert 0 < sum(moved) / len(moved) < {"fp8": 0.5, "int8": 0.1}[name]


def test_quantized_answers_are_the_same_alone_together_and_from_the_prefix_cache(
    quantized: Loaded,
) -> None:
    submits = [Submit(i, PROMPT[: 70 - 8 * i], [greedy()] * (1 + i % 2)) for i in range(4)]
    together = answer(quantized, *submits, Submit(9, PROMPT, [greedy()]))
    for submit in submits:
        alone = answer(quantized, submit)
        for choice in range(len(submit.settings)):
            assert tokens(together[submit.id, choice]) == tokens(alone[submit.id, 0])
    assert tokens(together[9, 0]) == tokens(together[0, 0])


def test_a_row_that_is_no_number_leaves_none_in_quantized_pages(quantized: Loaded) -> None:
    before = answer(quantized, Submit(1, PROMPT[:3], [greedy()]))[1, 0]
    bad = [*PROMPT[:25], NAN_TOKEN, *PROMPT]
    failed = answer(quantized, Submit(1, bad, [greedy()]))[1, 0]
    assert failed[-1].finish_reason == "error"
    cache = quantized.runner.cache
    for layer in range(len(cache.keys)):
        assert all(
            bool(each.isfinite().all()) for each in cache.read(layer, [1, 2, 3], torch.float32)
        )
    after = answer(quantized, Submit(1, PROMPT[:3], [greedy()]))[1, 0]
    assert tokens(after) == tokens(before)


# ---- host memory


@pytest.mark.parametrize("staged", [None, 2])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "int8"])
def test_a_prompt_from_host_memory_is_continued_as_before(
    folder: Path, network: LlamaForCausalLM, kv_cache_dtype: str, staged: int | None
) -> None:
    """Seven pages for prompts of three: each makes room for the next, and comes back."""
    wanted = options(folder, kv_cache_dtype=kv_cache_dtype, host_cache_memory=1 << 20)
    cramped = msgspec.structs.replace(wanted, num_kv_blocks=8, max_model_len=200)
    loaded = load(cramped, lambda _: None)
    assert loaded.num_host_slots > 20
    if staged:  # the way pages take on CUDA
        loaded.runner.host = HostCache(loaded.runner.cache, loaded.num_host_slots, staged)
    scheduler = scheduler_of(loaded)
    prompts = [[(7 * i + shift) % 150 + 3 for i in range(90)] for shift in range(0, 40, 8)]
    first, again = (
        [
            answer(loaded, Submit(i, prompt, [greedy(logprobs=0)]), scheduler=scheduler)[i, 0]
            for i, prompt in enumerate(prompts)
        ]
        for _ in range(2)
    )
    assert [outputs[0].cached_tokens for outputs in first] == [0] * 5
    assert all((outputs[0].cached_tokens or 0) >= 64 for outputs in again)
    assert [tokens(outputs) for outputs in again] == [tokens(outputs) for outputs in first]
    for one, other in zip(first, again, strict=True):
        known, found = (each[0].logprobs for each in (one, other))
        assert known is not None
        assert found is not None
        assert found[0].logprob == pytest.approx(known[0].logprob, abs=1e-4)
    counters = scheduler.counters
    assert counters.host_hits >= 4 * 64
    assert counters.host_loads >= 8
    scheduler.pool.check()
