"""What holds where nobody says anything: the recipe of a card, and the benchmark's workload."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from wan_mlperf import load_recipe, preflight
from wan_mlperf.errors import BadInput
from wan_mlperf.kernels.device import Device
from wan_mlperf.workload import MLPERF


@pytest.mark.parametrize(
    ("card", "names"),
    [
        (None, ["tiny", "tiny-offline"]),
        (("gfx950", "AMD Instinct MI355X"), ["mi355x-singlestream", "mi355x-offline"]),
        (("gfx950", "AMD Instinct MI350X"), ["mi350x-singlestream", "mi350x-offline"]),
        (("gfx942", "AMD Instinct MI300X"), ["mi355x-singlestream", "mi355x-offline"]),
        (("sm90", "NVIDIA H100 80GB HBM3"), ["h100", "h100-offline"]),
        (("sm90", "NVIDIA H200"), ["h200", "h200-offline"]),
        (("sm90", "NVIDIA H200 NVL"), ["h200", "h200-offline"]),
        (("sm90", "NVIDIA GH200 480GB"), ["h100", "h100-offline"]),
        (("sm100", "NVIDIA B200"), ["b200", "b200-offline"]),
        (("sm103", "NVIDIA GB300"), ["b200", "b200-offline"]),
        (("sm120", "NVIDIA GeForce RTX 5090"), ["h100", "h100-offline"]),
    ],
)
def test_each_card_has_a_recipe_of_its_own(
    card: tuple[str, str] | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the card can run: h100's FP8 attention has no kernel on a B200."""
    found = None if card is None else Device(arch=card[0], name=card[1], torch=torch.device("cuda", 0))
    monkeypatch.setattr(preflight.device, "gpu_count", lambda: int(card is not None))
    monkeypatch.setattr(preflight.device, "probe", lambda: found)
    assert [preflight.default_recipe(scenario) for scenario in ("singlestream", "offline")] == names
    for name in names:
        assert load_recipe(name).name == name


def test_one_value_of_the_benchmarks_workload_changes() -> None:
    changed = load_recipe("h100", overrides=["workload.steps=2", "workload.frames=17"])
    assert changed.effective_workload == dataclasses.replace(MLPERF, steps=2, frames=17)
    assert load_recipe("h100").workload is None
    tiny = load_recipe("tiny", overrides=["workload.steps=2"])
    assert tiny.effective_workload == dataclasses.replace(load_recipe("tiny").effective_workload, steps=2)
    with pytest.raises(BadInput, match=r"workload.steps: 0 is not allowed"):
        load_recipe("h100", overrides=["workload.steps=0"])
