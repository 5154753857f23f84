"""What a submission says about itself beyond its numbers: bandwidth.md, the submitter's README.md, REPRODUCIBILITY.json."""

from __future__ import annotations

from collections.abc import Mapping

from sut.result import Result
from wan_mlperf.checkpoint import HUB_NAME
from wan_mlperf.submit.requirements import Problem
from wan_mlperf.vbench.summary import Summary

RULES_BYTES = 224_870_400  # per video, in the rules' table of egress bandwidth; 81 x 720 x 1280 x 3 is 223,948,800
UNKNOWN = "to be filled in"


def required_bytes_per_s(results: Mapping[str, Result]) -> float:
    """The rules' minimum egress bandwidth in bytes/s: the highest throughput of the submission times a video's bytes."""
    rates = []
    for result in results.values():
        latency = result.latency_mean_s
        rates.append(result.samples_per_second or (1 / latency if latency else 0.0))
    return max(rates, default=0.0) * RULES_BYTES


def bandwidth(results: Mapping[str, Result], measured: Mapping[str, str], stated: str | None) -> str:
    """Return bandwidth.md. `results`: the performance run per scenario; `stated`: a person's own words on the data path."""
    need = required_bytes_per_s(results)
    copies = []
    for scenario, result in results.items():
        size = result.workload["frames"] * result.workload["height"] * result.workload["width"] * 3
        seconds = result.spans.get("to_host", 0.0)
        copies.append(
            f"- {scenario}: of the copy of one video ({size:,} bytes) to host memory, {seconds:.3g} s were not hidden behind the "
            "decode of the frames that follow."
        )
    network = measured.get("network") or UNKNOWN
    own = f"\n## The data path, as the submitter describes it\n\n{stated.strip()}\n" if stated else ""
    return f"""# Bandwidth

The rules ask for the following between the memory that holds LoadGen's data and the network (inference_rules, "Datacenter
Bandwidth Requirements", WAN-2.2-T2V-A14B). Output is uint8, so one byte per value.

| direction | rule | this submission needs |
| --- | --- | --- |
| ingress | more than 0 | prompts of some hundred bytes |
| egress | throughput x {RULES_BYTES:,} x 1 byte | {need / 1e6:.4g} MB/s ({8 * need / 1e9:.3g} Gb/s) |

## What the host has

- Network: {network}. Read from `/sys/class/net/*/speed` by the run itself.
- Links between accelerators and host: {measured.get("pcie") or UNKNOWN}. Read from `current_link_speed` and
  `current_link_width` of each device in `/sys/bus/pci/devices` by the run itself.

Frames go from the accelerators' memory over these links into host memory, where LoadGen reads the response. Measured in the
performance runs:

{chr(10).join(copies)}
{own}"""


def link_problems(results: Mapping[str, Result], measured: Mapping[str, str], stated: str | None) -> list[Problem]:
    """What bandwidth.md still lacks. A person's own description stands for all of it."""
    if stated:
        return []
    absent = [what for what in ("network", "pcie") if not measured.get(what)]
    if measured.get("accelerators_per_node") == "0":
        absent = [what for what in absent if what != "pcie"]  # the frames are made in host memory
    lacks = [
        f"bandwidth: the run could not read the {what} links; allowed: describe them with --bandwidth FILE" for what in absent
    ]
    megabits = sum(int(word) for word in measured.get("network", "").split() if word.isdigit())
    need = 8 * required_bytes_per_s(results) / 1e6
    if measured.get("network") and megabits < need:
        lacks.append(f"bandwidth: the network's {megabits} Mb/s are below the {need:.0f} Mb/s that the rules ask for")
    return [Problem(what=what, seen=False) for what in lacks]


def reproducibility(
    results: Mapping[str, Result], vbench: Mapping[str, Summary], harness: Mapping[str, str]
) -> dict[str, object]:
    """Return REPRODUCIBILITY.json: what to install to do it again.

    `results`: the performance run per scenario; `harness`: version of LoadGen or of the endpoints client, by its name.
    """
    first = next(iter(results.values()))
    return {
        "harness_commit": first.commit,
        "container": first.container,
        "model": {"name": HUB_NAME if first.checkpoint == HUB_NAME else first.checkpoint, "revision": first.model_revision},
        "versions": dict(first.versions),
        "commits": dict(first.commits),
        **harness,
        "accelerator_software": first.system.get("other_software_stack", ""),
        "vbench": {
            scenario: {"versions": dict(summary.versions), "checkpoints": dict(summary.checkpoints)}
            for scenario, summary in vbench.items()
        },
        "recipes": {scenario: result.recipe for scenario, result in results.items()},
    }


def readme(submitter: str, system: str, division: str, notes: Mapping[str, Mapping[str, str]]) -> str:
    """Return the submitter's README.md: what is where. `notes`: per scenario a line on each stage."""
    rows = [f"| {scenario} | {kind} | {note} |" for scenario, lines in notes.items() for kind, note in lines.items()]
    return f"""# {submitter}: Wan2.2-T2V-A14B, MLPerf Inference v6.1, {division} division

System `{system}`, described in `systems/{system}.json`.

| scenario | stage | outcome |
| --- | --- | --- |
{chr(10).join(rows)}

- `results/{system}/wan-2.2-t2v-a14b/<scenario>/README.md`: how to do each scenario again, with its recipe.
- `src/wan-2.2-t2v-a14b/wan_mlperf/`: the code that made the results, and `REPRODUCIBILITY.json`, the versions under it.
- `documentation/calibration.md`: what was quantised and how. `documentation/bandwidth.md`: network and links.
- `accuracy/vbench/` of each scenario: VBench's raw results per dimension, from which `accuracy.txt` was made.
"""
