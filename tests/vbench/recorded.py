"""A recorded result of the vbench package, and a run's folder read and judged as `python -m wan_mlperf.vbench` does."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from wan_mlperf.vbench import __main__ as vbench

# A real result of the vbench package, of four videos of the embedded model. Its checkpoints had random weights, so the
# numbers mean nothing; their form is what is tested.
RECORDED = json.loads((ROOT / "tests/vbench/vbench_raw.json").read_text(encoding="utf-8"))
PROMPTS = (
    "a person swimming in ocean",
    "a person giving a presentation to a room full of colleagues",
    "alley",
    "A beautiful coastal beach in spring, waves lapping on sand, Van Gogh style",
)


def write_prompts(folder: Path, entries: Any) -> None:
    (folder / "prompts.json").write_text(json.dumps(entries))


def read_entries(folder: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((folder / "prompts.json").read_text())
    return entries


def digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


def judge(folder: Path) -> tuple[int, dict[str, Any]]:
    code = vbench.main([str(folder), "--parse-only"])
    summary: dict[str, Any] = json.loads((folder / "vbench" / "summary.json").read_text(encoding="utf-8"))
    return code, summary
