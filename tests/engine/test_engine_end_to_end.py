"""The whole engine in its own process, with a real network: it says what transformers says."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import LlamaForCausalLM

from service.engine.client import EngineClient
from service.engine.link import connect
from service.engine.messages import Output, SamplingSettings, State, Submit, TokenLogprob
from service.engine.options import SOCKET_FOLDER_PREFIX, EngineOptions
from service.engine.supervisor import Patience
from service.errors import ContextLengthExceeded, EngineFailure, EngineLost, Overloaded, Unavailable
from tests.engine.checkpoints import NAN_TOKEN, write_tiny_llama

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLOCK = 32
CHUNK = 48  # tokens a step: prompts are cut
LIMITS = {"block_size": BLOCK, "max_num_batched_tokens": CHUNK, "threads": 1, "log_level": "error"}


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Output | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int | None = None

    def take(self, output: Output) -> None:
        self.tokens += output.tokens
        self.logprobs += output.logprobs or []
        self.last = output
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.cached_tokens is not None:
            self.cached_tokens = output.cached_tokens


@pytest.fixture(scope="module")
def temporary_folder() -> Iterator[Path]:
    """Short: a Unix socket's path has 108 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="e2e-"))
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    yield folder
    tempfile.tempdir = before
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def network(temporary_folder: Path) -> Iterator[LlamaForCausalLM]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that a second thread costs more than it brings
    yield write_tiny_llama(temporary_folder / "model")
    torch.set_num_threads(before)


def sockets(folder: Path) -> list[Path]:
    """Of the engines running, the eldest first."""
    found = folder.glob(f"{SOCKET_FOLDER_PREFIX}*/engine.sock")
    return sorted(found, key=lambda path: path.stat().st_mtime)


@asynccontextmanager
async def serving(folder: Path, **limits: object) -> AsyncIterator[EngineClient]:
    options = EngineOptions(model=str(folder / "model"), socket="", **{**LIMITS, **limits})  # type: ignore[arg-type]
    client = EngineClient(options, patience=Patience(restart_delay=0.05))
    await client.start()
    try:
        await client.wait_ready()
        yield client
    finally:
        await client.stop()


@pytest.fixture(scope="module", params=[False, True], ids=["in_turn", "ahead"])
def ahead(request: pytest.FixtureRequest) -> bool:
    """Whether a step is launched before the one before it is collected: nobody can tell."""
    return bool(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    temporary_folder: Path, network: LlamaForCausalLM, ahead: bool
) -> AsyncIterator[EngineClient]:
    async with serving(temporary_folder, async_scheduling=ahead) as client:
        yield client
    assert not sockets(temporary_folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cramped(
    temporary_folder: Path, network: LlamaForCausalLM, ahead: bool
) -> AsyncIterator[EngineClient]:
    """Room for two or three of the longest sequences: the others are preempted."""
    bounds = {"num_kv_blocks": 13, "max_num_seqs": 8, "max_queued_requests": 4}
    async with serving(temporary_folder, **bounds, async_scheduling=ahead) as client:
        yield client


async def ask(
    engine: EngineClient,
    prompt: list[int],
    settings: Sequence[SamplingSettings],
    **fields: object,
) -> list[Answer]:
    answers = [Answer() for _ in settings]
    async with engine.submit(prompt, settings, **fields) as generation:  # type: ignore[arg-type]
        async for output in generation:
            answers[output.choice].take(output)
    return answers


def greedy(max_tokens: int = 24, **fields: object) -> list[SamplingSettings]:
    return [SamplingSettings(max_tokens=max_tokens, temperature=0.0, **fields)]  # type: ignore[arg-type]


def drawn(seed: int, max_tokens: int = 24, choice: int = 0) -> SamplingSettings:
    return SamplingSettings(max_tokens=max_tokens, seed=seed, choice=choice, top_p=0.95)


def prompt_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, NAN_TOKEN, (length,), generator=generator).tolist()


def generated(network: LlamaForCausalLM, prompt: list[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return whole[0, len(prompt) :].tolist()


async def until(condition: Callable[[], object], within: float = 10.0) -> None:
    give_up = time.monotonic() + within
    while not condition():
        assert time.monotonic() < give_up, "did not come to pass"
        await asyncio.sleep(0.01)


def is_empty(state: State) -> bool:
    return (state.running, state.waiting, state.free_blocks) == (0, 0, state.num_blocks)


# ---- what it says


async def test_greedy_is_the_same_alone_among_31_and_in_transformers(
    engine: EngineClient, network: LlamaForCausalLM
) -> None:
    prompts = [prompt_of(1 + 5 * i, seed=i) for i in range(32)]
    expected = [generated(network, prompt, 24) for prompt in prompts]
    together = await asyncio.gather(*(ask(engine, prompt, greedy()) for prompt in prompts))
    assert [answers[0].tokens for answers in together] == expected
    for i in (0, 7, 31):
        alone = await ask(engine, prompts[i], greedy(), namespace=b"alone")
        assert (alone[0].tokens, alone[0].cached_tokens) == (expected[i], 0)


async def test_a_cached_prefix_changes_nothing_but_the_work(
    engine: EngineClient, network: LlamaForCausalLM
) -> None:
    prompt = prompt_of(100, seed=50)
    first = await ask(engine, prompt, greedy(40), namespace=b"prefix")
    longer = [*prompt, *first[0].tokens, 17, 18]
    second = await ask(engine, longer, greedy(20), namespace=b"prefix")
    assert second[0].cached_tokens is not None
    assert second[0].cached_tokens >= 128
    assert second[0].tokens == generated(network, longer, 20)


async def test_choices_are_forks_of_one_prompt_and_equal_those_drawn_alone(
    engine: EngineClient,
) -> None:
    prompt = prompt_of(70, seed=60)
    settings = [drawn(5, choice=i) for i in range(3)]
    forked = await ask(engine, prompt, settings, namespace=b"forks")
    assert len({tuple(answer.tokens) for answer in forked}) == 3
    for setting, answer in zip(settings, forked, strict=True):
        alone = await ask(engine, prompt, [setting], namespace=bytes([setting.choice]))
        assert alone[0].tokens == answer.tokens


async def test_draws_are_the_same_alone_in_a_crowd_and_after_preemption(
    engine: EngineClient, cramped: EngineClient
) -> None:
    prompts = [prompt_of(60, seed=70 + i) for i in range(6)]
    settings = [drawn(seed=i, max_tokens=90) for i in range(6)]
    alone = [
        (await ask(engine, prompt, [setting], namespace=b"seeds"))[0].tokens
        for prompt, setting in zip(prompts, settings, strict=True)
    ]
    crowd = await asyncio.gather(
        *(ask(cramped, p, [s]) for p, s in zip(prompts, settings, strict=True))
    )
    assert [answers[0].tokens for answers in crowd] == alone
    await until(lambda: is_empty(cramped.state))
    assert cramped.state.counters["preemptions"] > 0


async def test_logprobs_of_prompt_and_answer_are_transformers(
    engine: EngineClient, network: LlamaForCausalLM
) -> None:
    prompt = prompt_of(110, seed=80)
    (answer,) = await ask(engine, prompt, greedy(4, logprobs=2), prompt_logprobs=3)
    with torch.inference_mode():
        logits = network(torch.tensor([prompt + answer.tokens])).logits[0]
    expected = logits.float().log_softmax(-1)
    assert answer.prompt_logprobs is not None
    assert answer.prompt_logprobs[0] is None
    known = [*answer.prompt_logprobs[1:], *answer.logprobs]
    for i, (token, found) in enumerate(zip((prompt + answer.tokens)[1:], known, strict=True)):
        assert found is not None
        assert found.logprob == pytest.approx(expected[i, token].item(), abs=1e-4)
        assert found.rank == 1 + int((logits[i] > logits[i, token]).sum())
        wanted = 3 if i < len(prompt) - 1 else 2
        assert found.top_ids == expected[i].topk(wanted).indices.tolist()


async def test_penalties_bans_and_limits_reach_the_sampler(engine: EngineClient) -> None:
    prompt = prompt_of(20, seed=90)
    plain = (await ask(engine, prompt, greedy(6)))[0].tokens
    biased = await ask(engine, prompt, greedy(3, logit_bias={42: 100.0}))
    assert biased[0].tokens == [42, 42, 42]
    allowed = await ask(engine, prompt, greedy(4, allowed_token_ids=(5, 6), presence_penalty=100.0))
    assert sorted(allowed[0].tokens[:2]) == [5, 6]
    barred = await ask(engine, prompt, greedy(6, bad_words=((plain[0], plain[1]),)))
    assert barred[0].tokens[0] == plain[0]
    assert barred[0].tokens[1] != plain[1]
    stopped = await ask(engine, prompt, greedy(6, stop_token_ids=(plain[1],)))
    assert stopped[0].last is not None
    assert (stopped[0].tokens, stopped[0].last.stop_reason) == (plain[:2], plain[1])
    later = await ask(engine, prompt, greedy(6, stop_token_ids=(plain[1],), min_tokens=4))
    assert len(later[0].tokens) >= 4
    assert plain[1] not in later[0].tokens[:4]


async def test_a_row_that_is_not_finite_fails_alone(
    engine: EngineClient, network: LlamaForCausalLM
) -> None:
    bad, good = [*prompt_of(25, seed=94), NAN_TOKEN, *range(3, 80)], prompt_of(40, seed=95)
    answers = await asyncio.gather(*(ask(engine, prompt, greedy()) for prompt in (bad, good, bad)))
    once_more = await ask(engine, bad, greedy())
    for failed in (answers[0][0], answers[2][0], once_more[0]):
        assert failed.last is not None
        assert (failed.last.finish_reason, failed.cached_tokens) == ("error", 0)
    assert answers[1][0].tokens == generated(network, good, 24)
    short = good[:3]  # less than a page: what the page held before lies behind it
    after = await asyncio.gather(*(ask(engine, p, greedy(9)) for p in (short, short, good)))
    assert [own[0].tokens for own in after[:2]] == [generated(network, short, 9)] * 2


# ---- who leaves, and who may not come


async def test_leaving_frees_the_blocks_at_once(engine: EngineClient) -> None:
    async with engine.submit(prompt_of(40, seed=1), greedy(400)) as generation:
        await anext(generation)
        await until(lambda: engine.state.running == 1)
        assert engine.state.free_blocks < engine.state.num_blocks
    began = time.monotonic()
    await until(lambda: is_empty(engine.state))
    assert time.monotonic() - began < 0.5


async def test_a_lost_connection_frees_what_it_owned(
    engine: EngineClient, temporary_folder: Path
) -> None:
    path = sockets(temporary_folder)[0]
    heard: list[object] = []
    link = await connect(str(path), heard.append)
    assert link is not None
    link.send(Submit(1, prompt_of(40, seed=2), greedy(400)))
    await until(lambda: engine.state.running == 1)
    link.close()
    await until(lambda: is_empty(engine.state))


async def test_a_deadline_gives_the_partial_answer(engine: EngineClient) -> None:
    (answer,) = await ask(engine, prompt_of(5, seed=3), greedy(480), deadline=0.1)
    assert answer.last is not None
    assert (answer.last.finish_reason, answer.last.stop_reason) == ("length", "deadline")
    assert 0 < len(answer.tokens) < 480


async def test_what_can_never_fit_and_what_does_not_fit_now_are_told_apart(
    cramped: EngineClient,
) -> None:
    with pytest.raises(ContextLengthExceeded):
        await ask(cramped, prompt_of(500, seed=4), greedy(100))
    tasks = [ask(cramped, prompt_of(30, seed=i), greedy(60)) for i in range(30)]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, Overloaded)]
    assert refused
    assert all((error.retry_after or 0) >= 1 for error in refused)
    served = [answer for answer in answers if isinstance(answer, list)]
    assert len(served) + len(refused) == 30
    assert all(len(answer[0].tokens) == 60 for answer in served)


async def test_a_storm_leaves_nothing_behind(engine: EngineClient) -> None:
    async def hang_up_early(i: int) -> None:
        async with engine.submit(prompt_of(20 + i, seed=i), [drawn(i, 300)] * (1 + i % 3)) as own:
            for _ in range(i % 4):
                await anext(own)

    await asyncio.gather(*(hang_up_early(i) for i in range(100)))
    await until(lambda: is_empty(engine.state))
    assert engine.num_unfinished == 0


# ---- life


async def test_a_killed_engine_is_replaced_and_nobody_waits_for_it(
    temporary_folder: Path, network: LlamaForCausalLM
) -> None:
    cpu = min(os.sched_getaffinity(0))
    async with serving(temporary_folder, cpus=(cpu,)) as engine:
        prompt = prompt_of(30, seed=9)
        waiting = [asyncio.create_task(ask(engine, prompt, greedy(450))) for _ in range(4)]
        await until(lambda: engine.state.running == 4)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(answer) for answer in answers] == [EngineLost] * 4
        with pytest.raises(Unavailable):
            await ask(engine, prompt, greedy())
        await engine.wait_ready()
        assert (await ask(engine, prompt, greedy()))[0].tokens == generated(network, prompt, 24)
        assert engine.num_restarts == 1
        assert os.sched_getaffinity(engine.pid) == {cpu}, "held to its cores, also when replaced"
        await engine.drain()
        with pytest.raises(Unavailable) as refusal:
            await ask(engine, prompt, greedy())
        assert refusal.value.code == "draining"


async def test_a_damaged_checkpoint_is_a_reason_and_not_a_hang(
    temporary_folder: Path, network: LlamaForCausalLM
) -> None:
    damaged = temporary_folder / "damaged"
    shutil.copytree(temporary_folder / "model", damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    client = EngineClient(EngineOptions(model=str(damaged), socket="", log_level="critical"))
    await client.start()
    with pytest.raises(EngineFailure) as failure:
        await client.wait_ready()
    assert "model.safetensors" in failure.value.message
    assert (client.state.stage, client.num_restarts) == ("failed", 0)
    await client.stop()
