"""Counts how often a process verifies a checkpoint: put this folder on PYTHONPATH and name a file in WAN_MLPERF_TEST_COUNT.

Each verification adds a line with the process's number to the file.
"""

from __future__ import annotations

import os

if os.environ.get("WAN_MLPERF_TEST_COUNT"):
    from wan_mlperf import checkpoint as checkpoints

    original = checkpoints.verify

    def verify(checkpoint: checkpoints.Checkpoint) -> None:
        with open(os.environ["WAN_MLPERF_TEST_COUNT"], "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        original(checkpoint)

    checkpoints.verify = verify
