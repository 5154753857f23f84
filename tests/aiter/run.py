"""Run by test_interpreter.py in a process of its own: a video whose low-precision kernels are AITER's.

Arguments: AITER's source, the output file, and as JSON {"model": FOLDER, "overrides": [...]}, or {} to call the kernels alone.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.aiter import bring_up

if TYPE_CHECKING:
    from wan_mlperf.kernels.device import Device


def main() -> None:
    """Bring AITER up, then do what is asked."""
    source, output, job = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    bring_up.install(source)
    import torch

    from wan_mlperf.kernels import device
    from wan_mlperf.kernels.device import Device

    here = Device(arch="gfx950", name="AITER in Triton's interpreter", torch=torch.device("cpu"))
    device.probe = lambda: here  # type: ignore[assignment]
    if job:
        torch.save(video(job["model"], job["overrides"]), output)
    else:
        calls(here, output)


def calls(here: Device, output: Path) -> None:
    """Outputs of each kernel on fixed inputs, as safetensors: tests/kernels/aiter_calls.safetensors is one such file."""
    import torch
    from safetensors.torch import save_file

    from wan_mlperf.kernels.linear import AiterLinear, products
    from wan_mlperf.parallel import mesh, xdit

    mesh.start(mesh.Shape(replicas=1, cfg=1, ulysses=1, ring=1), here)
    backends = importlib.import_module("xfuser.core.distributed.attention_backend")
    numbers = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(1, 4, 96, bring_up.HEAD_DIM, generator=numbers).half() for _ in range(3))
    key = key + 2 * torch.randn(1, 4, 1, bring_up.HEAD_DIM, generator=numbers).half()  # a mean for smoothing to take away
    saved = {"query": query, "key": key, "value": value}
    for name in ("AITER_SAGE_V2", "AITER_SAGE"):
        call = backends.ATTENTION_FUNCTION_REGISTRY[xdit.backend_key(name)]
        saved[name] = call(query, key, value, 0.0, False)[0].contiguous()
    layer = torch.nn.Linear(256, 64, bias=False).bfloat16()
    layer.weight.data = torch.randn(64, 256, generator=numbers).bfloat16()
    hidden = torch.randn(96, 256, generator=numbers).bfloat16()
    saved |= {"weight": layer.weight.data.clone(), "hidden": hidden, "AITER_A4W4": xdit.mxfp4_linear(layer)(hidden)}
    sharing = [AiterLinear(xdit.mxfp4_linear(layer)) for _ in range(2)]  # one call of AITER's quantiser for both
    assert all(torch.equal(out, saved["AITER_A4W4"]) for out in products(hidden, sharing))
    save_file({name: tensor.detach().contiguous() for name, tensor in saved.items()}, output)


def video(model: str, overrides: list[str]) -> dict[str, Any]:
    """Latents and frames of one prompt, and which kernels made them."""
    import torch

    from wan_mlperf import Pipeline, load_recipe

    pipeline = Pipeline.load(load_recipe("tiny", overrides=[f"model.checkpoint={model}", *overrides]))
    latents = pipeline.latents(["a red circle moving left"])
    frames = torch.from_numpy(pipeline.generate("a red circle moving left"))
    kinds = {type(layer).__name__ for expert in pipeline.experts.values() for layer in expert.modules()}
    kernels = {name: str(kernel) for name, kernel in pipeline.kernels.items()}
    return {"latents": latents, "frames": frames, "kernels": kernels, "layers": sorted(kinds)}


if __name__ == "__main__":
    main()
