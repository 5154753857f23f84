"""Real LoadGen ends VALID at any speed with our settings, and a run that ran out of work says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sut import compliance, pace, user_conf
from sut.loadgen import read_detail
from tests.conftest import ROOT
from tests.sut.pace_runs import SCENARIOS
from wan_mlperf.recipe import CONFIGS

SPEEDS = ("0.2", "1", "5.8", "9.5")  # seconds per video
FACTOR = 1 / 1000
OLD = """# What an earlier version shipped.
*.SingleStream.target_latency = 30000
*.SingleStream.min_query_count = 64
*.SingleStream.min_duration = 600000
*.Offline.target_qps = 0.06
*.Offline.min_query_count = 248
*.Offline.min_duration = 600000
"""


def start(folder: Path, conf: Path, speeds: str) -> str:
    command = [sys.executable, "-m", "tests.sut.pace_runs", str(folder), str(FACTOR), str(conf), speeds]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_valid_at_every_speed(tmp_path: Path) -> None:
    start(tmp_path, CONFIGS / "mlperf" / "user.conf", ",".join(SPEEDS))
    for scenario in SCENARIOS:
        for speed in SPEEDS:
            for kind in ("performance", "test04"):
                detail = read_detail(tmp_path / f"{scenario}-{speed}-{kind}")
                assert detail["result_validity"] == "VALID", (scenario, speed, kind, detail.get("result_invalid_reason"))
                assert detail["num_errors"] == 0 and pace.explain(detail) is None
                assert bool(detail["effective_performance_issue_same"]) == (kind == "test04")
    for speed in SPEEDS:
        single = read_detail(tmp_path / f"singlestream-{speed}-performance")
        # LoadGen's own 100 queries at least: the estimate leaves out the two slowest.
        assert single["effective_min_query_count"] == 100 and single["result_query_count"] >= 100
        assert int(single["early_stopping_result"].split("Would discard ")[1].split()[0]) >= 2
        # The run folder's user.conf is what LoadGen was told.
        offline = tmp_path / f"offline-{speed}-performance"
        told = user_conf.read(offline / "user.conf").values["Offline.target_qps"]
        assert read_detail(offline)["requested_offline_expected_qps"] == pytest.approx(told)
        assert told == pytest.approx(pace.MARGIN / (float(speed) * FACTOR), rel=1e-3)
    # No more samples than the rules ask for, once these take longer than the time that the rules ask for.
    assert read_detail(tmp_path / "offline-9.5-performance")["effective_samples_per_query"] == 248
    assert compliance.read_score(tmp_path / "offline-9.5-test04").value


def test_a_run_that_ran_out_of_work_says_why(tmp_path: Path) -> None:
    conf = tmp_path / "user.conf"
    conf.write_text(OLD)
    said = start(tmp_path, conf, "0.2")
    assert "warning: target_qps 60, as user.conf states, is too low for 5000 samples/s" in said
    single = pace.explain(read_detail(tmp_path / "singlestream-0.2-performance")) or ""
    assert single.startswith("LoadGen generated only 64 queries ahead, ") and "of the 0.6 s that a test must take" in single
    assert "target_latency 30 ms is above twice the " in single and single.endswith("Take the line out of user.conf")
    offline = pace.explain(read_detail(tmp_path / "offline-0.2-performance")) or ""
    assert offline.startswith("LoadGen asked for 248 samples, done in ") and "target_qps 60 is below the " in offline
    assert "set *.Offline.target_qps = " in offline


class Settings:
    """LoadGen's TestSettings, as far as sut/pace.py reads them."""

    def __init__(self, qps: float = 1.0, duration_s: float = 600.0, least: int = 248) -> None:
        self.offline_expected_qps, self.min_duration_ms, self.min_query_count = qps, 1e3 * duration_s, least


def rate(per_second: float) -> pace.Rate:
    return pace.Rate(per_second=per_second, source="a test")


@pytest.mark.parametrize(("per_second", "samples"), [(0.0731, 248), (0.25, 248), (0.6546, 648), (5.0, 4950)])
def test_how_many_samples_a_rate_asks_for(per_second: float, samples: int) -> None:
    settings: Any = Settings()
    assert pace.offline_samples(settings, rate=rate(per_second)) == samples
    assert samples / per_second >= 600  # even if it turns out to be MARGIN times as fast
    assert pace.expected_queries(settings, "offline", "performance", 248, rate=rate(per_second)) == samples
    assert pace.expected_queries(settings, "offline", "accuracy", 248) == 248
    assert pace.expected_queries(settings, "singlestream", "performance", 248) == 248


def test_a_target_that_the_user_states_is_kept_and_judged(tmp_path: Path) -> None:
    conf, settings = tmp_path / "user.conf", Settings(qps=0.06)
    conf.write_text(OLD)
    assert pace.aim(settings, conf, rate(0.05)) == "target_qps 0.06, as user.conf states, for 0.05 samples/s (a test)"
    line = pace.aim(settings, conf, rate(1.0))
    assert line.startswith("warning: target_qps 0.06") and "would end INVALID after 248 s" in line and "state 1.5" in line
    assert conf.read_text() == OLD and settings.offline_expected_qps == 0.06
