"""Stands in for MLCommons' endpoints client, which needs Python 3.12 and is its user's: its requests, and the files it leaves.

Fields, order, file names and keys are those recorded from the real one at commit ea332753. It does not check its configuration,
measures with one clock, has no event for a sample that failed, and does not judge its audit, which another job on the machine
would decide.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

DEFAULTS = {
    "size": "720x1280",
    "seconds": 5.0,
    "fps": 16,
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
    "guidance_scale_2": 3.0,
    "seed": 42,
    "num_frames": 81,
    "boundary_ratio": 0.875,
    "output_format": "auto",
    "response_format": "video_path",
}


class Client:
    """One call of the client."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.url = f"{config['endpoint_config']['endpoints'][0]}/v1/videos/generations"
        self.at_once = 1 if config["settings"]["load_pattern"]["type"] == "concurrency" else 64
        path = next(one["path"] for one in config["datasets"] if one["type"] == "performance")
        self.rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        self.lines: list[str] = []

    def ask(self, row: dict[str, Any]) -> tuple[str, float]:
        """Send a row; return the video's path ("" if the sample failed) and its seconds."""
        begin = time.perf_counter()
        body = json.dumps({**DEFAULTS, **row}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                found = json.loads(answer.read())
            assert set(found) == {"video_id", "video_path"}
            return found["video_path"], time.perf_counter() - begin
        except (OSError, AssertionError):
            return "", time.perf_counter() - begin

    def phase(self, indices: Sequence[int], *, salt: bool = False) -> dict[str, Any]:
        """Send these rows; return a result summary, and the answers under "answers"."""
        begin = time.perf_counter()
        rows = [self.rows[index] for index in indices]
        if salt:
            rows = [{**row, "prompt": f"[{secrets.token_hex(8)}] {row['prompt']}"} for row in rows]
        with ThreadPoolExecutor(self.at_once) as pool:
            answers = list(pool.map(self.ask, rows))
        failed = sum(1 for path, _ in answers if not path)
        times = sorted(int(1e9 * seconds) for path, seconds in answers if path) or [0]
        at = {str(float(one)): float(times[min(len(times) - 1, len(times) * one // 100)]) for one in (50, 90, 95, 97, 99)}
        return {
            "version": "0.1.0",
            "git_sha": None,
            "n_samples_issued": len(answers),
            "n_samples_completed": len(answers) - failed,
            "n_samples_failed": failed,
            "duration_ns": int(1e9 * (time.perf_counter() - begin)),
            "state": "complete",
            "complete": True,
            "latency": {"avg": sum(times) / len(times), "percentiles": at, "early_stopping_percentiles": {"90.0": None}},
            "answers": [path for path, _ in answers],
        }

    def write(self, folder: Path, summary: dict[str, Any]) -> None:
        """Write the files of one phase."""
        (folder / "performance").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(self.config))
        (folder / "report.txt").write_text("----------------- Summary -----------------\n")
        kept = {key: value for key, value in summary.items() if key != "answers"}
        (folder / "performance" / "result_summary.json").write_text(json.dumps(kept))

    def main(self, folder: Path) -> None:
        """Warm-up, performance, accuracy with its score."""
        settings = self.config["settings"]
        self.phase(range(settings["warmup"]["n_requests"]), salt=True)
        number = settings["runtime"]["n_samples_to_issue"]
        summary = self.phase([index % len(self.rows) for index in range(number)])
        self.write(folder, summary)
        accuracy = next((one for one in self.config["datasets"] if one["type"] == "accuracy"), None)
        if accuracy is None:
            return
        answers = self.phase(range(len(self.rows)))["answers"]
        names = [uuid.uuid4().hex for _ in answers]
        events = [
            {"event_type": "sample.complete", "sample_uuid": name, "data": ["TextModelOutput", path, None, None]}
            for name, path in zip(names, answers, strict=True)
        ]
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        (folder / "sample_idx_map.json").write_text(
            json.dumps({"performance": {}, accuracy["name"]: {name: index for index, name in enumerate(names)}})
        )
        score = self.score(folder, accuracy)
        entry = {"dataset_name": accuracy["name"], "score": score, "total_samples": len(names), "dataset_type": "accuracy"}
        (folder / "accuracy").mkdir(exist_ok=True)
        results = {"average_accuracy": score, "accuracy_scores": [entry]}
        (folder / "accuracy" / "accuracy_results.json").write_text(json.dumps(results))

    def score(self, folder: Path, accuracy: dict[str, Any]) -> float:
        """Have the videos scored, as its own scorer does."""
        extras, name, output = accuracy["accuracy_config"]["extras"], f"vbench_{accuracy['name']}", folder / "vbench_results"
        place = Path(extras["vbench_project_path"])
        assert (place / "vbench_runner.py").exists()
        output.mkdir()
        words = [extras["uv_executable"], "run", "--project", str(place), "python", str(place / "vbench_runner.py")]
        words += ["--videos-dir", str(folder / "vbench_videos"), "--out-dir", str(output), "--name", name]
        subprocess.run([*words, "--dims", "subject_consistency,scene"], check=True)
        found = json.loads((output / f"{name}_eval_results.json").read_text())
        return sum(float(found[one][0]) for one in ("subject_consistency", "scene")) / 2

    def audit(self, folder: Path) -> None:
        """Different samples, then one again and again."""
        wanted = self.config["audit"]
        reference = self.phase(range(wanted["samples"]))
        same = self.phase([wanted["sample_index"]] * wanted["audit_samples"])
        assert reference["n_samples_failed"] == same["n_samples_failed"] == 0
        self.write(folder / "reference", reference)
        self.write(folder / "output_caching", same)
        rates = [one["n_samples_completed"] / one["duration_ns"] for one in (reference, same)]
        verdict = {"test": wanted["test"], "passed": True, "reason": f"{rates[1] / rates[0]:.2f} times as fast, not judged"}
        (folder / "audit_output_caching_test.json").write_text(json.dumps(verdict))
        (folder / "verify_OUTPUT_CACHING_TEST.txt").write_text("Performance check pass: True\n")


def main() -> int:
    """`validate-yaml --config FILE`, or `benchmark from-config --config FILE`."""
    config = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    if sys.argv[1] == "validate-yaml":
        return 0 if config["endpoint_config"]["api_type"] == "videogen" else 2
    client, folder = Client(config), Path(config["report_dir"])
    if not config.get("audit", {}).get("only"):
        client.main(folder)
    if "audit" in config:
        client.audit(folder / "audit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
