"""Real LoadGen around a stub of the engine, in a separate process, because LoadGen reads its mlperf.conf once per process.

Run as `python -m tests.engine_stub FOLDER SCENARIO MODE SECONDS [audit] [cache]`; leaves LoadGen's own logs in FOLDER. With
`cache` the stub answers a sample that it has seen before without any work, which is what TEST04 must find.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import ROOT

SAMPLES = 248
FRAMES = np.full(64, 7, np.uint8)
USER_CONF = """*.SingleStream.min_query_count = 64
*.SingleStream.min_duration = 0
*.Offline.min_query_count = 248
*.Offline.min_duration = 0
"""


def make_logs(folder: Path, scenario: str, mode: str, *, seconds: float = 0.0, audit: bool = False, cache: bool = False) -> None:
    """Run LoadGen in a separate process. `seconds` is what each sample takes."""
    words = [*(["audit"] if audit else []), *(["cache"] if cache else [])]
    command = [sys.executable, "-m", "tests.engine_stub", str(folder), scenario, mode, str(seconds), *words]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)


def main(arguments: Sequence[str]) -> None:
    from sut import compliance, loadgen, response

    folder, scenario, mode, seconds = Path(arguments[0]), arguments[1], arguments[2], float(arguments[3])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "user.conf").write_text(USER_CONF)
    settings = loadgen.make_settings(scenario, mode, folder / "user.conf", SAMPLES)  # type: ignore[arg-type]
    seen: set[int] = set()

    def issue(samples: Sequence[Any]) -> None:
        for sample in samples:
            if not ("cache" in arguments and sample.index in seen):
                time.sleep(seconds)
            seen.add(sample.index)
            response.complete(sample.id, FRAMES)

    audit = compliance.AUDIT if "audit" in arguments else None
    loadgen.run(settings, folder=folder, samples=SAMPLES, issue=issue, flush=lambda: None, audit=audit)


if __name__ == "__main__":
    main(sys.argv[1:])
