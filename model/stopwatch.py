"""Seconds of what was queued on a device, without waiting for it."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Starts as it is made. On a GPU two marks in the queue, else the host's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks = [self._mark()]

    def stop(self) -> None:
        self._marks.append(self._mark())

    @property
    def seconds(self) -> float:
        """Between the two marks; the device must have come to the second."""
        began, ended = self._marks
        if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
            ended.synchronize()
            return float(began.elapsed_time(ended)) / 1e3
        assert isinstance(began, float)
        assert isinstance(ended, float)
        return ended - began

    def _mark(self) -> torch.cuda.Event | float:
        if not self._is_cuda:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record()
        return mark
