"""What the tests of the model share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from model import attention_flashinfer
from tests.model.fake_flashinfer import fake_module
from tests.model.graph_tape import Tape


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from more, and the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fake of the package; its ``log`` tells what was made and planned."""
    fake = fake_module()
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(attention_flashinfer, "WORKSPACE_BYTES", 1 << 20)
    return fake


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Every CUDA graph made from now on is one of these."""
    made: list[Tape] = []

    def make() -> Tape:
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, pool: tape)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made
