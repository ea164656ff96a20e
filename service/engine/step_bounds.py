"""How many rows and tokens a step may have: fewer for a while where memory did not do."""

from __future__ import annotations

PROMPT_SHARE = 32  # tokens of every step's budget that running decodes cannot take
LEAST_BUDGET = 16  # tokens: a step is made no smaller
STEPS_TO_WIDEN = 64  # without running out of memory, before steps are twice as large again


class StepBounds:
    def __init__(self, max_num_seqs: int, budget: int) -> None:
        self._set(max_num_seqs, budget)
        self._widest = self.max_num_seqs, self.budget

    def _set(self, max_num_seqs: int, budget: int) -> None:
        share = min(PROMPT_SHARE, budget // 2)
        self.max_num_seqs = min(max_num_seqs, budget - share)
        self.budget = budget
        self._num_steps = 0  # with these bounds

    def narrow(self, num_rows: int, num_tokens: int) -> bool:
        """Memory did not do for a step of so many: from now on half of it at most.

        False where there is nothing to halve.
        """
        if num_rows == 1 and num_tokens <= LEAST_BUDGET:
            return False
        rows = min(self.max_num_seqs, max(1, num_rows // 2))
        self._set(rows, min(self.budget, max(LEAST_BUDGET, num_tokens // 2)))
        return True

    def widen(self) -> None:
        """One more step is made."""
        self._num_steps += 1
        if self._num_steps < STEPS_TO_WIDEN or (self.max_num_seqs, self.budget) == self._widest:
            return
        seqs, budget = self._widest
        self._set(min(seqs, 2 * self.max_num_seqs), min(budget, 2 * self.budget))
