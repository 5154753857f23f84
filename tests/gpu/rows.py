"""A table that goes on when a row fails, and how a call on a device is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.table import Table

from wan_mlperf.kernels.device import Device


class Rows:
    """A table that is filled as results come, and what was wrong with them."""

    def __init__(self, title: str, *headings: str) -> None:
        self.table = Table(title=title)
        for heading in (*headings, "verdict"):
            self.table.add_column(heading, justify="right")
        self.wrong: list[str] = []

    def add(self, *cells: object, ok: bool = True, why: str = "") -> None:
        """Add a row. One that is not `ok` fails the part, after all its rows."""
        shown = (f"{one:.4g}" if isinstance(one, float) else str(one) for one in cells)
        self.table.add_row(*shown, "ok" if ok else why or "wrong")
        if not ok:
            self.wrong.append(f"{cells[0]}: {why or 'wrong'} ({', '.join(map(str, cells[1:]))})")

    @contextmanager
    def row(self, *names: object) -> Iterator[None]:
        """What raises inside becomes a row, and the part goes on."""
        try:
            yield
        except Exception as error:  # of any kind: a kernel that fails must not hide the others' figures
            missing = len(self.table.columns) - 1 - len(names)
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            self.add(*names, *[""] * missing, ok=False, why=said)


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error; infinite for what is not finite."""
    if not torch.isfinite(ours).all():
        return float("inf")
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


def seconds(device: Device, call: Callable[..., object], *args: torch.Tensor, rounds: int = 3) -> tuple[float, float]:
    """The first call's time, and the shortest of some later ones."""
    taken = []
    for _ in range(rounds + 1):
        wait(device)
        start = time.perf_counter()
        call(*args)
        wait(device)
        taken.append(time.perf_counter() - start)
    return taken[0], min(taken[1:])


def wait(device: Device) -> None:
    if device.is_gpu:
        torch.cuda.synchronize(device.torch)


def forget_peak(device: Device) -> None:
    """Have `peak` begin anew."""
    if device.is_gpu:
        torch.cuda.reset_peak_memory_stats(device.torch)


def peak(device: Device) -> float:
    return torch.cuda.max_memory_allocated(device.torch) / 1e9 if device.is_gpu else 0.0
