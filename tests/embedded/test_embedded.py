"""The trained embedded model: its videos show what held-out prompts say, and each approximation costs what it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_module
from wan_mlperf import checkpoint

pytestmark = pytest.mark.slow

PLAIN_ATTENTION = "attention.early=sdpa,attention.late=sdpa"
PLAIN_GEMM = "gemm.high_noise=bf16,gemm.low_noise=bf16"
FLOORS = {"foreground": 0.97, "background": 0.97, "direction": 0.97, "shape": 0.90}
CHANCE = {"foreground": 1 / 6, "background": 1 / 7, "direction": 1 / 7, "shape": 1 / 3}


def bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "report.json"
    done = run_module(["wan_mlperf.bench", *arguments, "--json", str(file)], timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def fidelity(tmp_path: Path, prompts: int, *cases: str) -> list[dict[str, float]]:
    flags = [flag for case in cases for flag in ("--case", case)]
    report = bench(tmp_path, "fidelity", "--prompts", str(prompts), "--outputs", str(tmp_path), *flags)
    return [case["mean"] for case in report["cases"]]


def test_held_out_prompts(tmp_path: Path) -> None:
    report = bench(tmp_path, "embedded")
    assert report["prompts"] >= 120
    for attribute, floor in FLOORS.items():
        assert report["exact"][attribute] >= floor, attribute
        assert report["recipe"][attribute] >= report["exact"][attribute] - 0.03, attribute
        assert report["exact_shuffled"][attribute] < CHANCE[attribute] + 0.15, attribute
    assert report["exact"]["steadiness"] >= 0.94  # 0.98 is a drawn clip's after the autoencoder


def test_error_falls_with_the_share_of_fp4_attention(tmp_path: Path) -> None:
    cases = [f"attention.early_fraction={share},{PLAIN_GEMM}" for share in ("1.0", "0.85", "0.5", "0.0")]
    errors = [mean["latents_end"] for mean in fidelity(tmp_path, 8, *cases)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.2 * errors[-1]


def test_error_falls_with_the_precision_of_the_gemms(tmp_path: Path) -> None:
    cases = [f"gemm.high_noise={name},gemm.low_noise={name},{PLAIN_ATTENTION}" for name in ("mxfp4", "fp8", "bf16")]
    errors = [mean["latents_end"] for mean in fidelity(tmp_path, 8, *cases)]
    assert errors[0] > 1.2 * errors[1] > 1.2 * 1.2 * errors[2]


def test_what_is_wrong_shows(tmp_path: Path) -> None:
    """Swapped experts, a moved boundary and FP4 in every step cost more than the default schedule.

    FP4 in the last steps too costs 0.6 dB on average on top of MXFP4 GEMMs, but not for every prompt: for 42 of 64.
    """
    folder = shutil.copytree(checkpoint.find("embedded").folder, tmp_path / "swapped")
    (folder / "transformer").rename(folder / "aside")
    (folder / "transformer_2").rename(folder / "transformer")
    (folder / "aside").rename(folder / "transformer_2")
    wrong = (f"model.checkpoint={folder}", "workload.boundary_ratio=0.5", "attention.early_fraction=1.0")
    default, *others = (mean["psnr"] for mean in fidelity(tmp_path, 48, "attention.early_fraction=0.85", *wrong))
    assert all(psnr < default for psnr in others), (default, others)


def test_the_mi355xs_recipe_part_by_part(tmp_path: Path) -> None:
    """The FP8 exchange costs less than FP4 attention, a bf16 VAE nothing in the latents, and independent errors add."""
    flags = ["--recipe", "mi355x-singlestream", "--on", "tiny", "--as", "gfx950", "--parts", "--prompts", "4"]
    report = bench(tmp_path, "fidelity", *flags, "--outputs", str(tmp_path))
    rows = {case["case"]: case["mean"] for case in report["cases"]}
    errors = {name: row["latents_end"] for name, row in rows.items()}
    plain = errors["dtype and order of rounding"]
    assert plain < errors["exchange fp8"] < errors["attention"] < errors["linear layers"]
    assert errors["VAE bfloat16"] == plain and rows["VAE bfloat16"]["psnr"] < rows["dtype and order of rounding"]["psnr"]
    assert report["expected"] == pytest.approx(errors["all"], rel=0.1)
    assert (
        report["cases"][0]["kernels"]["exchange"]["runs"] == "bf16"
        and report["cases"][-1]["kernels"]["exchange"]["runs"] == "fp8"
    )
