"""What a submission's tree must hold, file by file and field by field: MLCommons' list for round v6.1."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sut import accuracy_log
from wan_mlperf.workload import DIMENSIONS

SCENARIO_FILES = {
    "performance/run_1/mlperf_log_summary.txt",
    "performance/run_1/mlperf_log_detail.txt",
    "accuracy/mlperf_log_summary.txt",
    "accuracy/mlperf_log_detail.txt",
    "accuracy/mlperf_log_accuracy.json",
    "accuracy/accuracy.txt",
    "accuracy/videos/captions.txt",
    *(f"accuracy/videos/{index}.mp4" for index in (130, 106, 84, 59, 12, 123, 43, 22, 238, 32)),
    "TEST04/performance/run_1/mlperf_log_summary.txt",
    "TEST04/performance/run_1/mlperf_log_detail.txt",
    "TEST04/verify_performance.txt",
    "measurements.json",
    "user.conf",
    "README.md",
}
MEASUREMENTS = {
    "input_data_types",
    "retraining",
    "starting_weights_filename",
    "weight_data_types",
    "weight_transformations",
}
SYSTEM_FILLED = {
    "division",
    "submitter",
    "status",
    "system_name",
    "system_type",
    "number_of_nodes",
    "host_processor_model_name",
    "host_processors_per_node",
    "host_processor_core_count",
    "host_memory_capacity",
    "host_memory_configuration",
    "host_storage_capacity",
    "host_storage_type",
    "host_networking",
    "host_network_card_count",
    "host_networking_topology",
    "accelerators_per_node",
    "accelerator_model_name",
    "accelerator_memory_capacity",
    "accelerator_host_interconnect",
    "accelerator_memory_configuration",
    "framework",
    "operating_system",
    "cooling",
    "accelerator_interconnect",
    "other_software_stack",
}
SYSTEM_THERE = {
    "host_processor_frequency",
    "host_processor_caches",
    "host_processor_interconnect",
    "accelerator_frequency",
    "accelerator_interconnect_topology",
    "accelerator_on-chip_memories",
    "hw_notes",
    "sw_notes",
    "system_type_detail",
}


RAW = {f"accuracy/vbench/raw/{name}.json" for name in DIMENSIONS} | {"accuracy/vbench/summary.json"}
REPRODUCIBILITY = {
    *("harness_commit", "container", "model", "versions", "commits", "loadgen", "accelerator_software", "vbench", "recipes"),
}


def check(root: Path, campaign: Path, *, system: str, scored: bool) -> None:
    """Assert that `root` (<division>/<submitter>) is whole; `campaign` holds the accuracy logs that it was made from."""
    results = root / "results" / system / "wan-2.2-t2v-a14b"
    assert {path.name for path in results.iterdir()} == {"SingleStream", "Offline"}
    for scenario in results.iterdir():
        files = {path.relative_to(scenario).as_posix() for path in scenario.rglob("*") if path.is_file()}
        assert files == SCENARIO_FILES | (RAW if scored else set())
        assert all((scenario / name).stat().st_size for name in files)
        check_accuracy(scenario / "accuracy", campaign, scenario.name.lower(), scored=scored)
        assert "TEST PASS" in (scenario / "TEST04" / "verify_performance.txt").read_text().splitlines()
        measurements = json.loads((scenario / "measurements.json").read_text())
        assert set(measurements) == MEASUREMENTS and all(measurements.values())
    description = json.loads((root / "systems" / f"{system}.json").read_text())
    assert set(description) == SYSTEM_FILLED | SYSTEM_THERE
    assert all(description[field] for field in SYSTEM_FILLED)
    assert (description["division"], description["submitter"]) == (root.parent.name, root.name)
    assert {path.name for path in (root / "documentation").iterdir()} == {"calibration.md", "bandwidth.md"}
    assert all(path.stat().st_size for path in (root / "documentation").iterdir())
    assert "224,870,400" in (root / "documentation" / "bandwidth.md").read_text()  # the rules' bytes per video
    assert {path.name for path in root.iterdir()} == {"results", "systems", "src", "documentation", "README.md"}
    code = root / "src" / "wan-2.2-t2v-a14b" / "wan_mlperf"
    assert set(json.loads((code / "REPRODUCIBILITY.json").read_text())) == REPRODUCIBILITY
    # What MLCommons' repository_checks.sh refuses: hidden files, spaces in names, links, files above 50 MB.
    for path in root.rglob("*"):
        assert not path.name.startswith(".") and " " not in path.name and not path.is_symlink(), path
        assert path.is_dir() or path.stat().st_size <= 50 * 2**20, path


def check_accuracy(folder: Path, campaign: Path, scenario: str, *, scored: bool) -> None:
    """The accuracy log is cut, and the hash is that of the whole one; the score is as the checker finds it."""
    (run,) = campaign.glob(f"*-{scenario}-accuracy")
    kept = (folder / "mlperf_log_accuracy.json").read_bytes()
    assert len(kept) <= 10240
    seal = accuracy_log.read_seal(run)
    assert seal is not None and seal.bytes > 10240
    assert kept == (run / "mlperf_log_accuracy.json").read_bytes() and b"\n\n...\n\n" in kept
    lines = (folder / "accuracy.txt").read_text().splitlines()
    assert [line for line in lines if re.fullmatch(r"hash=[0-9a-f]{64}", line)] == [f"hash={seal.sha256}"]
    assert any(re.match(r".*'vbench_score':\s([\d.]+).*", line) for line in lines) == scored
    assert scored or "no VBench score: this tree is from a dry run and is not to be submitted" in lines
    if scored:  # beside the line that the checker reads, the score of each dimension
        assert {line.split(":")[0].strip() for line in lines if line.startswith("  ")} == set(DIMENSIONS)
    captions = dict(line.split("  ", 1) for line in (folder / "videos" / "captions.txt").read_text().splitlines())
    prompts = {str(one["index"]): one["prompt"] for one in json.loads((run / "prompts.json").read_text())}
    for video in (folder / "videos").glob("*.mp4"):
        assert captions[video.stem] == prompts[video.stem]
        assert video.read_bytes() == (run / "videos" / video.name).read_bytes()
