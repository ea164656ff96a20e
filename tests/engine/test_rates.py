"""How long a step should take is learned from those of its size, else scaled from others."""

from __future__ import annotations

from service.engine.rates import StepRates


def test_a_size_is_seen_once_a_step_of_it_was() -> None:
    rates = StepRates()
    assert rates.estimate(5) == 0.0
    assert not rates.has_seen(5)
    rates.observe(4, 0.1)
    assert rates.has_seen(5)
    assert not rates.has_seen(8)
    assert rates.estimate(5) == 0.1
    assert rates.estimate(8) == 0.2
