"""A run of ours beside its prediction: in result.json, on the report's page, and as a row of `predict fit`.

There is no MI355X here. The run folder has everything that a real one has, and says that it was made on one.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sut import result as results
from sut import run_record
from tests import run_folders
from wan_mlperf.errors import BadInput
from wan_mlperf.parallel.mesh import Shape
from wan_mlperf.predict import fit_command, own_run, work
from wan_mlperf.predict.from_recipe import kernels_of, prices_of
from wan_mlperf.predict.hardware import find
from wan_mlperf.predict.predicted import STAGES, Predicted
from wan_mlperf.recipe import load_recipe, to_yaml
from wan_mlperf.report import run_folder
from wan_mlperf.step_plan import make_plan
from wan_mlperf.workload import MLPERF

RECIPE = load_recipe("mi355x-singlestream")
PLAN = make_plan(RECIPE, MLPERF)
DEVICE = "gfx950: AMD Instinct MI355X"
RAN = {name: f"xDiT {kernel}" for name, kernel in kernels_of({one.attention for one in PLAN}, find("mi355x"), {}).items()}


def expected(**changes: Any) -> Predicted | None:
    given = {
        "device": DEVICE,
        "shape": Shape(replicas=1, cfg=1, ulysses=8, ring=1),
        "kernels": RAN,
        "config": work.published_config("transformer"),
    }
    return own_run.expect(RECIPE, MLPERF, PLAN, **{**given, **changes})


def known() -> Predicted:
    found = expected()
    assert found is not None
    return found


def run_of(folder: Path, prediction: Predicted | None, spans: dict[str, float]) -> Path:
    """A run folder on eight MI355X, with these seconds per stage."""
    values = run_folders.result("singlestream", "performance")
    sizes = {name: getattr(MLPERF, name) for name in ("height", "width", "frames", "fps", "steps", "seed")}
    values |= {"device": DEVICE, "world_size": 8, "mesh": "1 replica x CFG 1 x Ulysses 8", "kernels": RAN, "workload": sizes}
    values |= {"spans": {**values["spans"], **spans}, "generate_mean_s": sum(spans.values())}
    values |= {"plan": [dataclasses.asdict(step) for step in PLAN]}
    if prediction is not None:
        values["prediction"] = dataclasses.asdict(prediction)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(to_yaml(RECIPE))
    (folder / results.FILE).write_text(json.dumps(values))
    return folder


def test_a_run_is_expected_to_be_what_predict_says() -> None:
    found, priced = known(), prices_of(RECIPE, "mi355x", gpus=8).plan(PLAN)
    assert (found.seconds, found.band) == (pytest.approx(priced.seconds), pytest.approx(priced.band))
    assert set(found.stages) == set(STAGES)
    assert sum(found.stages.values()) + priced.parts["host"] == pytest.approx(priced.seconds)
    assert found.stages["vae_decode"] == pytest.approx(priced.parts["vae_decode"])


def test_no_prediction_for_other_hardware_and_a_reason_for_other_kernels() -> None:
    assert expected(device="cpu: AMD EPYC 9005") is None and expected(device="AMD EPYC 9005") is None
    odd = expected(kernels=dict.fromkeys(RAN, "xDiT NOBODY_HAS_THIS"))
    assert odd is not None and "NOBODY_HAS_THIS" in odd.unknown and odd.text.startswith("not predicted: ")
    assert odd.beside({"vae_decode": 1.0}, 1.0) == odd


def test_where_a_run_parts_from_its_prediction_is_named() -> None:
    found = known()
    as_predicted = {name: seconds * 1.01 for name, seconds in found.stages.items()}
    assert found.beside(as_predicted, found.seconds).apart == ()
    slow = {**as_predicted, "denoise_low": 3 * found.stages["denoise_low"]}
    apart = found.beside(slow, found.seconds + 2 * found.stages["denoise_low"]).apart
    assert [line.partition(":")[0] for line in apart] == ["in all", "denoise low"]
    assert f"{slow['denoise_low']:.2f} s measured, {found.stages['denoise_low']:.2f} s predicted" in apart[1]
    small = {**as_predicted, "text_encode": found.stages["text_encode"] + 0.01 * found.seconds}
    assert found.beside(small, found.seconds).apart == ()  # many times its share, and nothing of the whole
    assert found.beside({}, 0.0) == found  # a run that was stopped before its first sample


def test_the_report_and_the_result_show_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spans = {**known().stages, "vae_decode": known().stages["vae_decode"] + 5.0}
    prediction = known().beside(spans, sum(spans.values()))
    folder = run_of(tmp_path / "run", prediction, spans)
    again = results.read(folder)
    assert again.prediction == prediction
    results.write(folder, again)
    assert results.read(folder) == again
    run_folder.write(folder)
    page = (folder / run_folder.PAGE).read_text()
    assert ">predicted</th>" in page and prediction.text in page
    assert f"<li>{next(line for line in prediction.apart if line.startswith('vae decode'))}</li>" in page
    run_record.print_summary(again, folder)
    shown = " ".join(capsys.readouterr().out.split())
    assert "vae decode, mean" in shown and f"predicted {known().stages['vae_decode']:.4f} s" in shown


def test_a_run_elsewhere_says_nothing(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", None, {"vae_decode": 1.0})
    results.write(folder, results.read(folder))
    assert "prediction" not in json.loads((folder / results.FILE).read_text())
    run_folder.write(folder)
    assert "redicted" not in (folder / run_folder.PAGE).read_text()


def test_it_is_a_row_to_fit(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", None, known().stages)
    row = fit_command._own_run(folder)
    assert (row.prices.gpu.name, row.prices.shape.ulysses, row.seconds) == ("MI355X", 8, sum(known().stages.values()))
    assert sum(row.attention.values()) == pytest.approx(1.0) and set(row.attention) <= set(
        word.removeprefix("xDiT ") for word in RAN.values()
    )


def change_plan(folder: Path, **changes: Any) -> Path:
    """Change the first half of the plan's steps."""
    values = json.loads((folder / results.FILE).read_text())
    for step in values["plan"][: len(PLAN) // 2]:
        step.update(changes)
    (folder / results.FILE).write_text(json.dumps(values))
    return folder


def test_a_run_is_refused_as_a_row_if_one_figure_cannot_stand_for_it(tmp_path: Path) -> None:
    some = change_plan(run_of(tmp_path / "some", None, known().stages), guided=False)
    with pytest.raises(BadInput, match="some of its steps are without guidance; allowed: all of them, or none"):
        fit_command._own_run(some)
    layers = change_plan(run_of(tmp_path / "layers", None, known().stages), layers=[["blocks.0.*", "fp8"]])
    with pytest.raises(BadInput, match="linear layers in fp8 and mxfp4; allowed: one format"):
        fit_command._own_run(layers)
