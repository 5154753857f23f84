"""Muon: an optimizer whose momentum, as a matrix of outputs x inputs (x taps), is made orthogonal.

After Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), with his Newton-Schulz coefficients. Unlike
`torch.optim.Muon` it also takes convolutions, and does not iterate in bf16 on CPUs where that takes fifty times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest matrix [m, n] with singular values of about 1, by the Newton-Schulz iteration."""
    x = matrix / (matrix.norm() + 1e-7)
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon for weights with any number of dimensions, with updates as large as AdamW's."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        products: torch.dtype = torch.float32,
    ) -> None:
        """Take weights whose first dimension is the output. The iteration multiplies in the dtype `products`."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.products = products

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                velocity = state.setdefault("velocity", torch.zeros_like(weight))
                velocity.lerp_(weight.grad, 1 - group["momentum"])
                direction = weight.grad.lerp(velocity, group["momentum"]).flatten(1)
                update = orthogonalize(direction.to(self.products)).to(weight.dtype) * 0.2 * max(direction.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update.view_as(weight), alpha=group["lr"])
