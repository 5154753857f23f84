"""Run by test_interleave.py on every rank: a small expert's forward of both branches, one after the other and in turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from wan_mlperf.kernels import attention, gemm
from wan_mlperf.kernels.device import probe
from wan_mlperf.parallel import interleave, mesh, split_experts, xdit
from wan_mlperf.ranks import world_size
from wan_mlperf.recipe import ExchangeName, Gemm, GemmName, MeshRecipe, Recipe

LATENTS = (1, 16, 2, 6, 10)  # 30 tokens, which four ranks must pad
CHOICES: list[tuple[str, GemmName, ExchangeName]] = [("sdpa", "bf16", "bf16"), ("sage_fp4", "mxfp4", "fp8")]


def main(file: Path) -> None:
    """Compare on every rank; rank 0 writes the outcomes to `file`."""
    here, ranks = probe(), world_size()
    shape = mesh.Shape(replicas=1, cfg=1, ulysses=ranks, ring=1)
    made = mesh.start(shape, here)
    kernels = attention.resolve([name for name, *_ in CHOICES], here, references="gfx950", probe=xdit.check_backend)
    with torch.inference_mode():
        outcomes = {" ".join(one): compare(made, kernels, *one) for one in CHOICES}
    if made.rank == 0:
        file.write_text(json.dumps(outcomes))
    made.close()


def compare(
    made: mesh.Mesh, kernels: dict[str, attention.Kernel], kernel: str, form: GemmName, exchange: ExchangeName
) -> dict[str, Any]:
    """Are both orders equal, eager and (one of the choices, on several ranks) in whole graphs? And the order of what happened."""
    from diffusers import WanTransformer3DModel

    from wan_mlperf.experts import Expert, TextKeys

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, ffn_dim=192, num_layers=3, text_dim=32
    ).requires_grad_(False)
    table = gemm.resolve(Gemm(high_noise=form, low_noise=form), probe(), allow_reference=True, probe=lambda _key: None)
    conversion = gemm.Conversion(form, Gemm(), table, probe(), xdit.mxfp4_linear)
    for name, layer in dict(model.named_modules()).items():
        if (new := conversion(name, layer)) is not layer:
            model.set_submodule(name, new)
    recipe = Recipe(name="turns", mesh=MeshRecipe(interleave=True), exchange=exchange)
    self_attend, cross_attend = split_experts.attends(kernels, exchange=exchange, rehearsed_ranks=2)
    together = split_experts.together(kernels, recipe, made.shape, probe(), rehearsed_ranks=2)
    assert isinstance(together, interleave.Interleaved)
    how: dict[str, Any] = {"split": split_experts.split(made), "self_attend": self_attend, "cross_attend": cross_attend}
    texts = [[TextKeys(*torch.randn(2, 1, 4, 9, 32)) for _ in model.blocks] for _ in range(2)]
    latents = torch.randn(LATENTS)
    expected = forward(Expert(model, **how), latents, texts, kernel)
    expert = Expert(model, together=together, **how)
    events: list[str] = []
    watch(together, events)
    eager = forward(expert, latents, texts, kernel)
    order, made_of = list(events), [eager]
    if made.shape.ulysses > 1 and form == "bf16":  # other formats are compiled in tests/kernels/test_products.py
        counters.clear()
        expert.compile(backend="aot_eager", fullgraph=True)
        made_of.append(forward(expert, latents, texts, kernel))
        assert counters["stats"]["unique_graphs"] == 4, "one for each piece, whatever the block and the branch"
    pairs = [all(torch.equal(*two) for two in zip(some, expected, strict=True)) for some in made_of]
    return {"equal": pairs, "differ": not torch.equal(*expected), "order": order}


def forward(expert: Any, latents: torch.Tensor, texts: list[Any], kernel: str) -> list[torch.Tensor]:
    """Both branches' predictions, on every rank."""
    tokens = expert.embed(latents, expert.split)
    after = expert.run_branches(tokens, latents, 900.0, texts, kernel, expert.split)
    return [expert.predict(one, latents, 900.0, expert.split) for one in after]


def watch(together: interleave.Interleaved, events: list[str]) -> None:
    """Note each piece, each start of an exchange, each wait."""

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            events.append(name)
            return call(*arguments)

        return run

    start, numbers = together.start, iter(range(10**6))

    def starting(packed: torch.Tensor) -> interleave.Wait:
        number = next(numbers)
        events.append(f"start {number}")
        return noted(f"wait {number}", start(packed))

    together.start = starting  # type: ignore[method-assign]
    for piece in ("first", "middle", "turn", "last"):
        setattr(together, piece, noted(piece, getattr(together, piece)))
