"""A runner without tensors that remembers what lies in every page and every slot of host memory,
and reads it as attention would.

Where a real cache holds keys and values it holds a digest of the namespace and of all tokens up to
that position: what a key of that position depends on. Its model draws a token from the digest of
everything before, so a wrong page, a missed copy or an early eviction changes the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from service.engine.blocks import BlockPool
from service.engine.messages import SamplingSettings, Submit, TokenLogprob
from service.engine.sequence import Sequence
from service.engine.step import Draw, Row, RowResult, Step, StepResult, agreed

VOCABULARY = 50
END = 3


def digests(submit: Submit, tokens: list[int]) -> list[int]:
    """One for every position: what its keys and values depend on."""
    found, last = [], hash((submit.namespace, submit.adapter, submit.adapter_version))
    for token in tokens:
        last = hash((last, token))
        found.append(last)
    return found


def draw_token(settings: SamplingSettings, digest: int, num_output: int, position: int) -> int:
    token = hash((digest, settings.seed, settings.choice, position)) % VOCABULARY
    ends = {*settings.eos_token_ids, *settings.stop_token_ids}
    while token in ends and num_output < settings.min_tokens:
        token = (token + 1) % VOCABULARY
    return token


def expected_text(submit: Submit, choice: int, max_model_len: int) -> list[int]:
    """What one choice must say, however it was scheduled."""
    settings, tokens, output = submit.settings[choice], list(submit.prompt), []
    while len(output) < settings.max_tokens and len(tokens) < max_model_len:
        digest = digests(submit, tokens)[-1]
        token = draw_token(settings, digest, len(output), len(tokens))
        tokens.append(token)
        output.append(token)
        if token in settings.eos_token_ids or token in settings.stop_token_ids:
            break
    return output


def pooled(digests: list[int]) -> bytes:
    return repr(digests).encode()


def expected_pooled(submit: Submit) -> bytes:
    known = digests(submit, submit.prompt)
    return pooled(known if submit.pooling == "mean" else known[-1:])


def expected_prompt_logprobs(submit: Submit) -> list[TokenLogprob | None]:
    known = digests(submit, submit.prompt)
    logprobs = [_logprob(known[i], submit.prompt[i + 1]) for i in range(len(known) - 1)]
    first = submit.logprobs_from
    return [*[None] * first, *logprobs[first - 1 :]]


def _logprob(digest: int, target: int) -> TokenLogprob:
    return TokenLogprob(-(digest % 1000) / 7, 1, [target], [])


class RecordingRunner:
    """Runs each step as it is launched. ``is_late`` says whether a draw is settled on the host
    only: then the device goes on from another token, as a row launched ahead will find.
    """

    def __init__(self, pool: BlockPool, is_late: Callable[[], bool] = lambda: False) -> None:
        self.pool = pool
        self.memory: dict[int, list[int | None]] = {
            block: [None] * pool.block_size for block in range(pool.num_blocks)
        }
        self.num_accepted = 0
        self.host: dict[int, list[int | None]] = {
            slot: [None] * pool.block_size for slot in range(pool.host.num_slots)
        }
        self._is_late = is_late
        self._drawn: list[int | None] = []  # on the device, by row of the step before
        self._digests: dict[Sequence, list[int]] = {}
        self._pools: dict[int, list[int]] = {}  # by request

    def run(self, step: Step) -> StepResult:
        """Stores, copies, loads, then writes of all rows, then reads: as a layer does it."""
        for row in step.rows:
            if row.num_ahead and row.choices[0].settings.speculative_method == "draft":
                row.proposed = self._draft(row)
        known = [self._known(row) for row in step.rows]
        self._store(step)
        self._copy(step)
        self._load(step)
        self._write(step, known)
        results = [self._row(row, own) for row, own in zip(step.rows, known, strict=True)]
        self._drawn = [self._on_device(result) for result in results]
        return StepResult(results)

    def abandon(self, step: Step) -> None:
        for row in step.rows:
            self._pools.pop(row.sequence.request.number, None)

    def _on_device(self, result: RowResult) -> int | None:
        token = result.draws[0].token if result.draws else None
        return token if token is None or not result.is_late else (token + 1) % VOCABULARY

    def _draft(self, row: Row) -> list[int]:
        """Often right, sometimes short: what will be drawn, but every fifth guess is off by one."""
        sequence, settings = row.sequence, row.choices[0].settings
        tokens = sequence.tokens.copy()
        for _ in range(row.num_ahead - (len(tokens) % 7 == 0)):
            last = digests(sequence.request.submit, tokens)[-1]
            num_output = len(tokens) - sequence.num_prompt
            token = draw_token(settings, last, num_output, len(tokens))
            tokens.append((token + (last % 5 == 0)) % VOCABULARY)
        return tokens[len(sequence.tokens) :]

    def _store(self, step: Step) -> None:
        """The rest of a slot is whatever was there: nobody may ask for it."""
        for block, slot, tokens in step.stores:
            assert block != 0
            assert 0 < tokens <= self.pool.block_size
            kept = self.memory[block][:tokens]
            assert None not in kept, "stored before it was computed"
            self.host[slot] = kept + [None] * (self.pool.block_size - tokens)

    def _load(self, step: Step) -> None:
        """Into pages that are nobody else's target and that nobody shares."""
        targets = [block for _, block, _ in step.loads] + [target for _, target, _ in step.copies]
        assert len(set(targets)) == len(targets)
        for slot, block, tokens in step.loads:
            assert block != 0
            assert self.pool.holders(block) == 1, "loaded while shared"
            assert 0 < tokens <= self.pool.block_size
            assert None not in self.host[slot][:tokens], "loaded what was never stored"
            self.memory[block][:tokens] = self.host[slot][:tokens]

    def _copy(self, step: Step) -> None:
        """In list order, which must come to the same as reading every source first."""
        before = {source: self.memory[source].copy() for source, _, _ in step.copies}
        assert len({target for _, target, _ in step.copies}) == len(step.copies)
        for source, target, tokens in step.copies:
            assert 0 not in (source, target)
            assert source != target
            assert 0 < tokens <= self.pool.block_size
            assert self.memory[source][:tokens] == before[source][:tokens], "overwritten before"
            self.memory[target][:tokens] = self.memory[source][:tokens]

    def _write(self, step: Step, known: list[list[int]]) -> None:
        places: Counter[tuple[int, int]] = Counter()
        for row, own in zip(step.rows, known, strict=True):
            table = row.sequence.block_table
            assert row.end == row.sequence.num_scheduled
            assert len(row.proposed) <= row.num_ahead
            assert not (row.num_ahead and row.token_from is not None), "guessed after a guess"
            for position in range(row.start, row.end + len(row.proposed)):
                page, offset = divmod(position, self.pool.block_size)
                block = table[page]
                assert block != 0
                assert self.pool.holders(block) == 1, "written while shared"
                self.memory[block][offset] = own[position]
                places[block, offset] += 1
        assert all(times == 1 for times in places.values()), "two rows write one slot"

    def _row(self, row: Row, known: list[int]) -> RowResult:
        for position in range(row.end + len(row.proposed)):
            page, offset = divmod(position, self.pool.block_size)
            found = self.memory[row.sequence.block_table[page]][offset]
            assert found == known[position], f"position {position} reads another's key"
        assert row.num_logits >= row.num_targets + row.samples
        first = row.end - row.num_logits
        if row.proposed:
            return self._speculative(row, known)
        return RowResult(
            [self._draw(row, known, choice.settings) for choice in row.choices],
            [_logprob(known[first + i], target) for i, target in enumerate(row.targets)],
            is_late=row.samples and self._is_late(),
            pooled=self._pool(row, known),
        )

    def _pool(self, row: Row, known: list[int]) -> bytes | None:
        """All that was pooled, in its order, once the prompt is through."""
        if not row.num_pooled:
            return None
        pool = self._pools.setdefault(row.sequence.request.number, [])
        pool += known[row.end - row.num_pooled : row.end]
        return pooled(pool) if row.end == row.sequence.num_prompt else None

    def _speculative(self, row: Row, known: list[int]) -> RowResult:
        """A draw after the last token and after each one proposed; now and then all for nothing."""
        sequence, (choice,) = row.sequence, row.choices
        if known[-1] % 23 == 0:
            row.gives_up = True
            return RowResult()
        draws = []
        for i in range(1 + len(row.proposed)):
            position = len(sequence.tokens) + i
            token = draw_token(
                choice.settings, known[position - 1], sequence.num_output + i, position
            )
            wants_logprob = choice.settings.logprobs is not None
            draws.append(Draw(token, TokenLogprob(-1.0, 1, [], []) if wants_logprob else None))
        kept = agreed(row.proposed, draws)
        self.num_accepted += len(kept) - 1
        return RowResult(kept)

    def _draw(self, row: Row, known: list[int], settings: SamplingSettings) -> Draw:
        assert row.end == len(known)
        token = draw_token(settings, known[-1], row.end - row.sequence.num_prompt, row.end)
        return Draw(token, TokenLogprob(-1.0, 1, [], []) if settings.logprobs is not None else None)

    def _known(self, row: Row) -> list[int]:
        """Of its sequence's tokens, of those proposed, and of the one only the device knows."""
        if row.proposed:
            return digests(row.sequence.request.submit, row.sequence.tokens + row.proposed)
        known = self._of_tokens(row.sequence)
        if row.token_from is None:
            return known
        fed = self._drawn[row.token_from]
        assert fed is not None, "fed by a row that drew nothing"
        assert row.start == len(known)
        return [*known, hash((known[-1], fed))]

    def _of_tokens(self, sequence: Sequence) -> list[int]:
        """Remembered from step to step: tokens are only ever added."""
        known = self._digests.get(sequence, [])
        if len(known) != len(sequence.tokens):
            known = digests(sequence.request.submit, sequence.tokens)
            self._digests[sequence] = known
        return known
