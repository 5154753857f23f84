"""`exact` gives what diffusers' own WanPipeline gives: bit for bit on one rank, within 1e-5 in the latents on several."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from sut.prompts import benchmark_prompts
from tests.pipeline import make_latents
from tests.pipeline.make_latents import Cases
from tests.ranks import run_ranks
from wan_mlperf import Pipeline, checkpoint, load_recipe, preflight
from wan_mlperf.pipeline import Query
from wan_mlperf.workload import NEGATIVE_PROMPT

pytestmark = pytest.mark.job

STEPS = 6  # two of them above the boundary
SIZES = {"square": (64, 64), "odd": (48, 80)}  # odd: 75 tokens, which neither 2 nor 4 ranks divide
SEEDS = {"square": 42, "odd": 7}
PROMPTS = {"square": 0, "odd": 100}
TOLERANCE = 1e-5
# Another number of tokens in a product rounds its last bit otherwise, and of a million values that then become E4M3 a few cross
# the middle between two codes.
FLIPS = 5e-5
# What the embedded model was never taught to draw.
UNTAUGHT = (
    "Ein alter Kapitän raucht am Hafen seine Pfeife, 35mm, Gegenlicht",
    "a corgi vibing on a skateboard!!! (cinematic, 4k) <b>bold</b> &amp; loud",
    "雨の夜の渋谷, ネオン",
)
# `exact` but for what the ranks send each other.
FP8_EXCHANGE = [
    *(f"attention.{part}=sdpa" for part in ("early", "late")),
    *(f"gemm.{expert}=bf16" for expert in ("high_noise", "low_noise")),
    *(f"model.{part}=checkpoint" for part in ("dtype", "vae_dtype")),
    "exchange=fp8",
]
Made = dict[str, torch.Tensor]


def overrides(model: Path, size: str, *more: str) -> list[str]:
    height, width = SIZES[size]
    sizes = [f"workload.height={height}", f"workload.width={width}", f"workload.steps={STEPS}"]
    return [f"model.checkpoint={model}", *sizes, *more]


def make(pipeline: Any, prompt: str, size: str, *, frames: int = 17) -> Made:
    """Latents and frames by diffusers' own pipeline, with the threads of one of our ranks.

    On some processors, oneDNN splits the sums of a convolution differently for another number of threads.
    """
    height, width = SIZES[size]
    kept: list[torch.Tensor] = []

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept[:] = [tensors["latents"]]
        return tensors

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        prompt=prompt,
        negative_prompt=NEGATIVE_PROMPT,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        generator=torch.Generator().manual_seed(SEEDS[size]),
        callback_on_step_end=keep,
        output_type="np",
    ).frames[0]
    torch.set_num_threads(threads)
    return {"latents": kept[0], "frames": torch.from_numpy((video * 255).astype("uint8"))}


@pytest.fixture(scope="module")
def mixed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint with parts in several dtypes, the text encoder's nowhere but in its weights."""
    folder = tmp_path_factory.mktemp("mixed")
    stored = {"transformer": torch.bfloat16, "transformer_2": torch.float32, "vae": torch.float16, "text_encoder": torch.bfloat16}
    for file in (file for file in model.rglob("*") if file.is_file()):
        target = folder / file.relative_to(model)
        target.parent.mkdir(exist_ok=True)
        if file.suffix == ".safetensors":
            tensors = {name: tensor.to(stored[file.parent.name]) for name, tensor in load_file(file).items()}
            save_file(tensors, target, {"format": "pt"})
        elif file.parent.name == "text_encoder" and file.name == "config.json":
            config = json.loads(file.read_text())
            del config["dtype"]
            target.write_text(json.dumps(config))
        else:
            target.write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def reference(mixed: Path) -> dict[str, Made]:
    """diffusers' own pipeline on the same folder, prompt, seed and sizes."""
    pipeline = WanPipeline.from_pretrained(mixed)
    assert (pipeline.text_encoder.dtype, pipeline.transformer.dtype) == (torch.bfloat16, torch.float32)
    return {size: make(pipeline, benchmark_prompts()[PROMPTS[size]], size) for size in SIZES}


@pytest.fixture(scope="module")
def rehearsed(mixed: Path) -> Callable[[str, int], torch.Tensor]:
    """Latents of a size by one rank that rounds Q, K and V as if so many had exchanged them."""

    @functools.cache
    def latents(size: str, ranks: int) -> torch.Tensor:
        setup = preflight.prepare(load_recipe("tiny", overrides=overrides(mixed, size, *FP8_EXCHANGE)))
        pipeline = Pipeline.load(dataclasses.replace(setup, rehearsed_ranks=ranks))
        return pipeline.latents([Query(benchmark_prompts()[PROMPTS[size]], SEEDS[size])])

    return latents


def ours(folder: Path, ranks: int, cases: Cases) -> dict[str, Made]:
    run_ranks(make_latents.main, folder, cases, ranks=ranks)
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in cases}


def case(model: Path, size: str, *more: str, exact: bool = True) -> tuple[list[str], bool, str, int]:
    return overrides(model, size, *more), exact, benchmark_prompts()[PROMPTS[size]], SEEDS[size]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_one_rank_is_bit_for_bit(mixed: Path, tmp_path: Path, reference: dict[str, Made]) -> None:
    for size, made in ours(tmp_path, 1, {size: case(mixed, size) for size in SIZES}).items():
        assert torch.equal(made["latents"], reference[size]["latents"]), size
        assert torch.equal(made["frames"], reference[size]["frames"]), size


def test_the_embedded_model_is_bit_for_bit(tmp_path: Path) -> None:
    """As it is packed, in bfloat16 with a configuration that says so, and as it is expanded, in fp32 throughout."""
    expanded = checkpoint.find("embedded").folder
    prompts = [benchmark_prompts()[index] for index in (3, 70, 200)] + list(UNTAUGHT)
    cases = {
        str(number): (overrides(checkpoint.EMBEDDED, "square", "workload.frames=5"), True, prompt, 42)
        for number, prompt in enumerate(prompts)
    }
    cases["expanded"] = (overrides(expanded, "square", "workload.frames=5"), True, UNTAUGHT[0], 42)
    made = ours(tmp_path, 1, cases)
    for folder, dtype in ((checkpoint.EMBEDDED, torch.bfloat16), (expanded, torch.float32)):
        pipeline = WanPipeline.from_pretrained(folder)
        assert (pipeline.text_encoder.dtype, pipeline.vae.dtype) == (dtype, torch.float32)
        for name in ["expanded"] if folder == expanded else [name for name in cases if name != "expanded"]:
            theirs = make(pipeline, cases[name][2], "square", frames=5)
            assert torch.equal(made[name]["latents"], theirs["latents"]), name
            assert torch.equal(made[name]["frames"], theirs["frames"]), name


@pytest.mark.parametrize(
    ("ranks", "meshes"),
    [
        (2, {"cfg2": [], "ulysses2": ["mesh.cfg=1"], "ring2": ["mesh.cfg=1", "mesh.ring=2"]}),
        (4, {"cfg2_ulysses2": [], "ulysses4": ["mesh.cfg=1"], "ulysses2_ring2": ["mesh.cfg=1", "mesh.ring=2"]}),
        pytest.param(
            8,
            {"cfg2_ulysses4": [], "ulysses8": ["mesh.cfg=1"], "cfg2_ulysses2_ring2": ["mesh.ring=2"]},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_several_ranks(
    ranks: int,
    meshes: dict[str, list[str]],
    mixed: Path,
    tmp_path: Path,
    reference: dict[str, Made],
    rehearsed: Callable[[str, int], torch.Tensor],
) -> None:
    """`exact`, whatever the recipe says of the exchange; and with an FP8 exchange what one rank makes that rounds alike."""
    places = [
        (size, name, more)
        for name, more in meshes.items()
        for size in SIZES
        if not ("ring" in name and size == "odd")  # refused: see test_mesh.py
    ]
    cases = {f"{size}-{name}": case(mixed, size, *more, "exchange=fp8") for size, name, more in places}
    low = [place for place in places if place[0] == "square" or place[1].startswith("ulysses")]
    cases |= {f"{size}-{name}-fp8": case(mixed, size, *more, *FP8_EXCHANGE, exact=False) for size, name, more in low}
    made_by = ours(tmp_path, ranks, cases)
    for name in [name for name in made_by if name.endswith("-fp8")]:
        size, mesh, _ = name.split("-")
        latents, sharing = made_by.pop(name)["latents"], ranks // (2 if mesh.startswith("cfg2") else 1)
        cost = error(latents, reference[size]["latents"])
        if sharing == 1:  # nothing is exchanged, so nothing is rounded
            assert cost < TOLERANCE, name
        else:
            assert error(latents, rehearsed(size, sharing)) < FLIPS, name
            assert 1e-4 < cost < 1e-3, name  # the attention of this model does little
    differing: dict[str, list[torch.Tensor]] = {name: [] for name in meshes}
    for name, made in made_by.items():
        size, mesh = name.split("-")
        assert error(made["latents"], reference[size]["latents"]) < TOLERANCE, name
        difference = (made["frames"].int() - reference[size]["frames"].int()).abs()
        assert difference.max() <= 1, name
        differing[mesh].append((difference > 0).float().flatten())
    # Of the 208,896 values of a video, rounding moved 10 to 23 across an integer (two checkpoints, three seeds, three meshes),
    # with latents that were 3e-7 apart.
    for mesh, values in differing.items():
        assert torch.cat(values).mean() <= 2e-4, mesh


def test_reuse_stays_exact(model: Path, tmp_path: Path) -> None:
    """Trimmed text and a decoder called on several latent frames change the result by rounding only."""
    plain = ["attention.early=sdpa", "attention.late=sdpa", "gemm.high_noise=bf16", "gemm.low_noise=bf16"]
    reuse = ["model.dtype=float32", "trim_text=true", "vae.chunk=4"]
    made = ours(tmp_path, 1, {"square": case(model, "square", *plain, *reuse, exact=False)})["square"]
    theirs = make(WanPipeline.from_pretrained(model), benchmark_prompts()[PROMPTS["square"]], "square")
    assert error(made["latents"], theirs["latents"]) < TOLERANCE
    difference = (made["frames"].int() - theirs["frames"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-4


def test_quantised_ranks_agree(model: Path, tmp_path: Path) -> None:
    """The default schedule on one rank and on two.

    Guidance on two ranks is the same arithmetic. Ulysses gives matrix products of half the tokens, which round in another order,
    and a value at the edge between two codes may then get the other one. FP8's scales span the heads of a rank, as on a GPU. A
    hundredth is far below what the schedule costs.
    """
    one = ours(tmp_path, 1, {"one": case(model, "square", exact=False)})["one"]
    two = ours(
        tmp_path, 2, {"cfg2": case(model, "square", exact=False), "ulysses2": case(model, "square", "mesh.cfg=1", exact=False)}
    )
    assert error(two["cfg2"]["latents"], one["latents"]) < 1e-5
    assert error(two["ulysses2"]["latents"], one["latents"]) < 0.01
