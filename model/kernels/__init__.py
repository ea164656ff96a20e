"""Optional kernels in plain C, called through ctypes: what they compute and when they serve.

``load_kernels()`` gives the compiled functions where the library was built and the processor has
AVX-512 BF16 and VNNI, else None; ``kernel_status()`` says which and why. The same functions
in PyTorch, the specification the tests compare with, stand in ``model.kernels.reference``.
"""

# M rows (tokens), K inputs, N outputs, T tokens, S rows of a step, D head size

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.kernels.packing import PANEL, Panels, WeightStruct, can_pack, pack
from model.processor import processor_features
from model.schemes import AnyWeight

MAX_HEAD_SIZE = 256
SEGMENT, MAX_SEGMENTS = 256, 32  # keys at least in a segment of a context; segments at most
NEEDED_FEATURES = frozenset(
    {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}
)
VERSION = 3
CACHE_KINDS = {torch.bfloat16: 0, torch.float8_e4m3fn: 1, torch.int8: 2}

_TO_BF16, _TO_FLOAT, _ADD_TO_BF16 = range(3)
_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class _Call(ctypes.Structure):
    """Field for field the struct ``Call`` of linear.c."""

    _fields_ = (
        ("weight", ctypes.POINTER(WeightStruct)),
        ("x", _pointer),
        ("norm", _pointer),
        ("bias", _pointer),
        ("out", _pointer),
        ("scratch", _pointer),
        ("kind", _int),
        ("threads", _int),
        ("eps", _float),
        ("more", _pointer),
    )


class _Step(ctypes.Structure):
    """Field for field the struct ``Step`` of attention.c."""

    _fields_ = (
        ("cosines", _pointer),
        ("sines", _pointer),
        ("tables", _pointer),
        ("contexts", _pointer),
        ("starts", _pointer),
        ("queries", _pointer),
        ("partials", _pointer),
        ("blocks", _pointer),
        ("rows", _int),
        ("lone", _int),
        ("table_stride", _int),
        ("splits", _int),
    )


class _Attention(ctypes.Structure):
    """Field for field the struct ``Attention`` of attention.c."""

    _fields_ = (
        ("step", ctypes.POINTER(_Step)),
        ("qkv", _pointer),
        ("out", _pointer),
        ("q_norm", _pointer),
        ("k_norm", _pointer),
        ("keys", _pointer),
        ("values", _pointer),
        ("key_scales", _pointer),
        ("value_scales", _pointer),
        ("heads", _int),
        ("kv_heads", _int),
        ("head_size", _int),
        ("page_size", _int),
        ("window", _int),
        ("cache", _int),
        ("threads", _int),
        ("scale", _float),
        ("eps", _float),
    )


@dataclass(slots=True)
class PagedRows:
    """What every layer's attention of one step shares. All tensors contiguous.

    cosines, sines: [T, D / 2] float32 of the tokens' positions; tables: [S, pages] int32; contexts:
    [S] int32, keys each row's last token sees with its own; starts: [S + 1] int32, where each row's
    tokens begin. The first ``num_lone`` rows have one token.
    """

    cosines: Tensor
    sines: Tensor
    tables: Tensor
    contexts: Tensor
    starts: Tensor
    num_lone: int
    longest: int  # the largest context: decides into how many parts a lone row's keys are cut


@dataclass(frozen=True)
class KernelWeight:
    """A packed weight and the kernels that multiply it: what ``Linear.pack`` takes."""

    kernels: Kernels
    panels: Panels
    struct: WeightStruct

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[M, K] -> [M, N] bf16."""
        return self.kernels.linear(x.contiguous(), None, self, bias, 0.0)


class PreparedLinear:
    """One matrix between two buffers: prepared once, called for the first ``rows`` of them.

    Preparing is most of what a call costs from Python (some 10 us, a call 1), and a step of a small
    model makes a hundred calls.
    """

    def __init__(
        self,
        kernels: Kernels,
        weight: KernelWeight,
        x: Tensor,
        out: Tensor,
        *,
        norm: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 0.0,
        adds: bool = False,
        gates: bool = False,
    ) -> None:
        panels = weight.panels
        self._x, self._order = x, panels.order
        self._sorted = x
        if panels.order is not None:  # a norm does not mind, its weight moves along
            self._sorted = torch.empty_like(x)
            norm = None if norm is None else norm[panels.order]
        groups = panels.inputs // panels.group if panels.group else 0
        scratch = kernels.buffer("inputs", x.shape[0] * (8 * groups + 3 * panels.inputs))
        self._kept = (weight, self._sorted, norm, bias, out, scratch)  # whose addresses are below
        kind = _ADD_TO_BF16 if adds else _TO_FLOAT if out.dtype == torch.float32 else _TO_BF16
        self._call = _Call(
            ctypes.pointer(weight.struct),
            self._sorted.data_ptr(),
            _address(norm),
            _address(bias),
            out.data_ptr(),
            scratch.data_ptr(),
            kind,
            kernels.threads,
            eps,
            None,
        )
        self._pointer = ctypes.byref(self._call)
        self._function = kernels.library.gate_up if gates else kernels.library.linear

    def __call__(self, rows: int, more: Tensor | None = None) -> None:
        """``more`` [rows, 2 I] is added to gate and up before silu: zeros change no bit."""
        self._call.more = _address(more)
        if self._order is not None:
            torch.index_select(self._x[:rows], 1, self._order, out=self._sorted[:rows])
        self._function(self._pointer, rows)


class PreparedAttention:
    """One layer's attention between two buffers, over pages that stay where they are.

    Rotary, append, attend: qkv [T, (H + 2 KV) D] -> out [T, H D]. The pages
    [num_blocks, KV, block_size, D] are written at each token's position; of an int8 cache so are
    the scales [num_blocks, KV, block_size].
    """

    def __init__(
        self,
        kernels: Kernels,
        step: StepRows,
        qkv: Tensor,
        out: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> None:
        _, kv_heads, page_size, head_size = keys.shape
        self._kept = (step, qkv, out, keys, values, q_norm, k_norm, key_scales, value_scales)
        self._attention = _Attention(
            ctypes.pointer(step.struct),
            qkv.data_ptr(),
            out.data_ptr(),
            _address(q_norm),
            _address(k_norm),
            keys.data_ptr(),
            values.data_ptr(),
            _address(key_scales),
            _address(value_scales),
            out.shape[1] // head_size,
            kv_heads,
            head_size,
            page_size,
            window or 0,
            CACHE_KINDS[keys.dtype],
            kernels.threads,
            scale,
            eps,
        )
        self._pointer = ctypes.byref(self._attention)
        self._function = kernels.library.paged_attention

    def __call__(self) -> None:
        self._function(self._pointer)


class StepRows:
    """The rows of the step at hand, where every layer's attention looks for them."""

    def __init__(self, kernels: Kernels, heads: int, kv_heads: int, head_size: int) -> None:
        self.struct = _Step()
        self._kernels, self._heads, self._size = kernels, heads, head_size
        block = kernels.library.block_scratch_bytes(head_size, heads // kv_heads)
        self._blocks = torch.empty(kernels.threads * block, dtype=torch.uint8)

    def set(self, rows: PagedRows) -> None:
        # the kernel cuts each context by its own length alone, into no more than this many segments
        splits = min(MAX_SEGMENTS, -(-rows.longest // SEGMENT))
        partials = 4 * splits * rows.num_lone * self._heads * (self._size + 2)
        self._kept = (
            rows,
            self._kernels.buffer("queries", 2 * len(rows.cosines) * self._heads * self._size),
            self._kernels.buffer("partials", partials),
        )
        struct = self.struct
        struct.cosines, struct.sines = rows.cosines.data_ptr(), rows.sines.data_ptr()
        struct.tables, struct.contexts = rows.tables.data_ptr(), rows.contexts.data_ptr()
        struct.starts = rows.starts.data_ptr()
        struct.queries, struct.partials = self._kept[1].data_ptr(), self._kept[2].data_ptr()
        struct.blocks = self._blocks.data_ptr()
        struct.rows, struct.lone = len(rows.contexts), rows.num_lone
        struct.table_stride, struct.splits = rows.tables.shape[1], splits


class Kernels:
    """The compiled functions over tensors: prepared ones for a network, plain ones for the rest."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self.threads = threads
        self.library = library
        self._scratch: dict[str, Tensor] = {}

    def pack(self, weight: AnyWeight) -> KernelWeight | None:
        """The weight as the kernels read it; None where its shape or dtype is not theirs."""
        if not can_pack(weight):
            return None
        panels = pack(weight)
        return KernelWeight(self, panels, panels.struct())

    def buffer(self, name: str, num_bytes: int) -> Tensor:
        """Scratch that only grows; its contents mean nothing between two calls."""
        buffer = self._scratch.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._scratch[name] = torch.empty(num_bytes, dtype=torch.uint8)
        return buffer

    def linear(
        self,
        x: Tensor,
        norm: Tensor | None,
        weight: KernelWeight,
        bias: Tensor | None,
        eps: float,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """norm(x) @ weight.T + bias: [M, K] -> [M, N] in bf16 or float32."""
        out = torch.empty(x.shape[0], weight.panels.outputs, dtype=out_dtype)
        PreparedLinear(self, weight, x, out, norm=norm, bias=bias, eps=eps)(x.shape[0])
        return out

    def linear_add(
        self, x: Tensor, weight: KernelWeight, bias: Tensor | None, residual: Tensor
    ) -> None:
        """residual += x @ weight.T + bias, in place: [M, K], [M, N]."""
        PreparedLinear(self, weight, x, residual, bias=bias, adds=True)(x.shape[0])

    def gate_up(
        self,
        x: Tensor,
        norm: Tensor,
        weight: KernelWeight,
        bias: Tensor | None,
        eps: float,
        more: Tensor | None = None,
    ) -> Tensor:
        """silu(norm(x) @ gate.T) * (norm(x) @ up.T): weight [2 I, K], gate above up -> [M, I]."""
        inner = weight.panels.outputs // 2
        assert inner % PANEL == 0, "gate and up begin with a panel of their own"
        out = torch.empty(x.shape[0], inner, dtype=torch.bfloat16)
        call = PreparedLinear(self, weight, x, out, norm=norm, bias=bias, eps=eps, gates=True)
        call(x.shape[0], more)
        return out

    def paged_attention(
        self, qkv: Tensor, keys: Tensor, values: Tensor, rows: PagedRows, **settings: Any
    ) -> Tensor:
        """[T, (H + 2 KV) D] -> [T, H D]; see ``PreparedAttention``."""
        _, kv_heads, _, head_size = keys.shape
        heads = qkv.shape[1] // head_size - 2 * kv_heads
        out = torch.empty(qkv.shape[0], heads * head_size, dtype=torch.bfloat16)
        step = StepRows(self, heads, kv_heads, head_size)
        step.set(rows)
        PreparedAttention(self, step, qkv, out, keys, values, **settings)()
        return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and the reason there is none."""
    if missing := NEEDED_FEATURES - processor_features():
        return None, f"this processor lacks {', '.join(sorted(missing))}"
    built = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not built:
        return None, "not built: no C compiler was found when pronk was installed"
    try:
        # lazy binding to the OpenMP runtime torch has already loaded: one pool of threads, not two
        library = ctypes.CDLL(str(built[0]))
        version = library.kernels_version()
    except (OSError, AttributeError) as error:
        return None, f"the built library does not load: {error}"
    if version != VERSION:
        return None, "built by a compiler without AVX-512 BF16, or for another version"
    _declare(library)
    return library, "AVX-512 BF16 kernels"


def _declare(library: ctypes.CDLL) -> None:
    for function in (library.linear, library.gate_up):
        function.argtypes, function.restype = [ctypes.POINTER(_Call), _int], None
    library.paged_attention.argtypes = [ctypes.POINTER(_Attention)]
    library.paged_attention.restype = None
    library.block_scratch_bytes.argtypes = [_int, _int]
    library.block_scratch_bytes.restype = ctypes.c_long


def kernel_library() -> ctypes.CDLL | None:
    """The loaded library, for functions that are declared elsewhere."""
    return _library()[0]


def load_kernels(threads: int | None = None) -> Kernels | None:
    """The kernels with ``threads`` threads (default: torch's), or None where they cannot serve."""
    library, _ = _library()
    if library is None:
        return None
    return Kernels(library, threads or torch.get_num_threads())


def kernel_status() -> tuple[bool, str]:
    """(usable, why): for the banner and ``pronk doctor``."""
    library, reason = _library()
    return library is not None, reason
