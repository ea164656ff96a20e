"""Steps that raise after they were computed, on the real runner: what it keeps is made anew.

Grammars and pools of states have moved on when a step is abandoned; its sequences have not.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from model.grammar import Grammar, Vocabulary
from service.engine.loading import Loaded
from service.engine.messages import Output, SamplingSettings, Submit
from service.engine.scheduler import Scheduler
from tests.engine.checkpoints import NAN_TOKEN, VOCAB
from tests.engine.test_runner import (
    PROMPT,
    folder,
    greedy,
    loaded,
    network,
    scheduler_of,
    tokens,
)
from tests.model.test_grammar import lark

__all__ = ["folder", "loaded", "network"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


def crowd() -> list[tuple[Submit, Grammar | None]]:
    vocabulary = Vocabulary([bytes([token]) for token in range(VOCAB)])
    grammar = Grammar(lark('start: "a" /[b-f]{20}/ "g"'), vocabulary)
    drawn = SamplingSettings(seed=4, max_tokens=15, logit_bias={NAN_TOKEN: -100.0})
    penalised = greedy(max_tokens=15, frequency_penalty=0.7, repetition_penalty=1.2)
    return [
        (Submit(1, PROMPT, [greedy(max_tokens=30)], grammar="it"), grammar),
        (Submit(2, PROMPT[1:], [greedy(max_tokens=0)], pooling="mean"), None),
        (Submit(3, PROMPT[2:], [drawn, penalised]), None),
        (Submit(4, PROMPT[3:], [greedy(max_tokens=3)], prompt_logprobs=1), None),
        (Submit(5, PROMPT, [greedy(max_tokens=0)], pooling="last"), None),
    ]


def answers(loaded: Loaded, dice: random.Random | None = None) -> dict[tuple[int, int], Output]:
    """Merged outputs; every third step or so raises once it is computed, or in the middle."""
    scheduler: Scheduler = scheduler_of(loaded)
    for submit, grammar in crowd():
        scheduler.add(submit, grammar=grammar)
    found: dict[tuple[int, int], list[Output]] = {}
    num_abandoned = 0
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step is not None
        launched = loaded.runner.launch(step)
        if dice is not None and len(step.rows) > 1 and dice.random() < 0.4 and num_abandoned < 12:
            if dice.random() < 0.7:
                loaded.runner.collect(launched)
            loaded.runner.abandon(step)
            num_abandoned += 1
            deliveries = scheduler.abandon("it raised", lacks_memory=dice.random() < 0.3)
        else:
            deliveries = scheduler.update(step, loaded.runner.collect(launched))
        for output in deliveries.get(0, []):
            found.setdefault((output.id, output.choice), []).append(output)
    assert dice is None or num_abandoned > 3
    assert scheduler.pool.num_free == scheduler.pool.num_usable
    return {key: joined(outputs) for key, outputs in found.items()}


def joined(outputs: list[Output]) -> Output:
    first, last = outputs[0], outputs[-1]
    return Output(
        last.id,
        last.choice,
        tokens(outputs),
        finish_reason=last.finish_reason,
        error=last.error,
        pooled=first.pooled,
    )


@pytest.mark.parametrize("seed", range(4))
def test_sequences_of_every_kind_say_the_same_over_steps_that_raise(
    loaded: Loaded, network: LlamaForCausalLM, folder: Path, seed: int
) -> None:
    undisturbed, disturbed = answers(loaded), answers(loaded, random.Random(seed))
    assert undisturbed[1, 0].tokens[0] == ord("a")
    assert {key: (one.tokens, one.finish_reason, one.error) for key, one in disturbed.items()} == {
        key: (one.tokens, one.finish_reason, one.error) for key, one in undisturbed.items()
    }
    for number in (2, 5):
        assert vector(disturbed[number, 0]) == pytest.approx(
            vector(undisturbed[number, 0]), abs=1e-4
        )


def vector(output: Output) -> list[float]:
    assert output.pooled is not None
    return list(memoryview(output.pooled).cast("f"))
