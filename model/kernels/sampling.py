"""The compiled way to draw and score rows of logits, called through ctypes.

``RowsKernel`` gives what the tensor operations of ``model.sampler`` give, for all rows of a step in
one call; the tests hold one to the other. A draw is done when ``draw`` returns.
"""

# R rows drawn, V vocabulary

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from model.kernels import kernel_library
from model.logprobs import RawLogprob
from model.penalties import has_penalty, state_of, strengths
from model.sampling_row import Draw, Packed, SamplingRow

# Field for field the struct Row of sampling.c: what each step brings, then a request's settings.
_STEP, _SETTINGS = struct.Struct("@Q4P4i"), struct.Struct("@2Q3Pd5i5f")
_GIVEN = 3  # after the kinds that draw: the token is known, its row is scored alone
_OFF = -1
_MASK = (1 << 64) - 1

_pointer, _int = ctypes.c_void_p, ctypes.c_int


class _Results(ctypes.Structure):
    """Field for field the struct ``Results`` of sampling.c."""

    _fields_ = (
        ("tokens", _pointer),
        ("best", _pointer),
        ("logprobs", _pointer),
        ("ranks", _pointer),
        ("top_ids", _pointer),
        ("top_logprobs", _pointer),
        ("most", ctypes.c_int32),
    )


class DrawnRows:
    """What came of the rows of one call. See ``model.sampler.Drawn``."""

    def __init__(self, alternatives: list[int]) -> None:
        """``alternatives`` of each row, no more than there are tokens; -1: it is not scored."""
        num_rows = len(alternatives)
        self.tokens = torch.empty(num_rows, dtype=torch.int64)
        self.places = range(num_rows)
        self._alternatives = alternatives
        self._best, self._logprobs = torch.empty(2, num_rows).unbind()
        self._ranks = torch.empty(num_rows, dtype=torch.int32)
        self._most = max([0, *alternatives])
        self._top_ids = torch.empty(num_rows, self._most, dtype=torch.int32)
        self._top_logprobs = torch.empty(num_rows, self._most)

    def collect(self) -> list[Draw]:
        rows = zip(self.tokens.tolist(), self._best.tolist(), self.scores(), strict=True)
        return [Draw.of(token, best, score) for token, best, score in rows]

    def scores(self) -> list[RawLogprob | None]:
        """One a row, None where it is not scored."""
        if max(self._alternatives, default=_OFF) == _OFF:
            return [None] * len(self._alternatives)
        logprobs, ranks = self._logprobs.tolist(), self._ranks.tolist()
        ids, values = self._top_ids.numpy(), self._top_logprobs.numpy()
        return [
            RawLogprob(logprobs[i], ranks[i], ids[i, :count].tolist(), values[i, :count].tolist())
            if count != _OFF
            else None
            for i, count in enumerate(self._alternatives)
        ]

    @property
    def struct(self) -> _Results:
        return _Results(
            self.tokens.data_ptr(),
            self._best.data_ptr(),
            self._logprobs.data_ptr(),
            self._ranks.data_ptr(),
            self._top_ids.data_ptr(),
            self._top_logprobs.data_ptr(),
            self._most,
        )


class RowsKernel:
    """``draw_rows`` of sampling.c over logits [*, V] float32, contiguous."""

    def __init__(self, library: ctypes.CDLL, vocab_size: int, threads: int) -> None:
        self._function, self._threads = library.draw_rows, threads
        self._vocab_size = vocab_size
        size = threads * library.sampling_scratch_bytes(vocab_size)
        self._scratch = torch.empty(size, dtype=torch.uint8)

    def draw(self, logits: Tensor, rows: Sequence[SamplingRow]) -> DrawnRows:
        kept: list[object] = []  # whose addresses are packed
        packed = b"".join([self._pack(row, kept) for row in rows])
        drawn = DrawnRows(
            [_OFF if row.logprobs is None else min(row.logprobs, self._vocab_size) for row in rows]
        )
        self._call(packed, len(rows), logits, drawn)
        return drawn

    def score(
        self, logits: Tensor, tokens: Sequence[int], num_alternatives: int
    ) -> list[RawLogprob]:
        """Of ``tokens[i]`` under ``logits[i]``."""
        assert logits.size(0) == len(tokens)
        wanted = min(num_alternatives, self._vocab_size)
        given = _SETTINGS.pack(0, 0, 0, 0, 0, 1.0, 0, _OFF, _GIVEN, 0, wanted, 1, 0, 1, 0, 0)
        steps = [_STEP.pack(0, 0, 0, 0, 0, i, 0, 0, token) for i, token in enumerate(tokens)]
        packed = [step + given for step in steps]
        drawn = DrawnRows([wanted] * len(tokens))
        self._call(b"".join(packed), len(tokens), logits, drawn)
        return [score for score in drawn.scores() if score is not None]

    def _call(self, packed: bytes, num_rows: int, logits: Tensor, drawn: DrawnRows) -> None:
        scratch = self._scratch.data_ptr()
        self._function(
            packed,
            num_rows,
            logits.data_ptr(),
            self._vocab_size,
            ctypes.byref(drawn.struct),
            scratch,
            self._threads,
        )

    def _pack(self, row: SamplingRow, kept: list[object]) -> bytes:
        """The row as sampling.c reads it; what is ``kept`` has to outlive the call."""
        packed = row.packed or Packed()
        if not packed.settings:
            packed.settings = self._settings(row, packed.kept)
        kept.append(packed)
        seen, counts, num_seen = 0, 0, 0
        if has_penalty(row):
            state = state_of(row)
            kept.append(state)
            seen, counts, num_seen = state.addresses
        banned: list[Tensor] = []
        at = _address(row.banned, torch.int64, banned) if row.banned else 0
        kept.append(banned)
        mask = 0
        if row.mask is not None:
            assert row.mask.flags.c_contiguous, "a row of words side by side"
            kept.append(row.mask)
            mask = row.mask.ctypes.data
        counted = row.logits_row, num_seen, len(row.banned)
        step = _STEP.pack(row.position & _MASK, seen, counts, at, mask, *counted, 0)
        return step + packed.settings

    def _settings(self, row: SamplingRow, kept: list[Tensor]) -> bytes:
        own = row.draw_settings(self._vocab_size)
        bias, allowed = row.logit_bias, row.allowed
        return _SETTINGS.pack(
            row.seed & _MASK,
            row.choice & _MASK,
            _address(list(bias), torch.int64, kept) if bias else 0,
            0 if allowed is None else _address(allowed, torch.int64, kept),
            _address(list(bias.values()), torch.float32, kept) if bias else 0,
            own.top_p,
            len(bias),
            _OFF if allowed is None else len(allowed),
            row.kind(self._vocab_size),
            own.top_k,
            _OFF if row.logprobs is None else min(row.logprobs, self._vocab_size),
            own.inverse_temperature,
            own.log_min_p,
            *strengths(row),
        )


def _address(values: Sequence[float] | Tensor, dtype: torch.dtype, kept: list[Tensor]) -> int:
    tensor = torch.as_tensor(values, dtype=dtype, device="cpu").contiguous()
    kept.append(tensor)
    return tensor.data_ptr()


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = kernel_library()
    if library is None or not hasattr(library, "draw_rows"):
        return None
    library.sampling_scratch_bytes.argtypes = [_int]
    library.sampling_scratch_bytes.restype = ctypes.c_long
    library.draw_rows.restype = None
    library.draw_rows.argtypes = [_pointer, _int, _pointer, _int, _pointer, _pointer, _int]
    return library


def rows_kernel(vocab_size: int, threads: int) -> RowsKernel | None:
    """None where the library was not built, or not for this processor."""
    library = _library()
    return None if library is None else RowsKernel(library, vocab_size, threads)
