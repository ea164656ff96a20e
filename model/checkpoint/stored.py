"""A tensor as it lies in a file: known by name and shape before a byte of it is read.

Imports no torch, so that reading a config does not either.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from model.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model.schemes import AnyWeight

# A context manager around the weight: on leaving it the memory behind it may be given back.
Reading: TypeAlias = "AbstractContextManager[AnyWeight]"


@dataclass(frozen=True)
class StoredTensor:
    """``name`` and ``shape`` are Hugging Face's, whatever the file calls and lays it."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int  # in the file
    read: Callable[[torch.dtype], Reading]  # what is unpacked is unpacked to that dtype
    kind: str = ""  # safetensors' name of the dtype in the file


@dataclass(frozen=True)
class Weights:
    """What a loader hands over: the network to build and what to fill it with, in file order."""

    config: ModelConfig
    tensors: list[StoredTensor]


@contextmanager
def mapped(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor that views a mapped file; afterwards its pages no longer count as ours."""
    yield tensor
    forget(tensor)


def forget(tensor: Tensor) -> None:
    """Lets go of the file pages that lie wholly in a mapped tensor.

    Without it every byte of the checkpoint stays resident until its file is unmapped, and loading
    peaks at twice the weights' size. The mapping must be private and unwritten: then a page that
    is needed again (by a tied tensor, say) simply comes from the file once more.
    """
    if tensor.is_contiguous():
        forget_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def forget_pages(address: int, num_bytes: int) -> None:
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def halves_from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Reorders the rows of a query or key projection from Meta's rotary order to Hugging Face's.

    Meta (and GGUF's llama) rotates neighbours (0, 1), (2, 3), ...; Hugging Face rotates row i of
    a head with row i + head_size / 2. ``weight`` is [num_heads * head_size, ...].
    """
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
