"""`run --explain`, here and with `--as`: what each step would take, and what the documents say of it."""

from __future__ import annotations

import json

import pytest
from pydantic import TypeAdapter

from sut.result import Result
from sut.run_record import describe_kernels
from tests import run_folders
from wan_mlperf import run
from wan_mlperf.errors import BadInput
from wan_mlperf.kernels.attention import Kernel
from wan_mlperf.kernels.backends import ATTENTION
from wan_mlperf.kernels.device import gpu_count
from wan_mlperf.kernels.numerics import GEMM_TEXTS, SIXTEEN_BITS, exchange_text
from wan_mlperf.parallel import survey
from wan_mlperf.recipe import CONFIGS, load_recipe
from wan_mlperf.step_plan import make_plan
from wan_mlperf.submit import documents


def explain(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run.main(["--explain", *arguments]) == 0  # 150 columns, as there is no terminal
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("recipe", "arch", "early", "late", "gemm", "missing"),
    [
        (
            "mi355x-singlestream",
            "gfx950",
            "sage_fp4 (AITER_MXFP4)",
            "sage_fp8 (AITER_FP8)",
            "mxfp4 (AITER_A4W4)",
            "17 August 2026",
        ),
        (
            "mi355x-singlestream",
            "sm90",
            "sage_fp4 (nothing)",
            "sage_fp8 (FLASH_3_FP8)",
            "mxfp4 (nothing)",
            "flash_attn_interface",
        ),
        ("mi355x-singlestream", "sm100", "sage_fp4 (FLASH_4_FP4)", "sage_fp8 (nothing)", "mxfp4 (TORCHAO_MXFP4)", "flash_attn"),
        (
            "h100",
            "sm90",
            "sage_fp8 (FLASH_3_FP8)",
            "sdpa (FLASH_3)",
            "fp8 (TORCHAO_FP8)",
            "flash_attn_interface is not installed",
        ),
    ],
)
@pytest.mark.skipif(gpu_count() > 0, reason="what is missing depends on the host")
def test_what_would_run_elsewhere(
    recipe: str, arch: str, early: str, late: str, gemm: str, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = explain(capsys, "--recipe", recipe, "--set=attention.early_fraction=0.85", "--as", arch)
    assert shown.count(early) == 17 and shown.count(late) == 3 and shown.count(gemm) == 20
    assert f"on {arch}" in shown and "missing here" in shown and missing in shown
    assert ("Hadamard" in shown) == (arch == "gfx950")


def test_here(capsys: pytest.CaptureFixture[str]) -> None:
    shown = explain(capsys, "--recipe", "tiny", "--set=attention.smooth_k=true", "--set=references=gfx950")
    if not gpu_count():
        assert shown.count("sage_fp4 (AITER_SAGE_V2 by reference (gfx950))") == 17
        assert shown.count("sage_fp8 (AITER_SAGE by reference (gfx950))") == 3
    exact = explain(capsys, "--recipe", "tiny", "--exact")
    assert exact.count("sdpa (xDiT SDPA)") == 20 and exact.count("bf16 (TORCH)") == 20


def test_bad_architectures() -> None:
    with pytest.raises(BadInput, match=r"--as: 'gfx90' is not known, did you mean 'gfx9\d\d'\?; allowed: gfx950, "):
        run.main(["--explain", "--as", "gfx90"])
    with pytest.raises(BadInput, match="--as 'gfx950' has no effect; allowed: only together with --explain"):
        run.main(["--as", "gfx950"])


@pytest.mark.parametrize("key", ATTENTION)
def test_the_calibration_text_is_the_tables(key: str) -> None:
    """For every kernel; one that does not smooth or rotate is never described with it."""
    numerics = ATTENTION[key].numerics
    kernels = {"sage_fp4": Kernel(backend=key), "sage_fp8": Kernel(backend=key), "cross": Kernel(backend="SDPA")}
    values = {**run_folders.result("singlestream", "performance"), **describe_kernels(kernels, {"mxfp4": None}, "row")}
    result = TypeAdapter(Result).validate_json(json.dumps(values))
    text = documents.calibration({"SingleStream": run_folders.RECIPE_VALUES}, {"SingleStream": result})
    assert text.count(f"` (xDiT {key}): {numerics.text}.") == 2
    assert ("minus its mean" in text) == numerics.smoothed and ("Hadamard" in text) == numerics.rotated
    assert text.count(GEMM_TEXTS["mxfp4", ""]) == 2
    assert f"Cross-attention (xDiT SDPA): {SIXTEEN_BITS.text}." in text


def test_the_exchange_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """By --explain, and by the calibration document in the words of what ran; where it cannot run, so."""
    shown = explain(capsys, "--recipe", "mi355x-singlestream", "--as", "gfx950")
    assert "exchange fp8 Q, K and V as FP8 E4M3 with one scale" in shown
    recipe, result = run_folders.RECIPE_VALUES, run_folders.result("singlestream", "performance")
    for ranks, name, words in ((8, "fp8", "as FP8 E4M3"), (8, "bf16", "not quantised"), (1, "fp8", "neither sent nor rounded")):
        result["numerics"] = {**result["numerics"], "exchange": exchange_text(name, ranks)}
        made = TypeAdapter(Result).validate_json(json.dumps(result))
        (line,) = [
            one for one in documents.calibration({"SingleStream": recipe}, {"SingleStream": made}).splitlines() if "GPUs" in one
        ]
        assert line.startswith("- Between the GPUs that share a video's tokens: ") and words in line
    del result["numerics"]["exchange"]  # as of a run before there was a choice
    made = TypeAdapter(Result).validate_json(json.dumps(result))
    assert "Between the GPUs" not in documents.calibration({"SingleStream": recipe}, {"SingleStream": made})
    large = load_recipe("mi355x-singlestream")
    lacking = {one.name: one for one in survey.there(large, make_plan(large, large.effective_workload), "sm80")[0]}["exchange"]
    assert not lacking.runs and "torch.compile has no E4M3" in lacking.lacks[0]


HARDWARE = {"mi355x": "gfx950", "mi350x": "gfx950", "h100": "sm90", "h200": "sm90", "b200": "sm100"}


@pytest.mark.parametrize("recipe", sorted(one.stem for one in CONFIGS.glob("*.yaml") if not one.stem.startswith("tiny")))
def test_every_shipped_recipe_has_kernels_on_its_hardware(recipe: str) -> None:
    loaded = load_recipe(recipe)
    plan = make_plan(loaded, loaded.effective_workload)
    features, _ = survey.there(loaded, plan, HARDWARE[recipe.split("-")[0]])
    assert [one.name for one in features if not one.runs] == []
