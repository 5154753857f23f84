"""A rank's stage and sample, in memory shared with the ranks of its host, so that they can name them after its death."""

from __future__ import annotations

import mmap
import os


class Note:
    """Stage and sample of a rank, in memory that other ranks of its host map: they can read it after the rank was killed.

    Writing it costs a few bytes in place, so it can be done for every step.
    """

    SIZE = 256

    def __init__(self, process: int | None = None, descriptor: int | None = None) -> None:
        if process is None:
            self.descriptor = os.memfd_create("wan_mlperf-note")
            os.ftruncate(self.descriptor, self.SIZE)
            self._area = mmap.mmap(self.descriptor, self.SIZE)
            self.set("start", "warm-up")
        else:
            with open(f"/proc/{process}/fd/{descriptor}", "rb") as file:
                self._area = mmap.mmap(file.fileno(), self.SIZE, access=mmap.ACCESS_READ)

    def set(self, stage: str, sample: str) -> None:
        """Write the stage and the sample."""
        self._sample = sample
        self._area[:] = f"{stage}\n{sample}".encode()[: self.SIZE].ljust(self.SIZE, b"\0")

    def set_stage(self, stage: str) -> None:
        """Write the stage; the sample stays."""
        self.set(stage, self._sample)

    @property
    def stage(self) -> str:
        """The stage entered last."""
        return self._read()[0]

    @property
    def sample(self) -> str:
        """The sample's number, or several for a batch. Empty while the rank waits for work."""
        return self._read()[1]

    def _read(self) -> tuple[str, str]:
        stage, _, sample = bytes(self._area).rstrip(b"\0").decode(errors="replace").partition("\n")
        return stage, sample


def whereabouts(heartbeat: dict[str, object]) -> str:
    """Say in words the rank, host, stage and sample of a heartbeat."""
    sample = f"sample {heartbeat['sample']}" if heartbeat.get("sample") else "no sample"
    return f"rank {heartbeat.get('rank')} on {heartbeat.get('host')}, stage {heartbeat.get('stage')}, {sample}"


def is_alive(process: int, parent: int) -> bool:
    """True if this process is alive and was started by `parent`: its number may be in use again by another job."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            state, its_parent = file.read().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return state != "Z" and int(its_parent) == parent
