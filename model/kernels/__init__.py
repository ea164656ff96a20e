"""Optional decode kernels in plain C, called through ctypes: what they compute and when they serve.

``load_kernels()`` gives the compiled functions where the library was built and the processor has
AVX-512 BF16, else None; ``kernel_status()`` says which and why. ``model.kernels.reference`` has the
same functions in PyTorch: the specification the tests compare with.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.processor import processor_features

MAX_ROWS = 32  # of one call; past it a matrix product of PyTorch is faster anyway
MAX_HEAD_SIZE = 256
SEGMENT, MAX_SEGMENTS = 256, 32  # keys at least in a segment of a context; segments at most
NEEDED_FEATURES = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"})
VERSION = 1

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class _Attention(ctypes.Structure):
    """Field for field the struct ``Attention`` of decode.c."""

    _fields_ = (
        ("q_norm", _pointer),
        ("k_norm", _pointer),
        ("cosines", _pointer),
        ("sines", _pointer),
        ("keys", _pointer),
        ("values", _pointer),
        ("tables", _pointer),
        ("contexts", _pointer),
        ("rows", _int),
        ("heads", _int),
        ("kv_heads", _int),
        ("head_size", _int),
        ("page_size", _int),
        ("table_stride", _int),
        ("window", _int),
        ("splits", _int),
        ("scale", _float),
        ("eps", _float),
        ("threads", _int),
    )


@dataclass(slots=True)
class PagedRows:
    """What every layer's attention of one step shares. All tensors contiguous.

    cosines, sines: [M, head_size / 2] float32 of the rows' positions; tables: [M, pages] int32;
    contexts: [M] int32, keys each row sees with its own.
    """

    cosines: Tensor
    sines: Tensor
    tables: Tensor
    contexts: Tensor
    longest: int  # the largest context: decides into how many parts a row's keys are cut


class Kernels:
    """The compiled functions over tensors. Weights are row-major bf16, one copy, as loaded."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self.threads = threads
        self._library = library
        self._scratch: dict[tuple[str, torch.dtype], Tensor] = {}

    def _buffer(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """Scratch that only grows; its contents mean nothing between two calls."""
        buffer = self._scratch.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype)
            self._scratch[name, dtype] = buffer
        return buffer

    def rms_linear(
        self,
        x: Tensor,
        norm: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """norm(x) @ weight.T + bias: [M, K], [N, K] -> [M, N] in bf16 or float32."""
        (rows, inputs), outputs = x.shape, weight.shape[0]
        out = torch.empty(rows, outputs, dtype=out_dtype)
        scratch = self._buffer("norm", self.threads * rows * inputs, torch.bfloat16)
        is_float = out_dtype == torch.float32
        self._library.rms_linear(
            x.data_ptr(),
            _address(norm),
            weight.data_ptr(),
            _address(bias),
            None if is_float else out.data_ptr(),
            out.data_ptr() if is_float else None,
            scratch.data_ptr(),
            rows,
            inputs,
            outputs,
            eps,
            self.threads,
        )
        return out

    def linear_add(self, a: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
        """x += a @ weight.T + bias, in place: [M, K], [N, K], [M, N]."""
        (rows, inputs), outputs = a.shape, weight.shape[0]
        self._library.linear_add(
            a.data_ptr(),
            weight.data_ptr(),
            _address(bias),
            x.data_ptr(),
            rows,
            inputs,
            outputs,
            self.threads,
        )

    def rms_gate_up(
        self, x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        """silu(norm(x) @ gate.T) * (norm(x) @ up.T): weight [2 I, K], gate above up -> [M, I]."""
        (rows, inputs), inner = x.shape, weight.shape[0] // 2
        out = torch.empty(rows, inner, dtype=torch.bfloat16)
        scratch = self._buffer("norm", self.threads * rows * inputs, torch.bfloat16)
        self._library.rms_gate_up(
            x.data_ptr(),
            norm.data_ptr(),
            weight.data_ptr(),
            _address(bias),
            out.data_ptr(),
            scratch.data_ptr(),
            rows,
            inputs,
            inner,
            eps,
            self.threads,
        )
        return out

    def paged_attention(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: PagedRows,
        *,
        scale: float,
        window: int | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Rotary, append, attend: [M, (H + 2 KV) D] -> [M, H D]; keys, values: one layer.

        The pages [num_blocks, KV, block_size, D] are written at each row's last position.
        """
        num_rows = qkv.shape[0]
        _, kv_heads, page_size, head_size = keys.shape
        heads = qkv.shape[1] // head_size - 2 * kv_heads
        # the kernel cuts each context by its own length alone, into no more than this many segments
        splits = min(MAX_SEGMENTS, -(-rows.longest // SEGMENT))
        out = torch.empty(num_rows, heads * head_size, dtype=torch.bfloat16)
        queries = self._buffer("queries", out.numel(), torch.bfloat16)
        partials = self._buffer(
            "partials", splits * num_rows * heads * (head_size + 2), torch.float32
        )
        call = _Attention(
            _address(q_norm),
            _address(k_norm),
            rows.cosines.data_ptr(),
            rows.sines.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            rows.tables.data_ptr(),
            rows.contexts.data_ptr(),
            num_rows,
            heads,
            kv_heads,
            head_size,
            page_size,
            rows.tables.shape[1],
            window or 0,
            splits,
            scale,
            eps,
            self.threads,
        )
        self._library.paged_attention(
            ctypes.byref(call),
            qkv.data_ptr(),
            out.data_ptr(),
            queries.data_ptr(),
            partials.data_ptr(),
        )
        return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and the reason there is none."""
    if missing := NEEDED_FEATURES - processor_features():
        return None, f"this processor lacks {', '.join(sorted(missing))}"
    built = sorted(Path(__file__).parent.glob("_decode*.so"))
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
    p, i, f = _pointer, _int, _float
    library.rms_linear.argtypes = [p, p, p, p, p, p, p, i, i, i, f, i]
    library.linear_add.argtypes = [p, p, p, p, i, i, i, i]
    library.rms_gate_up.argtypes = [p, p, p, p, p, p, i, i, i, f, i]
    library.paged_attention.argtypes = [ctypes.POINTER(_Attention), p, p, p, p]
    for function in ("rms_linear", "linear_add", "rms_gate_up", "paged_attention"):
        getattr(library, function).restype = None


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
