"""A campaign turned into the benchmark's own, or spoilt, and packed."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from sut.result import Scenario
from tests import run_folders
from tests.run_folders import rewrite
from wan_mlperf.checkpoint import HUB_NAME, HUB_REVISION
from wan_mlperf.submit import submission

SCENARIOS: tuple[Scenario, ...] = ("singlestream", "offline")
PERSON = {
    "status": "available",
    "system_name": "a machine",
    "system_type": "datacenter",
    "host_memory_configuration": "2 x 12 GiB",
    "host_storage_type": "NVMe",
    "host_networking": "Ethernet",
    "host_network_card_count": 1,
    "host_networking_topology": "one host",
    "cooling": "air",
}


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def pack(source: Path, campaign: Path, output: Path, person: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    system = output.parent / "8xGPU.json"
    system.write_text(json.dumps({} if person is None else person))
    options: dict[str, Any] = {"submitter": "ORG", "division": "open", "dry_run": True, "system": system, "output": output}
    return submission.pack(campaign, source=source, **{**options, **changes})


def make_real(campaign: Path, *, score: float = 70.5) -> None:
    """Turn a dry run's campaign into the benchmark's own, scored: all that a closed submission must have."""
    rewrite(campaign / "campaign.json", dry_run=False)
    for run in campaign.glob("2026*"):
        system = json.loads((run / "result.json").read_text())["system"]
        rewrite(
            run / "result.json",
            workload_is_mlperf=True,
            checkpoint=HUB_NAME,
            model_revision=HUB_REVISION,
            noise="fixed latent fixed_latent.pt",
            division="closed",
            division_reasons=[],
            system={**system, "ecc": "on: on 8 of 8 GPUs", "network": "eth0 100000 Mb/s", "pcie": "8 x 32.0 GT/s PCIe x16"},
        )
        if (run / "mlperf_log_detail.txt").is_file():
            run_folders.lengthen(run)
    for run in campaign.glob("*-accuracy"):
        run_folders.score(run, score)


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def spoil(campaign: Path, pattern: str, **changes: Any) -> None:
    for run in campaign.glob(pattern):
        rewrite(run / "result.json", **changes)
