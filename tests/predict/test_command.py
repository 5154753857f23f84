"""`python -m wan_mlperf.predict`: its answers, its files, and what it refuses in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.repository.test_docs import ROOT, commands
from wan_mlperf import predict
from wan_mlperf.errors import BadInput
from wan_mlperf.predict.__main__ import main

BF16 = [
    "--recipe=h100",
    "--hardware=h100",
    *(f"--set={one}" for one in ("attention.early=sdpa", "attention.late=sdpa", "gemm.high_noise=bf16", "gemm.low_noise=bf16")),
]


def test_the_figures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main([*BF16, "--quick", "--size=480x832", "--steps=40", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["seconds"] == pytest.approx(sum(found["parts"].values()))
    assert list(found["parts"]) == ["text_encode", "attention", "gemm", "elementwise", "exchange", "vae_decode", "host"]
    assert found["samples_per_second"] == pytest.approx(1 / found["seconds"])
    low, high = found["band"]
    assert low < found["seconds"] < high and found["workload"]["steps"] == 40
    out = capsys.readouterr().out
    assert "one video (SingleStream)" in out and "FLASH_3" in out


def test_replicas_multiply_the_rate(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    offline = ["--set=mesh.replicas=auto", "--set=mesh.cfg=1", "--set=mesh.ulysses=1"]
    assert main([*BF16, *offline, "--quick", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["samples_per_second"] == pytest.approx(8 / found["seconds"])
    assert found["parts"]["exchange"] == 0


def test_several_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, file = tmp_path / "page.html", tmp_path / "figures.json"
    assert main([*BF16, "--hardware=h200", "--recipe=h100", "--quick", "--html", str(page), "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())["predictions"]) == 4
    assert "side by side" in capsys.readouterr().out
    text = page.read_text()
    assert text.count('class="bar"') == 4 and "H200" in text and "src=" not in text and "http" not in text.split("</style>")[1]


def test_the_floor_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--floor", "--hardware=mi355x", "--set=mesh.cfg=1", "--set=exchange=bf16"]) == 0
    out = capsys.readouterr().out
    assert "CFG 2 x Ulysses 4" in out and "100.8" in out and "attention 187.28 PFLOP, linear layers 72.30, decode 0.64" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--hardware=mi355y"], "hardware 'mi355y': is not known, did you mean 'MI355X'?; allowed: MI300X, "),
        ([], "--hardware: is missing"),
        (["--hardware=mi355x", "--kernel=sage_fp4=FLASH_9"], "kernel 'FLASH_9': is not known"),
        (["--hardware=mi355x", "--kernel=sage_fp4"], "--kernel 'sage_fp4': allowed: NAME=KERNEL"),
        (["--hardware=h100", "--set=attention.early=sdpa"], "gemm 'mxfp4': cannot run on sm90"),
        (["--hardware=mi355x", "--gpus=3", "--set=mesh.cfg=1"], "40 heads are not divisible by the Ulysses degree 3"),
        (["--hardware=mi355x", "--gpus=0"], "--gpus: 0 is not allowed"),
        (["--hardware=mi355x", "--size=720p"], "--size: '720p' is not allowed"),
        (["--hardware=mi355x", "--frames=80"], "frames"),
        (["--hardware=mi355x", "--recipe=mi355x-single"], "did you mean 'mi355x-singlestream'"),
        (["--hardware=mi355x", "--constants=none.json"], "constants 'none.json': cannot be read"),
        (["--hardware=mi355x", "--fits", "--quick"], "--fits with --quick"),
        *[(["--hardware=mi355x", "--floor", flag], f"--floor with {flag}: ") for flag in ("--quick", "--fits", "--details")],
        *[
            (["--hardware=mi355x", "--floor", flag, "x"], f"--floor with {flag}: ")
            for flag in ("--constants", "--json", "--html")
        ],
        (["--hardware=mi355x", "--quick", "--kernel=nope=AITER_FP8"], "--kernel: 'nope' is not known; allowed: sage_fp4"),
        (["--hardware=mi355x", "--floor", "--kernel=nope=AITER_FP8"], "--kernel: 'nope' is not known; allowed: sage_fp4"),
        (["--hardware=mi355x", "--kernel=sage_fp4=A", "--kernel=sage_fp4=B"], "--kernel: 'sage_fp4' is given twice"),
        (["--hardware=mi355x", "--json=x", "--html=./x"], "--json and --html: 'x' is the same file"),
        (["fit", "--json=x", "--write=x"], "--write and --json: 'x' is the same file"),
        (
            ["--recipe=h100", "--recipe=mi355x-singlestream", "--hardware=h200", "--quick"],
            "mi355x-singlestream on h200: attention",
        ),
        (
            ["--recipe=h100", "--recipe=mi355x-singlestream", "--hardware=h200", "--floor"],
            "mi355x-singlestream on h200: attention",
        ),
        (["fit", "--measurements", "none.json"], "measurements 'none.json': cannot be read"),
        (["fit", "--run", "none"], "cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as caught:
        main(arguments)
    assert line in str(caught.value) and "\n" not in str(caught.value)


SHOWN = [words[3:] for words in commands(ROOT / "docs/predict.md") if words[:3] == ["python", "-m", "wan_mlperf.predict"]]
QUICK = [words for words in SHOWN if {"--quick", "--floor"} & set(words)]
SLOW = [pytest.param(words, marks=pytest.mark.slow) for words in SHOWN if words not in QUICK]


@pytest.mark.parametrize("arguments", [*QUICK, *SLOW], ids=" ".join)
def test_the_commands_of_the_page_work(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(QUICK) >= 2 and main(arguments) == 0


def test_a_kernel_is_for_the_recipes_that_use_it(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    both = ["--recipe=h100", "--recipe=b200", "--hardware=h100", "--quick", "--json", str(file)]
    assert main([*both, "--kernel=sage_fp8=SAGE"]) == 0
    h100, b200 = json.loads(file.read_text())["predictions"]
    assert h100["kernels"]["sage_fp8"]["kernel"] == "SAGE" and "sage_fp8" not in b200["kernels"]


@pytest.mark.slow
def test_one_card_of_24_gb_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    mesh = ["--gpus=1", "--set=mesh.cfg=1", "--set=attention.early=sage_fp8", "--set=attention.late=sage_fp8"]
    formats = ["--set=gemm.high_noise=bf16", "--set=gemm.low_noise=bf16"]
    with pytest.raises(BadInput, match=r"rank 0 needs \d+\.\d GB .* and lacks \d+\.\d; allowed: 25\.8 GB") as caught:
        main(["--hardware=rtx4090", *mesh, *formats, "--json", str(file)])
    needs, lacks = (float(one) for one in re.findall(r"needs (\S+) GB .* lacks (\d+\.\d)", str(caught.value))[0])
    assert lacks == pytest.approx(needs - 25.8, abs=0.11) and needs > 2 * 28.6 + 11.4  # both experts and the text encoder
    assert json.loads(file.read_text())["memory_lacking_gb"] == pytest.approx(lacks, abs=0.06)


@pytest.mark.slow
def test_what_fits_an_h100_offline(capsys: pytest.CaptureFixture[str]) -> None:
    """Both experts in fp8 beside a decode in fp32 with chunks of up to 2; in bf16 they leave no room for an fp32 decode."""
    mesh = ["--gpus=1", "--set=mesh.replicas=auto", "--set=mesh.cfg=1", "--set=mesh.ulysses=1"]
    assert main(["--recipe=h100", "--hardware=h100", *mesh, "--fits"]) == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "float" in line]
    fits = {(row[0].strip(), int(row[1])): ["*" not in cell for cell in row[2:]] for row in rows}
    assert fits["float32", 1] == [False, True, True] and fits["float32", 4] == [False, False, True]
    assert fits["bfloat16", 1] == [True, True, True] and fits["bfloat16", 4] == [False, True, True]


@pytest.mark.slow
def test_what_fits_a_mi355x(tmp_path: Path) -> None:
    for form in ("bf16", "mxfp4"):
        file = tmp_path / f"{form}.json"
        formats = [f"--set=gemm.high_noise={form}", f"--set=gemm.low_noise={form}"]
        assert main(["--recipe=mi355x-offline", "--hardware=mi355x", "--gpus=1", *formats, "--json", str(file)]) == 0
        found = json.loads(file.read_text())
        assert found["memory_lacking_gb"] == 0
    bf16, mxfp4 = (json.loads((tmp_path / f"{form}.json").read_text())["memory_gb"] for form in ("bf16", "mxfp4"))
    assert bf16 - mxfp4 == pytest.approx(2 * (28.6 - 8.0) * 1.04, rel=0.02)


def test_the_room_says_what_it_is_for() -> None:
    assert predict.__doc__ and "prices_of" in predict.__doc__
