"""Times the decode of one video on one rank and on several, alternating in one run: medians, ratio, time to the first frame.

When one rank works alone, the others wait. So each rank has the same threads in both cases, and the ratio shows what sharding
gains. The VAE is the embedded model's; the latents are noise.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from wan_mlperf import checkpoint, cli, process, ranks
from wan_mlperf.bench.fidelity import console
from wan_mlperf.errors import BadInput, Failed
from wan_mlperf.files import atomic_write
from wan_mlperf.identity import commit, versions
from wan_mlperf.kernels.device import Device, probe
from wan_mlperf.parallel import mesh as meshes
from wan_mlperf.parallel import split_vae
from wan_mlperf.parallel.launch import launch
from wan_mlperf.recipe import load_recipe
from wan_mlperf.spans import Spans
from wan_mlperf.vae_decode import Gather, VaeDecoder, to_host
from wan_mlperf.workload import Workload

# Share of the uint8 values that may differ between one rank and several, each by at most 1.
TOLERANCE = 1e-4


def main(arguments: Sequence[str]) -> int:
    """`bench decode`: print a table, write JSON."""
    parser = cli.Parser(prog="python -m wan_mlperf.bench decode", description=__doc__)
    parser.add_argument("--ranks", type=int, help="ranks that share the decode (default: all GPUs, or 2 without a GPU)")
    parser.add_argument("--rounds", type=int, default=5, help="timed decodes of each")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key of recipe tiny, such as workload.height=192",
    )
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        raise BadInput(f"--rounds: {options.rounds} is not allowed; allowed: from 1")
    recipe = load_recipe("tiny", overrides=["model.vae_dtype=float32", *options.set, "mesh.replicas=1"])
    workload = recipe.effective_workload
    world = options.ranks or meshes.ranks_to_start(recipe.mesh)
    if world < 2:
        raise BadInput(f"--ranks: {world} is not allowed; allowed: from 2, each with its own GPU or all on the CPU")
    _, _, *sides = workload.latent_shape(0)
    shape = meshes.plan_shape(recipe.mesh, world=world, heads=world, latent_rows=max(sides))
    folder = checkpoint.find("embedded").folder
    meshes.refuse_shared_gpus(world)
    if not ranks.under_torchrun():
        return launch("wan_mlperf.bench", ["decode", *arguments], world)
    mesh = meshes.start(shape, probe())
    report = measure(mesh, folder, workload, recipe.vae.chunk, options.rounds)
    if mesh.rank == 0:
        show(report)
        if options.json:
            atomic_write(Path(options.json), json.dumps(report, indent=1))
    mesh.close()
    return process.DONE


@torch.inference_mode()
def measure(mesh: meshes.Mesh, folder: Path, workload: Workload, chunk: int, rounds: int) -> dict[str, object]:
    """Time both ways, in seconds. Every rank calls it; the first one gets the figures. Raises Failed if the frames differ."""
    from diffusers import AutoencoderKLWan

    device = mesh.device
    alone, shared = (
        AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32).eval().to(device.torch)
        for _ in range(2)
    )
    _, frames, rows, columns = workload.latent_shape(0)
    gather = split_vae.shard_decoder(shared, mesh, latent_height=rows, latent_width=columns)
    ways = {
        "one": VaeDecoder(alone, chunk=chunk, gather=Gather()),
        "all": VaeDecoder(shared, chunk=chunk, gather=gather),
    }
    noise = torch.randn(1, alone.config.z_dim, frames, rows, columns, generator=torch.Generator().manual_seed(workload.seed))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    firsts: dict[str, list[float]] = {name: [] for name in ways}
    videos: dict[str, torch.Tensor] = {}
    for number in range(rounds + 1):
        for name, decoder in ways.items():
            mesh.barrier()
            if name == "all" or mesh.rank == 0:
                first, whole, video = decode(decoder, noise.to(device.torch), device)
                if number and mesh.rank == 0:  # the first of each warms up
                    seconds[name].append(whole)
                    firsts[name].append(first)
                    videos[name] = video
            mesh.barrier()
    if mesh.rank:
        return {}
    difference = (videos["one"].int() - videos["all"].int()).abs()
    differing = float((difference > 0).double().mean())
    if difference.max() > 1 or differing > TOLERANCE:
        raise Failed(f"bench: frames differ by up to {difference.max()}, {differing:.1e} of the values; no ratio")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "ranks": mesh.shape.world,
        "rounds": rounds,
        "height": workload.height,
        "width": workload.width,
        "frames": workload.frames,
        "chunk": chunk,
        "median_s": medians,
        "min_s": {name: min(values) for name, values in seconds.items()},
        "max_s": {name: max(values) for name, values in seconds.items()},
        "ratio": medians["all"] / medians["one"],
        "first_frame": {name: statistics.median(firsts[name]) / medians[name] for name in ways},
        "differing": differing,
        "device": device.name,
        "threads_per_rank": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }


def decode(decoder: VaeDecoder, latents: torch.Tensor, device: Device) -> tuple[float, float, torch.Tensor]:
    """Return seconds until the first frames are in host memory, until the last ones are, and the video (first rank only)."""
    start = time.perf_counter()
    chunks, first = [], 0.0
    for chunk in to_host(decoder.decode(latents), device.torch, Spans(device.torch)):
        first = first or time.perf_counter() - start
        chunks.append(torch.from_numpy(chunk))
    return first, time.perf_counter() - start, torch.cat(chunks, 1) if chunks else torch.empty(0)


def show(report: dict[str, Any]) -> None:
    """Print the figures as a table."""
    size = f"{report['frames']} frames of {report['height']} x {report['width']}, chunks of {report['chunk']} latent frames"
    threads = f"{report['threads_per_rank']} thread{'s' if report['threads_per_rank'] > 1 else ''} per rank"
    table = Table(title=f"decode: {size}; {threads}, {report['device']}; medians of {report['rounds']}")
    for heading in ("", "median s", "min s", "max s", "first frame after", "of one rank's"):
        table.add_column(heading, justify="right")
    for name, count in (("one", 1), ("all", report["ranks"])):
        table.add_row(
            f"{count} rank{'s' if count > 1 else ''}",
            *(f"{report[key][name]:.3f}" for key in ("median_s", "min_s", "max_s")),
            f"{report['first_frame'][name]:.0%}",
            f"{report['ratio']:.3f}" if name == "all" else "",
        )
    console().print(table)
