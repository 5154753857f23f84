"""Real LoadGen on a stand-in for the engine at several speeds, the clock of everything scaled by one factor.

Run as `python -m tests.sut.pace_runs FOLDER FACTOR USER_CONF SECONDS[,SECONDS...]`: per speed and scenario a performance run and
a TEST04 run after it, each in a process of its own, as LoadGen reads its built-in mlperf.conf once per process. The stand-in only
sleeps; what it cannot show is how far a real engine's warm-up is off, so it gives its rate as it is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sut import compliance, loadgen, pace, response, user_conf

SAMPLES = 248
FRAMES = np.full(64, 7, np.uint8)
SCENARIOS: tuple[loadgen.Scenario, ...] = ("singlestream", "offline")


def scaled(conf: Path, factor: float) -> str:
    """The user.conf with its times and rates scaled, and LoadGen's own 10 ms with it where the file leaves that to LoadGen."""
    values = {"SingleStream.target_latency": 10.0, **user_conf.read(conf).values}
    scales = {"min_duration": factor, "target_latency": factor, "target_qps": 1 / factor}
    lines = []
    for key, value in values.items():
        number = value * scales.get(key.split(".")[-1], 1.0)
        lines.append(f"*.{key} = {int(number) if number == int(number) else f'{number:.6f}'}\n")
    return "".join(lines)


def run(folder: Path, conf: str, scenario: loadgen.Scenario, seconds: float, reference: Path | None) -> None:
    """One LoadGen test, with the settings that `wan_mlperf.run` makes."""
    folder.mkdir(parents=True)
    (folder / "user.conf").write_text(conf)
    settings = loadgen.make_settings(scenario, "performance", folder / "user.conf", SAMPLES)
    if scenario == "offline":
        reached = compliance.read_score(reference).value if reference else None
        rate = pace.Rate(per_second=reached or 1 / seconds, source="stand-in")
        print(folder.name, pace.aim(settings, folder / "user.conf", rate), flush=True)

    def issue(samples: Sequence[Any]) -> None:
        for sample in samples:
            time.sleep(seconds)
            response.complete(sample.id, FRAMES)

    audit = compliance.AUDIT if reference else None
    loadgen.run(settings, folder=folder, samples=SAMPLES, issue=issue, flush=lambda: None, audit=audit)


def main(arguments: Sequence[str]) -> None:
    """All runs: the speeds side by side, TEST04 when the runs that it is compared with are done."""
    folder, factor = Path(arguments[0]), float(arguments[1])
    conf = scaled(Path(arguments[2]), factor)
    for kind in ("performance", "test04"):
        children = []
        for speed in arguments[3].split(","):
            for scenario in SCENARIOS:
                child = os.fork()
                if not child:
                    reference = folder / f"{scenario}-{speed}-performance" if kind == "test04" else None
                    run(folder / f"{scenario}-{speed}-{kind}", conf, scenario, float(speed) * factor, reference)
                    os._exit(0)
                children.append(child)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)


if __name__ == "__main__":
    main(sys.argv[1:])
