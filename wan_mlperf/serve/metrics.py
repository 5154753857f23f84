"""The metrics that Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

SECONDS = (0.25, 0.5, 1, 2, 4, 8, 12, 16, 20, 25, 30, 40, 60, 120, 240, 600, 1800)


class Metrics:
    """This server's metrics, in a separate registry without prometheus_client's defaults."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._jobs = Gauge("wan_mlperf_jobs", "Unfinished jobs", ["state"], registry=registry)
        outcomes = "Jobs by outcome: completed, failed, cancelled, lost"
        self._videos = Counter("wan_mlperf_videos", outcomes, ["route", "outcome"], registry=registry)
        self._refused = Counter("wan_mlperf_refused", "Answers with status 4xx or 5xx", ["status"], registry=registry)
        self._stages = Summary("wan_mlperf_stage_seconds", "Seconds of a finished video per stage", ["stage"], registry=registry)
        what = "Seconds that a replica worked on a video"
        self._seconds = Histogram("wan_mlperf_video_seconds", what, buckets=SECONDS, registry=registry)

    def watch(self, *, waiting: Callable[[], int], in_flight: Callable[[], int]) -> None:
        """Read the queue's lengths from these functions."""
        self._jobs.labels("waiting").set_function(waiting)
        self._jobs.labels("in_flight").set_function(in_flight)

    def made(self, route: str, spans: Mapping[str, float], seconds: float) -> None:
        """Count a finished video and its seconds."""
        self.ended(route, "completed")
        self._seconds.observe(seconds)
        for stage, value in spans.items():
            self._stages.labels(stage).observe(value)

    def ended(self, route: str, outcome: str) -> None:
        """Count a job that has ended."""
        self._videos.labels(route, outcome).inc()

    def refused(self, status: int) -> None:
        """Count a refused request."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
