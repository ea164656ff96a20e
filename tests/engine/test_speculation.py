"""Guessing ahead: what is proposed, when it pays, and that no text ever changes by it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec.structs import replace

from model.sampling_row import SamplingRow
from service.engine import lookup as lookup_module
from service.engine.blocks import BlockPool
from service.engine.costs import StepCosts
from service.engine.loading import Loaded, load, measure_costs
from service.engine.lookup import PromptLookup
from service.engine.messages import Output, SamplingSettings, Submit, TokenLogprob
from service.engine.options import EngineOptions
from service.engine.scheduler import Scheduler
from service.engine.speculation import SpeculationLimits
from service.engine.step import Draw, Step, agreed
from tests.engine.checkpoints import NAN_TOKEN, write_tiny_llama
from tests.engine.recording_runner import RecordingRunner, expected_text

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 32
MAX_MODEL_LEN = 200
LIMITS = SpeculationLimits(most=8, most_in_step=64, has_draft=True)


# ---- prompt lookup


def proposed(tokens: list[int], count: int, least: int = 2, most: int = 4) -> list[int]:
    return PromptLookup(least, most).propose(tokens, count)


def test_lookup_proposes_what_followed_the_longest_ending() -> None:
    text = [1, 2, 3, 4, 50, 9, 3, 4, 60, 8, 2, 3, 4]
    assert proposed(text, 2) == [50, 9], "three tokens agree there, two at the newer place"
    assert proposed(text, 1, most=2) == [60], "of equals the newest"
    assert proposed([1, 2, 3], 4) == []
    assert proposed([1], 4) == []


def test_lookup_goes_on_with_a_loop_as_it_went() -> None:
    assert proposed([7, 1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert proposed([7, 5, 5, 5], 3) == [5, 5, 5]


def test_lookup_by_steps_finds_what_it_finds_at_once() -> None:
    dice = random.Random(1)
    for _ in range(50):
        text = [dice.randrange(4) for _ in range(60)]
        growing = PromptLookup(2, 4)
        for length in range(61):
            assert growing.propose(text[:length], 3) == proposed(text[:length], 3)


def test_lookup_reads_a_long_prompt_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_module, "CATCH_UP", 10)
    growing, text = PromptLookup(2, 4), [1, 2, 3] * 10
    found = [growing.propose(text, 2) for _ in range(4)]
    assert found == [[], [], [1, 2], [1, 2]]


def test_draws_count_up_to_the_first_that_was_not_proposed() -> None:
    draws = [Draw(token) for token in (5, 6, 7)]
    assert agreed([5, 6], draws) == draws
    assert agreed([5, 9], draws) == draws[:2]
    assert agreed([9, 6], draws) == draws[:1]
    assert agreed([5, 6], []) == []


# ---- what pays


def test_costs_are_lines_between_what_was_measured() -> None:
    costs = StepCosts()
    assert costs.seconds(1) == costs.seconds(64), "nothing known: rows are free"
    costs.start([(1, 0.010), (8, 0.017), (32, 0.041)])
    assert costs.seconds(1) == pytest.approx(0.010)
    assert costs.seconds(16) == pytest.approx(0.025)
    assert costs.seconds(128) == pytest.approx(4 * 0.041)
    for _ in range(60):
        costs.observe(16, 0.050)
    assert costs.seconds(16) == pytest.approx(0.050, rel=0.01)
    assert costs.seconds(8) <= costs.seconds(16) <= costs.seconds(32)


def test_a_size_that_was_expensive_once_is_tried_again() -> None:
    """A hiccup of the machine while it was measured does not forbid guesses for ever."""
    bench = Bench(costs((1, 0.010), (64, 0.011)))
    bench.scheduler._speculator.costs = costs((1, 0.010), (2, 0.025))
    own = SamplingSettings(max_tokens=180, speculative_method="draft", num_speculative_tokens=8)
    for i in range(8):
        bench.run([Submit(i, [7, 8, 9], [replace(own, seed=i)])])
        if i == 0:
            assert bench.scheduler.counters.spec_draft_tokens == 0
    assert bench.scheduler.counters.spec_drafts > 10


@dataclass
class Bench:
    """A scheduler over a runner whose steps take the time their rows cost."""

    seconds_of: StepCosts
    draft_pass: float = 0.0
    limits: SpeculationLimits = LIMITS
    now: float = 0.0
    outputs: dict[int, list[Output]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pool = BlockPool(400, BLOCK)
        self.scheduler = Scheduler(
            pool,
            max_num_seqs=32,
            max_num_batched_tokens=512,
            max_model_len=MAX_MODEL_LEN,
            clock=lambda: self.now,
            speculation=self.limits,
            costs=(self.seconds_of, StepCosts()),
        )
        self.runner = RecordingRunner(pool)

    def run(self, submits: list[Submit]) -> None:
        for submit in submits:
            self.scheduler.add(submit)
        while (step := self.scheduler.schedule()) is not None:
            result = self.runner.run(step)
            widest = max(len(row.proposed) for row in step.rows)
            result.draft_passes = [(len(step.rows), self.draft_pass)] * widest
            self.now += widest * self.draft_pass + self.seconds_of.seconds(
                sum(1 + len(row.proposed) for row in step.rows)
            )
            for outputs in self.scheduler.update(step, result).values():
                for output in outputs:
                    self.outputs.setdefault(output.id, []).append(output)


def drafted(count: int, **settings: object) -> list[Submit]:
    own = SamplingSettings(
        max_tokens=60,
        speculative_method="draft",
        num_speculative_tokens=8,
        **settings,  # type: ignore[arg-type]
    )
    return [Submit(i, [7, 8, 9 + i], [replace(own, seed=i)]) for i in range(count)]


def costs(*measured: tuple[int, float]) -> StepCosts:
    made = StepCosts()
    made.start(list(measured))
    return made


def test_guesses_are_made_where_rows_are_nearly_free() -> None:
    bench = Bench(costs((1, 0.010), (64, 0.011)))
    bench.run(drafted(2))
    counters = bench.scheduler.counters
    assert counters.spec_accepted_tokens > 60
    assert bench.now < 0.010 * 60, "faster than a token a step"


def test_no_guess_is_made_where_every_row_costs_as_much_as_the_first() -> None:
    bench = Bench(costs((1, 0.001), (64, 0.064)))
    bench.run(drafted(8))
    assert bench.scheduler.counters.spec_draft_tokens == 0


def test_a_large_batch_turns_down_what_a_small_one_gains_by() -> None:
    """Up to 16 rows are bound by memory, past it by computing."""
    few, many = (
        Bench(costs((1, 0.010), (16, 0.012), (32, 0.024), (64, 0.048)), 0.0) for _ in range(2)
    )
    few.run(drafted(2))
    many.run(drafted(32))
    assert few.scheduler.counters.spec_draft_tokens > 60
    # The last sequences alone may be guessed for again: while all run none is.
    assert many.scheduler.counters.spec_draft_tokens < 32 * 60 * 0.05


def test_a_slow_draft_model_is_not_asked_for_long() -> None:
    bench = Bench(costs((1, 0.010), (64, 0.011)), draft_pass=0.020)
    bench.run(drafted(2))
    assert bench.scheduler.counters.spec_draft_tokens <= 2 * 8, "one step tells what it costs"


def test_poor_guesses_are_made_less_and_less() -> None:
    """The texts of the recording runner are random: what prompt lookup finds there is wrong."""
    bench = Bench(costs((1, 0.010), (64, 0.060)))
    own = SamplingSettings(
        max_tokens=150, speculative_method="ngram", num_speculative_tokens=8, seed=1
    )
    submits = [Submit(i, [i % 5, 4] * 10, [replace(own, seed=i)]) for i in range(4)]
    bench.run(submits)
    counters = bench.scheduler.counters
    assert 0 < counters.spec_draft_tokens < 0.2 * counters.generation_tokens
    for submit in submits:
        said = [token for output in bench.outputs[submit.id] for token in output.tokens]
        assert said == expected_text(submit, 0, MAX_MODEL_LEN)


def test_no_token_is_proposed_past_the_end_of_budget_and_context() -> None:
    bench = Bench(StepCosts())
    schedule = bench.scheduler.schedule

    def watched() -> object:
        step = schedule()
        for row in step.rows if step is not None else ():
            sequence = row.sequence
            last = sequence.num_output + row.num_ahead + 1
            assert not row.num_ahead or last <= sequence.settings.max_tokens
            assert row.end + row.num_ahead < MAX_MODEL_LEN
        return step

    bench.scheduler.schedule = watched  # type: ignore[method-assign,assignment]
    bench.run(
        [*drafted(3), Submit(9, [5] * 190, [replace(drafted(1)[0].settings[0], max_tokens=10)])]
    )
    assert bench.scheduler.counters.spec_draft_tokens > 0


# ---- real networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    write_tiny_llama(folder, seed=8)
    return folder


def loaded(folder: Path, draft: Path | None = None, blocks: int = 60) -> Loaded:
    options = EngineOptions(
        model=str(folder),
        socket="",
        device="cpu",
        threads=1,
        block_size=BLOCK,
        num_kv_blocks=blocks,
        max_num_batched_tokens=96,
        max_num_seqs=8,
        speculative_model=None if draft is None else str(draft),
        num_speculative_tokens=6,
    )
    return load(options, lambda _: None)


@dataclass
class Said:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Output | None = None

    @property
    def ending(self) -> tuple[object, ...]:
        assert self.last is not None
        return self.last.finish_reason, self.last.stop_reason, self.last.error


def answer(
    loaded: Loaded, submits: list[Submit], method: str
) -> tuple[dict[object, Said], Scheduler]:
    limits = loaded.limits
    scheduler = Scheduler(
        BlockPool(loaded.num_blocks, limits.block_size),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        speculation=SpeculationLimits(6, limits.max_proposed, has_draft=True),
        clock=lambda: 0.0,  # nothing is learned of time: guesses are always made
    )
    said: dict[object, Said] = {}
    for submit in submits:
        settings = [
            replace(own, choice=i, speculative_method=method, num_speculative_tokens=6)
            for i, own in enumerate(submit.settings)
        ]
        scheduler.add(replace(submit, settings=settings))
    while (step := scheduler.schedule()) is not None:
        for outputs in scheduler.update(step, loaded.runner.run(step)).values():
            for output in outputs:
                own = said.setdefault((output.id, output.choice), Said())
                own.tokens += output.tokens
                own.logprobs += output.logprobs or []
                own.last = output
        scheduler.pool.check()
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    return said, scheduler


LOOPING = [5, 6, 7, 8, 9] * 8
PLAIN = [(7 * i) % 150 + 3 for i in range(70)]
LONG = {"max_tokens": 40}
SAMPLED = {"temperature": 0.7, "seed": 3, **LONG}
SETTINGS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0, **LONG},
    "sampled": SAMPLED,
    "filtered": {**SAMPLED, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "cold": {**SAMPLED, "temperature": 0.1},
    "penalties": {
        **SAMPLED,
        "temperature": 0.2,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.3,
    },
    "bias": {"temperature": 0.0, "logit_bias": {9: 6.0, 12: 6.0}, **LONG},
    "few": {**SAMPLED, "allowed_token_ids": (5, 6, 7)},
    "logprobs": {"temperature": 0.0, "logprobs": 3, **LONG},
    "ends": {**SAMPLED, "allowed_token_ids": (5, 6, 2), "eos_token_ids": (2,), "min_tokens": 9},
    "stops": {**SAMPLED, "allowed_token_ids": (5, 6, 7), "stop_token_ids": (7,)},
    "bad words": {**SAMPLED, "allowed_token_ids": (5, 6, 7), "bad_words": ((5, 6), (7, 7, 5))},
    "short": {"temperature": 0.0, "max_tokens": 3},
}


def submits() -> list[Submit]:
    made = []
    for i, settings in enumerate(SETTINGS.values()):
        own = SamplingSettings(**settings)  # type: ignore[arg-type]
        choices = [own] * (3 if i % 4 == 1 else 1)
        made.append(Submit(i, LOOPING if i % 2 else PLAIN[: 10 + 5 * i], choices))
    return made


def assert_same(one: dict[object, Said], other: dict[object, Said]) -> None:
    assert one.keys() == other.keys()
    for key, said in one.items():
        assert said.tokens == other[key].tokens, key
        assert said.ending == other[key].ending, key
        assert len(said.logprobs) == len(other[key].logprobs)
        for mine, theirs in zip(said.logprobs, other[key].logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert mine.top_ids == theirs.top_ids


@pytest.mark.parametrize("blocks", [60, 14])
@pytest.mark.parametrize("method", ["ngram", "draft", "own draft"])
def test_texts_are_the_same_with_and_without(
    folder: Path, other: Path, method: str, blocks: int
) -> None:
    """All settings at once, in a pool that is large enough and in one that preempts."""
    draft = {"ngram": None, "draft": other, "own draft": folder}[method]
    engine = loaded(folder, draft, blocks)
    plain, calm = answer(engine, submits(), "none")
    guessed, scheduler = answer(engine, submits(), "ngram" if method == "ngram" else "draft")
    assert_same(plain, guessed)
    assert calm.counters.spec_draft_tokens == 0
    assert scheduler.counters.spec_draft_tokens > 100
    assert (scheduler.counters.preemptions > 0) == (blocks == 14)
    if method != "draft":
        assert scheduler.counters.spec_accepted_tokens > 20
    alone, _ = answer(engine, submits()[1:2], "ngram")
    assert alone[1, 2].tokens == plain[1, 2].tokens


@pytest.mark.parametrize("settings", ["greedy", "sampled", "filtered", "penalties"])
def test_a_draft_model_that_is_the_model_is_always_right(folder: Path, settings: str) -> None:
    """Also when sampling: its draws take the same uniforms."""
    engine = loaded(folder, folder)
    own = SamplingSettings(**SETTINGS[settings])  # type: ignore[arg-type]
    several = [Submit(i, PLAIN[i : i + 20], [own]) for i in range(3)]
    _, scheduler = answer(engine, several, "draft")
    counters = scheduler.counters
    assert counters.spec_draft_tokens > 60
    assert counters.spec_accepted_tokens == counters.spec_draft_tokens


def test_a_draft_model_catches_up_with_cached_prompts_and_forks(folder: Path) -> None:
    """What others computed without it is no loss: it reads the text from where it stands."""
    engine = loaded(folder, folder)
    own = SamplingSettings(temperature=0.0, max_tokens=20)
    limits = engine.limits
    pool = BlockPool(engine.num_blocks, limits.block_size)
    scheduler = Scheduler(
        pool,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        max_model_len=limits.max_model_len,
        speculation=SpeculationLimits(6, 48, has_draft=True),
        clock=lambda: 0.0,
    )

    def run(method: str, prompt: list[int], choices: int) -> tuple[int, int]:
        before = scheduler.counters.spec_draft_tokens, scheduler.counters.spec_accepted_tokens
        settings = [replace(own, speculative_method=method, num_speculative_tokens=6)] * choices
        scheduler.add(Submit(1, prompt, settings))
        while (step := scheduler.schedule()) is not None:
            scheduler.update(step, engine.runner.run(step))
        after = scheduler.counters.spec_draft_tokens, scheduler.counters.spec_accepted_tokens
        return after[0] - before[0], after[1] - before[1]

    text = [(5 * i) % 140 + 3 for i in range(300)]
    assert run("none", text, 1) == (0, 0)
    for prompt, choices in ((text, 1), ([*text[:200], 4, 9], 4), (text[:64], 2)):
        proposed, accepted = run("draft", prompt, choices)
        assert proposed == accepted > 12 * choices
    assert scheduler.counters.prefix_hits > 400


def test_a_draft_model_knows_what_becomes_of_pages(folder: Path) -> None:
    """A copy brings what its source had, a page from the host nothing."""
    drafter = loaded(folder, folder).runner.drafter
    assert drafter is not None
    drafter._computed[1:5] = [BLOCK, BLOCK, BLOCK, 7]
    step = Step(0, copies=[(1, 2, 20), (4, 5, 20)], loads=[(0, 3, BLOCK)])
    assert drafter.propose(step, lambda *_: SamplingRow(0)) == []
    assert drafter._computed[1:6] == [BLOCK, 20, 0, 7, 7]


def test_a_proposed_token_that_makes_no_number_harms_nobody(folder: Path) -> None:
    """The row's own draw sees it through the mask: the row is done again without proposals."""
    engine = loaded(folder)
    own = SamplingSettings(temperature=0.0, max_tokens=12)
    both = [Submit(0, LOOPING, [own]), Submit(1, PLAIN, [own])]
    plain, _ = answer(engine, both, "none")
    scheduler = Scheduler(
        BlockPool(engine.num_blocks, BLOCK),
        max_num_seqs=4,
        max_num_batched_tokens=96,
        max_model_len=400,
        speculation=SpeculationLimits(6, 48, has_draft=True),
        clock=lambda: 0.0,
    )
    guessing = replace(own, speculative_method="draft", num_speculative_tokens=2)
    for submit in both:
        scheduler.add(replace(submit, settings=[guessing if submit.id == 0 else own]))
    said: dict[int, list[int]] = {0: [], 1: []}
    num_bad = 0
    while (step := scheduler.schedule()) is not None:
        for row in step.rows:
            if row.num_ahead:
                row.proposed = [NAN_TOKEN]
                num_bad += 1
        for output in scheduler.update(step, engine.runner.run(step)).get(0, []):
            assert output.error is None
            said[output.id] += output.tokens
    assert num_bad == 1, "once was enough"
    assert said == {0: plain[0, 0].tokens, 1: plain[1, 0].tokens}
    assert all(bool(page.isfinite().all()) for page in engine.runner.cache.keys)


def test_costs_are_measured_at_the_start(folder: Path, other: Path) -> None:
    steps, passes = measure_costs(loaded(folder, other))
    assert 0.0 < steps.seconds(1) <= steps.seconds(8) < steps.seconds(64)
    assert passes.seconds(1) > 0.0
    without = measure_costs(loaded(folder))
    assert without[0].is_known
    assert not without[1].is_known


def test_a_draft_model_with_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, vocabulary=200)
    with pytest.raises(ValueError, match="vocabulary of 200 tokens and the model one of 199"):
        loaded(folder, tmp_path)
