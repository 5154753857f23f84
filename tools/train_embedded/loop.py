"""The loop of every stage: it counts, logs, saves and resumes. A stage provides its models and what one step does.

A step draws all its randomness from `rng(seed, stage, step)`, so a run that was stopped continues exactly as if it had not been.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from wan_mlperf.kernels.linear import compute_dtype

SAVE_EVERY = 60.0
"""Seconds of work that can be lost when a run is stopped."""


class Stateful(Protocol):
    """A module or an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training changes."""

    def load_state_dict(self, state: Any) -> Any:
        """Restore a saved state."""


def rng(seed: int, stage: str, step: int) -> np.random.Generator:
    """Return the source of random numbers for one step of one stage."""
    return np.random.default_rng([seed, zlib.crc32(stage.encode()), step])


def noise(generator: np.random.Generator, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return Gaussian noise in float32."""
    return torch.from_numpy(generator.standard_normal(shape, np.float32)).to(device)


def mixed(device: torch.device) -> torch.autocast:
    """Return bf16 autocast, switched off on CPUs that multiply bf16 about fifty times slower than fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype(torch.bfloat16, device) == torch.bfloat16)


def cosine(step: int, steps: int, warmup: int = 20) -> float:
    """Return the factor of the learning rate: up within `warmup` steps, then down to zero along a cosine."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its original one."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("base_lr", group["lr"])


def average(ema: nn.Module, model: nn.Module, step: int, decay: float = 0.99) -> None:
    """Update the exponential moving average of a model's weights. Early weights are far from the final ones and count less."""
    decay = min(decay, (step + 1) / (step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def fit(
    work: Path,
    stage: str,
    steps: int,
    state: Mapping[str, Stateful],
    step: Callable[[int], dict[str, float]],
) -> None:
    """Run a stage up to `steps`, from its checkpoint if one exists, and log its mean losses at least ten times.

    The checkpoint is `<work>/<stage>.pt`, the log `<work>/log.jsonl` with one line of stage, step, seconds and losses.
    """
    path, begun, start = work / f"{stage}.pt", 0, time.monotonic()
    every = max(1, min(50, steps // 10))
    spent = 0.0
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        begun, spent = saved["step"], saved["seconds"]
    sums: dict[str, list[float]] = {}
    last = start

    def save(done: int) -> None:
        seconds = spent + time.monotonic() - start
        torch.save({name: part.state_dict() for name, part in state.items()} | {"step": done, "seconds": seconds}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)

    for i in range(begun, steps):
        for name, value in step(i).items():
            sums.setdefault(name, []).append(value)
        if (i + 1) % every == 0 or i + 1 == steps:
            line: dict[str, object] = {"stage": stage, "step": i + 1, "seconds": round(spent + time.monotonic() - start, 1)}
            line |= {name: round(sum(values) / len(values), 6) for name, values in sums.items()}
            sums.clear()
            with open(work / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            print(*(f"{key} {value}" for key, value in line.items()), flush=True)
        if time.monotonic() - last > SAVE_EVERY or i + 1 == steps:
            save(i + 1)
            last = time.monotonic()
