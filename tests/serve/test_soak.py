"""Ten minutes at twice what the server can make: memory stays flat, and every job that was accepted is finished.

`python -m tests.serve.test_soak RECIPE SECONDS` prints the figures of a run, for docs/results/.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.replicas import jobs
from tests.serve.client import Server

WAITING = 32


def memory_mb(server: Server) -> float:
    """Resident memory of all processes of the server."""
    total = 0
    for process in server.job.survivors():
        status = Path(f"/proc/{process}/status").read_text()
        total += int(status.split("VmRSS:")[1].split()[0]) if "VmRSS:" in status else 0
    return total / 1024


def soak(server: Server, seconds: float) -> dict[str, Any]:
    """Send twice as many jobs as are finished, beside clients that always hold a request; return what was seen."""
    accepted: list[str] = []
    refused: list[int] = []
    memory: list[float] = []
    held: list[int] = []
    finished = 0
    begin = time.monotonic()

    def hold() -> None:
        while time.monotonic() - begin < seconds:
            held.append(server.ask("POST", "/v1/videos/generations", {"prompt": "a held request"}, timeout=900).status)

    def send() -> None:
        while time.monotonic() - begin < seconds:
            if len(accepted) + len(refused) > 2 * finished + WAITING:
                time.sleep(0.02)
                continue
            answer = server.ask("POST", "/v1/videos", {"prompt": f"job {len(accepted)}", "preview": len(accepted) % 2 == 0})
            if answer.status == 200:
                accepted.append(answer.json["id"])
            else:
                refused.append(answer.status)

    # Several senders: on a busy machine one alone sends no faster than the server works.
    threads = [threading.Thread(target=one) for one in [hold] * 4 + [send] * 4]
    for thread in threads:
        thread.start()
    while (elapsed := time.monotonic() - begin) < seconds:
        finished = len(accepted) - len(server.ask("GET", "/live").json["jobs"])
        if len(memory) < elapsed / 5:
            memory.append(memory_mb(server))
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    while server.ask("GET", "/live").json["jobs"]:
        time.sleep(0.5)
    states = []
    after = ""
    while True:
        page = server.ask("GET", f"/v1/videos?limit=100&order=asc{after}").json
        states += page["data"]
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    known = {video["id"]: video["status"] for video in states}
    return {
        "seconds": seconds,
        "accepted": len(accepted),
        "held": len(held),
        "refused": len(refused),
        "other_answers": [status for status in refused if status != 429],
        "unfinished": [one for one in accepted if known.get(one) != "completed"],
        "held_failed": [status for status in held if status != 200],
        "memory_mb": [round(value) for value in memory],
    }


def check(seen: dict[str, Any]) -> None:
    """Memory after the first quarter and at the end differ by little more than the jobs themselves."""
    assert seen["unfinished"] == seen["held_failed"] == seen["other_answers"] == [], seen
    assert seen["accepted"] + seen["refused"] > 1.8 * seen["accepted"] and seen["refused"] > 0, seen
    memory = seen["memory_mb"]
    quarter = len(memory) // 4
    early, late = sorted(memory[quarter : 2 * quarter])[quarter // 2], sorted(memory[-quarter:])[quarter // 2]
    assert late - early < 0.03 * early + 0.005 * (seen["accepted"] + seen["held"]), seen


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_minutes_at_twice_what_it_can_do(tmp_path: Path, model: Path) -> None:
    recipe = jobs.write_recipe(tmp_path, model)
    with Server(recipe, tmp_path / "videos", "--most-waiting", str(WAITING)).ready().running() as server:
        check(soak(server, 600.0))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        running = Server(Path(sys.argv[1]), Path(place), "--most-waiting", str(WAITING)).ready()
        print(json.dumps(soak(running, float(sys.argv[2]))))
        running.stop()
