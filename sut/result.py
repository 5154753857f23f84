"""result.json: what one run measured, as one frozen, versioned record that is written and read here only.

To add a field, add it here with a default, because older results of this version lack it, and fill it in `run_record.py`. To
change what a field means, or to drop one, raise VERSION: every command then refuses an older result in one line.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from wan_mlperf.inputs.records import read_record, write_record
from wan_mlperf.predict.predicted import Predicted
from wan_mlperf.step_plan import Step

VERSION = 1
FILE = "result.json"
STRICT = ConfigDict(extra="forbid", strict=True)
LATENCIES = ("latency_mean_s", "latency_p90_s", "latency_early_stopping_s", "latency_percentiles_s")

Scenario = Literal["singlestream", "offline"]
Mode = Literal["performance", "accuracy"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Compliance:
    """The outcome of an audit run, compared with the performance run `reference`, a folder's name.

    Scores are rates, larger is faster; None where LoadGen gave no estimate.
    """

    test: str
    passed: bool
    verdict: str
    reference: str
    reference_score: float | None
    test_score: float | None
    rule: str = ""  # which limit, and where it is from
    reasons: tuple[str, ...] = ()  # what the times of a failed test look like
    reference_seconds: tuple[float, ...] = ()  # per sample, as the reference's `sample_seconds`


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Result:
    """One run. Fields that end in `_s` are seconds; `spans` are mean seconds per stage of one sample.

    `harness`: who asked for the samples, LoadGen or MLCommons' endpoints client.

    `valid` is LoadGen's verdict; `invalid_reason` says why not, also for a test that was stopped. `host` is `doctor`'s one line,
    `system` what a system description needs of the machine. `sample_seconds` are the pipeline's own times, in order.
    `division_reasons`: the choices that make this a run of the open division, none for a closed one (`wan_mlperf/division.py`).
    """

    version: int = VERSION
    scenario: Scenario
    mode: Mode
    harness: Literal["loadgen", "endpoints"] = "loadgen"
    valid: bool
    queries: int
    world_size: int
    mesh: str
    device: str
    checkpoint: str
    noise: str
    kernels: dict[str, str]  # name of attention in the recipe -> what ran
    gemms: dict[str, str] = field(default_factory=dict)  # format of linear layers -> what multiplied
    numerics: dict[str, str] = field(default_factory=dict)  # either name -> what its kernel does to its operands
    recipe: str
    workload: dict[str, int]
    workload_is_mlperf: bool
    spans: dict[str, float]
    prompts_are_mlperf: bool
    generate_mean_s: float
    start_s: float
    experts: tuple[str, ...]
    vae: str = ""  # what the decode computes in
    host: str
    versions: dict[str, str]
    commit: str
    commits: dict[str, str] = field(default_factory=dict)
    container: str = ""
    model_revision: str = "unknown"
    division: Literal["closed", "open"] | None = None  # None: made before this was recorded
    division_reasons: tuple[str, ...] = ()
    system: dict[str, str] = field(default_factory=dict)
    plan: tuple[Step, ...] = ()
    sample_seconds: tuple[float, ...] = ()
    compliance: Compliance | None = None
    latency_mean_s: float | None = None
    latency_p90_s: float | None = None
    latency_early_stopping_s: float | None = None  # None: too few queries for an estimate
    latency_percentiles_s: dict[str, float] | None = None
    samples_per_second: float | None = None
    invalid_reason: str | None = None
    prediction: Predicted | None = None  # None: on hardware that `predict` does not know

    @property
    def absent(self) -> set[str]:
        """The fields that a run of this kind does not have: the file leaves them out."""
        scored_by = self.scenario if self.mode == "performance" else None
        there = {
            **dict.fromkeys(LATENCIES, scored_by == "singlestream"),
            "samples_per_second": scored_by == "offline",
            "compliance": self.compliance is not None,
            "invalid_reason": not self.valid,
            "prediction": self.prediction is not None,
        }
        return {name for name, is_there in there.items() if not is_there}


def write(folder: Path, result: Result) -> None:
    """Write a run folder's result.json."""
    write_record(folder / FILE, result, without=result.absent)


def read(folder: Path) -> Result:
    """Read a run folder's result.json. Raises BadInput if it is missing, incomplete or of another version."""
    return read_record(folder / FILE, Result, version=VERSION, what="a finished run")
