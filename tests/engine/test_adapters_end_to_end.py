"""Adapters in a real engine process: each answer is the one its merged network gives alone."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Tokens
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from service.engine import runner as runner_module
from service.engine.client import EngineClient
from service.engine.messages import Output, SamplingSettings, Submit
from service.engine.options import EngineOptions
from service.engine.sequence import Request, Sequence
from service.engine.step import Row
from service.engine.supervisor import Patience
from service.errors import EngineFailure, InvalidRequest, ModelNotFound, NotFound
from tests.engine.checkpoints import write_tiny_llama
from tests.model.peft_folders import ALL, merged, random_adapter, tensors_of, write_folder
from tests.model.sequences import reference_greedy

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMITS = {"block_size": 32, "max_num_batched_tokens": 48, "threads": 1, "log_level": "error"}
PROMPT = [5, 17, 101, 44, 9, 23, 8, 61, 140, 77]


@dataclass
class Zoo:
    """A base model and adapters a, b, c on disk, with the networks they mean."""

    folder: Path
    networks: dict[str, PreTrainedModel]

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def answer(self, name: str, prompt: Tokens[int] = PROMPT, count: int = 20) -> list[int]:
        return reference_greedy(self.networks[name], list(prompt), count)


@pytest.fixture(scope="module")
def zoo() -> Iterator[Zoo]:
    folder = Path(tempfile.mkdtemp(prefix="lora-"))  # short: a Unix socket's path has 108 bytes
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    network: LlamaForCausalLM = write_tiny_llama(folder / "model")
    networks: dict[str, PreTrainedModel] = {"": network}
    for seed, (name, targets) in enumerate({"a": ALL, "b": ("q_proj", "v_proj"), "c": ALL}.items()):
        adapter = random_adapter(network, targets, seed=seed)
        write_folder(folder / name, tensors_of(adapter), target_modules=list(targets))
        networks[name] = merged(network, adapter, 2.0)
    yield Zoo(folder, networks)
    torch.set_num_threads(threads)
    tempfile.tempdir = before
    shutil.rmtree(folder)


@asynccontextmanager
async def serving(zoo: Zoo, names: str = "ab", **limits: object) -> AsyncIterator[EngineClient]:
    given: dict[str, object] = {"max_loras": 2, "max_lora_rank": 8, "max_cpu_loras": 4}
    adapters = {name: zoo.path(name) for name in names}
    options = EngineOptions(
        model=zoo.path("model"),
        socket="",
        adapters=adapters,
        **{**LIMITS, **given, **limits},  # type: ignore[arg-type]
    )
    client = EngineClient(options, patience=Patience(restart_delay=0.05))
    await client.start()
    try:
        await client.wait_ready()
        yield client
    finally:
        await client.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(zoo: Zoo) -> AsyncIterator[EngineClient]:
    async with serving(zoo) as client:
        yield client


async def ask(
    engine: EngineClient, name: str = "", prompt: Tokens[int] = PROMPT, count: int = 20
) -> tuple[list[int], Output]:
    tokens: list[int] = []
    settings = [SamplingSettings(max_tokens=count, temperature=0.0)]
    version = engine.state.adapters[name] if name else 0
    asked = engine.submit(list(prompt), settings, adapter=name, adapter_version=version)
    first = None
    async with asked as generation:
        async for output in generation:
            first = first or output
            tokens += output.tokens
    assert first is not None
    return tokens, first


async def text(engine: EngineClient, name: str = "", **fields: object) -> list[int]:
    return (await ask(engine, name, **fields))[0]  # type: ignore[arg-type]


async def test_adapters_and_base_together_say_what_each_says_alone(
    engine: EngineClient, zoo: Zoo
) -> None:
    """More adapters than slots, prompts longer than a step, twice over: the cache is in play."""
    await engine.load_adapter("c", zoo.path("c"))
    long = [3 + i % 150 for i in range(90)]
    names = ["a", "b", "", "a", "c", "b", "", "c"]
    for _ in range(2):
        short_answers = [text(engine, name) for name in names]
        long_answers = [text(engine, name, prompt=long, count=9) for name in names]
        found = await asyncio.gather(*short_answers, *long_answers)
        assert found[: len(names)] == [zoo.answer(name) for name in names]
        assert found[len(names) :] == [zoo.answer(name, long, 9) for name in names]
    assert len({tuple(zoo.answer(name)) for name in ("", "a", "b", "c")}) == 4
    await engine.unload_adapter("c")


async def test_a_prefix_is_not_shared_across_adapters_or_loadings(
    engine: EngineClient, zoo: Zoo
) -> None:
    prompt = [7 + i % 99 for i in range(70)]
    await ask(engine, "a", prompt)
    assert (await ask(engine, "b", prompt))[1].cached_tokens == 0
    assert (await ask(engine, "", prompt))[1].cached_tokens == 0
    assert (await ask(engine, "a", prompt))[1].cached_tokens == 64
    await engine.load_adapter("a", zoo.path("a"))
    assert (await ask(engine, "a", prompt))[1].cached_tokens == 0


async def test_unloading_lets_running_answers_finish(engine: EngineClient, zoo: Zoo) -> None:
    await engine.load_adapter("x", zoo.path("c"))
    version = engine.state.adapters["x"]
    settings = [SamplingSettings(max_tokens=300, temperature=0.0, min_tokens=300)]
    tokens: list[int] = []
    asked = engine.submit(PROMPT, settings, adapter="x", adapter_version=version)
    async with asked as generation:
        tokens += (await anext(generation)).tokens
        await engine.unload_adapter("x")
        assert "x" not in engine.state.adapters
        async for output in generation:
            tokens += output.tokens
    assert tokens == zoo.answer("c", count=300)
    with pytest.raises(ModelNotFound):
        async with engine.submit(PROMPT, settings, adapter="x", adapter_version=version):
            pass
    with pytest.raises(NotFound):
        await engine.unload_adapter("x")


async def test_one_of_a_name_may_be_replaced_while_it_answers(
    engine: EngineClient, zoo: Zoo
) -> None:
    await engine.load_adapter("y", zoo.path("a"))
    old = asyncio.create_task(text(engine, "y", count=200))
    await asyncio.sleep(0.02)
    await engine.load_adapter("y", zoo.path("c"))
    assert await text(engine, "y") == zoo.answer("c")
    assert await old == zoo.answer("a", count=200)
    await engine.unload_adapter("y")


async def test_what_cannot_be_served_is_refused_and_changes_nothing(
    engine: EngineClient, zoo: Zoo
) -> None:
    before, bad = engine.state.adapters, zoo.folder / "bad"
    bad.mkdir()
    with pytest.raises(NotFound, match="holds no adapter_config"):
        await engine.load_adapter("bad", str(bad))
    (bad / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(InvalidRequest, match="IA3"):
        await engine.load_adapter("bad", str(bad))
    await engine.load_adapter("c", zoo.path("c"))
    await engine.load_adapter("d", zoo.path("c"))
    with pytest.raises(InvalidRequest, match="at most 4"):
        await engine.load_adapter("e", zoo.path("c"))
    await engine.unload_adapter("c")
    await engine.unload_adapter("d")
    assert engine.state.adapters == before
    assert await text(engine, "b") == zoo.answer("b")


async def test_a_restarted_engine_has_what_was_loaded(zoo: Zoo) -> None:
    gone = shutil.copytree(zoo.path("c"), zoo.folder / "gone")
    async with serving(zoo) as engine:
        await engine.load_adapter("c", zoo.path("c"))
        await engine.load_adapter("gone", str(gone))
        await engine.unload_adapter("b")
        shutil.rmtree(gone)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while engine.is_ready:  # noqa: ASYNC110 (the stage it leaves has no event)
                await asyncio.sleep(0.02)
            await engine.wait_ready()
        assert set(engine.state.adapters) == {"a", "c"}
        assert await text(engine, "c") == zoo.answer("c")
        assert await text(engine, "a") == zoo.answer("a")


async def test_a_bad_adapter_at_the_start_ends_it_with_its_name(zoo: Zoo) -> None:
    write_folder(zoo.folder / "empty", {})
    options = EngineOptions(
        model=zoo.path("model"),
        socket="",
        adapters={"empty": zoo.path("empty")},
        **LIMITS,  # type: ignore[arg-type]
        max_loras=1,
    )
    client = EngineClient(options)
    await client.start()
    with pytest.raises(EngineFailure, match=r"adapter empty: .*holds no tensor"):
        await client.wait_ready()
    await client.stop()


async def test_guesses_are_checked_with_the_adapter_they_are_made_for(zoo: Zoo) -> None:
    prompt = [*PROMPT, *PROMPT, *PROMPT]
    async with serving(zoo, num_speculative_tokens=4) as engine:
        settings = [
            SamplingSettings(
                max_tokens=40,
                temperature=0.0,
                speculative_method="ngram",
                num_speculative_tokens=4,
            )
        ]

        async def guess(name: str) -> list[int]:
            version = engine.state.adapters.get(name, 0)
            tokens: list[int] = []
            asked = engine.submit(prompt, settings, adapter=name, adapter_version=version)
            async with asked as generation:
                async for output in generation:
                    tokens += output.tokens
            return tokens

        found = await asyncio.gather(*(guess(name) for name in ("a", "", "b", "a")))
    assert found == [zoo.answer(name, prompt, 40) for name in ("a", "", "b", "a")]


async def test_guessed_tokens_go_through_the_adapter_of_their_row() -> None:
    submit = Submit(1, PROMPT, [SamplingSettings()], adapter="a", adapter_version=1)
    sequence = Sequence.start(Request(submit, 0, 0, 0.0))
    row = Row(sequence, 9, 1, choices=sequence.choices, adapter=3, proposed=[7, 8])
    assert [own.adapter for own in runner_module._batch_rows(row)] == [3, 3, 3]


async def test_a_server_without_adapters_loads_none(zoo: Zoo) -> None:
    async with serving(zoo, "", max_loras=0) as engine:
        with pytest.raises(InvalidRequest, match="without adapters"):
            await engine.load_adapter("a", zoo.path("a"))
