"""What the closed division asks for: each thing that is missing is named, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import run_folders
from tests.run_folders import audit_outcome, rewrite
from tests.submit.packing import PERSON, make_real, pack, spoil
from wan_mlperf.checkpoint import HUB_REVISION
from wan_mlperf.errors import BadInput


def edit_log(run: Path, key: str, value: str) -> None:
    """Change a value of LoadGen's detail log."""
    log = run / "mlperf_log_detail.txt"
    text, number = re.subn(rf'("key": "{key}", "value": )[^,]+', rf"\g<1>{value}", log.read_text())
    assert number
    log.write_text(text)


def change(pattern: str, **changes: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda campaign, _: spoil(campaign, pattern, **changes)


def change_system(field: str, value: str, pattern: str = "2026*") -> Callable[[Path, dict[str, Any]], None]:
    def apply(campaign: Path, _: dict[str, Any]) -> None:
        for run in campaign.glob(pattern):
            system = json.loads((run / "result.json").read_text())["system"]
            rewrite(run / "result.json", system={**system, field: value})

    return apply


def change_log(pattern: str, key: str, value: str) -> Callable[[Path, dict[str, Any]], None]:
    def apply(campaign: Path, _: dict[str, Any]) -> None:
        (run,) = campaign.glob(pattern)
        edit_log(run, key, value)

    return apply


def remove(pattern: str, name: str) -> Callable[[Path, dict[str, Any]], None]:
    def apply(campaign: Path, _: dict[str, Any]) -> None:
        (run,) = campaign.glob(pattern)
        (run / name).unlink()

    return apply


LATENT = "model.fixed_latent: the noise is drawn from seed 42, not MLCommons' fixed_latent.pt"
ONE_MISSING: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]] = {
    "fixed latent": (change("*-offline-accuracy", division_reasons=[LATENT]), f"offline accuracy: {LATENT}"),
    "duration": (
        change_log("*-offline-performance", "effective_min_duration_ms", "60000"),
        "offline performance: min_duration is 60 s; allowed: 600 s or more",
    ),
    "queries": (
        change_log("*-singlestream-performance", "result_query_count", "20"),
        "singlestream performance: 20 queries; allowed: 64 or more",
    ),
    "samples": (
        change_log("*-offline-performance", "effective_samples_per_query", "100"),
        "offline performance: 100 samples; allowed: 248 or more",
    ),
    "accuracy samples": (
        change_log("*-offline-accuracy", "effective_accuracy_sample_count", "100"),
        "offline accuracy: 100 accuracy samples; allowed: 248",
    ),
    "performance sample count": (
        change_log("*-singlestream-performance", "effective_performance_sample_count", "20"),
        "singlestream performance: performance sample count 20; allowed: 50 or more",
    ),
    "seed": (
        change_log("*-offline-performance", "effective_qsl_rng_seed", "7"),
        "offline performance: qsl_rng_seed is 7; allowed: 2085463073848966840, that of v6.1",
    ),
    "LoadGen's errors": (
        change_log("*-offline-performance", "num_errors", "2"),
        "offline performance: 2 errors in LoadGen's log",
    ),
    "TEST04": (
        change("*-singlestream-test04", compliance=audit_outcome("x", "TEST FAIL: one repeated sample is 40.0% faster")),
        "singlestream test04: TEST FAIL: one repeated sample is 40.0% faster",
    ),
    "open choice": (
        change("*-offline-*", division_reasons=["guidance: no negative branch in steps 18 to 19"]),
        "offline performance, offline accuracy, offline test04: guidance: no negative branch in steps 18 to 19",
    ),
    "revision": (
        change("2026*", model_revision="0" * 40),
        f"model revision {'0' * 40}; allowed: {HUB_REVISION}",
    ),
    "ECC off": (change_system("ecc", "off: off on 1 of 8 GPUs"), "ECC is off: off on 1 of 8 GPUs; allowed: on"),
    "ECC unknown": (change_system("ecc", "unknown: DRAM not exposed here"), "system: whether ECC is on is unknown"),
    "nodes": (lambda _, person: person.update(number_of_nodes=2), "system: number_of_nodes is 2, but '1' ran"),
    "one system": (
        change_system("accelerator_model_name", "another", "*-offline-*"),
        "the runs are of different systems: accelerator_model_name is none and another",
    ),
    "network": (change_system("network", ""), "bandwidth: the run could not read the network links; allowed: describe them"),
    "slow network": (change_system("network", "eth0 100 Mb/s"), "bandwidth: the network's 100 Mb/s are below the 720 Mb/s"),
    "description": (lambda _, person: person.update(cooling=""), "system: to be filled in: cooling"),
    "audit video": (remove("*-offline-accuracy", "videos/123.mp4"), "offline accuracy: audit video 123 is not there"),
    "accuracy log": (
        remove("*-offline-accuracy", "mlperf_log_accuracy.json"),
        "offline accuracy: mlperf_log_accuracy.json is not",
    ),
    "score": (remove("*-offline-accuracy", "accuracy.txt"), "offline vbench: no score of the whole run"),
}


@pytest.mark.parametrize("name", ONE_MISSING)
def test_one_thing_is_missing_and_exactly_that_is_named(copy: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    source, campaign = copy
    make_real(campaign)
    spoil_one, says = ONE_MISSING[name]
    person = dict(PERSON)
    spoil_one(campaign, person)
    with pytest.raises(BadInput) as refused:
        pack(source, campaign, tmp_path / "out", person, division="closed", dry_run=False)
    head, listed = str(refused.value).split(" missing: ", 1)
    assert head.endswith("cannot be packed for the closed division, 1 thing is"), refused.value
    assert says in listed
    assert not (tmp_path / "out").exists()


def test_several_missing_things_are_one_list(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    make_real(campaign)
    person, names = dict(PERSON), ("duration", "ECC off", "description", "audit video", "score", "TEST04")
    for name in names:
        ONE_MISSING[name][0](campaign, person)
    (source / "new.py").write_text("")
    with pytest.raises(BadInput, match="7 things are missing: the source tree is dirty") as refused:
        pack(source, campaign, tmp_path / "out", person, division="closed", dry_run=False)
    assert all(ONE_MISSING[name][1] in str(refused.value) for name in names)


def test_what_a_person_may_state(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    make_real(campaign)
    ONE_MISSING["ECC unknown"][0](campaign, {})
    ONE_MISSING["network"][0](campaign, {})
    (tmp_path / "path.md").write_text("Two NICs of 100 Gb/s on the sockets' own PCIe roots.\n")
    person = {**PERSON, "hw_notes": "ECC enabled, seen with edac-util"}
    options: dict[str, Any] = {"division": "closed", "dry_run": False, "bandwidth": tmp_path / "path.md"}
    assert pack(source, campaign, tmp_path / "out", person, **options) == []
    assert "Two NICs of 100 Gb/s" in (tmp_path / "out" / "closed" / "ORG" / "documentation" / "bandwidth.md").read_text()
    for text, says in (("", "is empty"), (None, "cannot be read")):
        (tmp_path / "path.md").write_text(text) if text is not None else (tmp_path / "path.md").unlink()
        with pytest.raises(BadInput, match=says):
            pack(source, campaign, tmp_path / "other", person, **options)


def test_only_one_scenario_is_for_the_open_division(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    make_real(campaign)
    rewrite(campaign / "campaign.json", recipes={"offline": run_folders.RECIPE})
    with pytest.raises(BadInput, match="1 thing is missing: the closed division asks for singlestream, too"):
        pack(source, campaign, tmp_path / "out", PERSON, division="closed", dry_run=False)
    pack(source, campaign, tmp_path / "out", PERSON, dry_run=False)


def test_a_score_below_the_floor_is_for_the_open_division(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    make_real(campaign, score=69.5)
    with pytest.raises(BadInput, match=r"singlestream vbench, offline vbench: VBench 69\.5000 is below 69\.7752"):
        pack(source, campaign, tmp_path / "out", PERSON, division="closed", dry_run=False)
    pack(source, campaign, tmp_path / "out", PERSON, dry_run=False)
