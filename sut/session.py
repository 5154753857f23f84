"""One LoadGen test, from loading to the verdict. Every rank works; rank 0 also runs LoadGen and writes the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sut import accuracy_log, compliance, loadgen, pace, run_record
from sut.result import Compliance, Mode, Result, Scenario
from sut.system import Accuracy, SystemUnderTest
from sut.video_writer import VideoWriter
from wan_mlperf import cli, process
from wan_mlperf.pipeline import Pipeline
from wan_mlperf.preflight import Setup
from wan_mlperf.replicas import dispatch
from wan_mlperf.replicas.dispatch import Dispatcher
from wan_mlperf.replicas.messages import Job
from wan_mlperf.replicas.watch import Watch

COLLECTIVE_S = 24 * 3600.0  # how long a collective may wait; the watch finds a rank that hangs much sooner


@dataclass(frozen=True, kw_only=True)
class Test:
    """What LoadGen is to test. `audit` is MLCommons' audit file, and `reference` the performance run to compare with.

    With `keep_accuracy_log`, LoadGen's whole accuracy log is kept. `started` is when the process started, by time.perf_counter.
    """

    scenario: Scenario
    mode: Mode
    settings: Any
    prompts: Sequence[str]
    outputs: Path
    audit: Path | None
    reference: Path | None
    keep_accuracy_log: bool
    started: float


def run(test: Test, setup: Setup, watch: Watch, *, on_finished: Callable[[Path], None]) -> int:
    """On every rank: load the pipeline and work until LoadGen has all responses. Returns the exit code.

    On rank 0, `on_finished` gets the run folder once the result is written.
    """
    engine = Pipeline.load(setup, timeout_s=COLLECTIVE_S)
    watch.follow(engine.spans)
    rate = _warm_up(test, engine)
    dispatcher = dispatch.start(engine, watch, pack=lambda frames: frames)
    if engine.mesh.rank:
        dispatcher.serve()
        code = process.DONE
    else:
        code = _Session(test, engine, watch, dispatcher, rate).run(on_finished)
    engine.mesh.close()
    return code


def _warm_up(test: Test, engine: Pipeline) -> pace.Rate | None:
    """Warm up. Returns the rate to set Offline's target from, on rank 0; None if the test does not need one."""
    queries, batch = engine.recipe.warmup_queries, engine.recipe.offline.batch
    if not pace.matters(test.settings, test.scenario, test.mode):
        engine.warm_up(queries, batch=batch)
        return None
    if queries and test.audit is None and not pace.is_stated(engine.recipe.user_conf_path):
        queries = max(2, queries)  # the first one compiles, so it says nothing about the rate
    seconds = engine.warm_up(queries, batch=batch)
    if engine.mesh.rank:
        return None
    if test.reference is not None:
        reached = compliance.read_score(test.reference).value
        return pace.Rate(per_second=reached, source=f"the performance run {test.reference.name}") if reached else None
    return pace.Rate(per_second=engine.mesh.shape.replicas / seconds, source="the last warm-up") if seconds else None


class _Session:
    """Rank 0's part: the run folder, LoadGen, the result."""

    def __init__(self, test: Test, engine: Pipeline, watch: Watch, dispatcher: Dispatcher, rate: pace.Rate | None) -> None:
        self._test, self._engine, self._watch, self._dispatcher = test, engine, watch, dispatcher
        self._start_s = time.perf_counter() - test.started
        self._folder = self._make_folder()
        self._expected = run_record.expect(engine)  # before the test, because nothing may fail after it
        if rate is not None:
            print(pace.aim(test.settings, self._folder / "user.conf", rate), flush=True)
        total = pace.expected_queries(test.settings, test.scenario, test.mode, len(test.prompts), audit=test.audit)
        self._progress = cli.Progress(f"{test.scenario} {test.mode}", total)
        self._accuracy: Accuracy | None = None
        if test.mode == "accuracy":
            videos = VideoWriter(self._folder / "videos", engine.workload, on_failure=watch.fail)
            self._accuracy = Accuracy(videos=videos, backlog=accuracy_log.Backlog(self._folder))
        self._system = SystemUnderTest(
            dispatcher,
            test.prompts,
            accuracy=self._accuracy,
            on_sample=self._progress.advance,
            on_lost=self._on_lost,
            on_failure=watch.fail,
        )

    def run(self, on_finished: Callable[[Path], None]) -> int:
        """Let LoadGen ask, write the result, and return the exit code."""
        test, folder = self._test, self._folder
        self._watch.on_end = self._on_end
        self._dispatcher.run(self._ask)
        self._progress.close()
        if self._accuracy is not None:
            self._accuracy.videos.close()
            accuracy_log.seal(folder, keep=test.keep_accuracy_log)
        verdict = compliance.verify(folder, test.reference, self._system.generate_s) if test.reference else None
        result = self._write_result(verdict=verdict)
        self._watch.on_end = lambda _reason: None
        run_record.point_latest(folder)
        on_finished(folder)
        run_record.print_summary(result, folder)
        return process.DONE if result.valid and (verdict is None or verdict.passed) else process.INVALID

    def _make_folder(self) -> Path:
        test, engine = self._test, self._engine
        folder = run_record.make_folder(test.outputs, test.scenario, "test04" if test.audit else test.mode)
        run_record.write_inputs(folder, engine)
        if test.mode == "accuracy":
            (folder / "videos").mkdir()
            run_record.write_prompts(folder, test.prompts)
        mesh = engine.mesh
        process.tell(f"{engine.recipe.name}: {mesh.shape}, {mesh.device}; {'; '.join(engine.load_summary)}")
        return folder

    def _ask(self) -> None:
        test, system = self._test, self._system
        loadgen.run(
            test.settings,
            folder=self._folder,
            samples=len(test.prompts),
            issue=system.issue,
            flush=system.flush,
            audit=test.audit,
        )

    def _on_lost(self, job: Job, reason: str) -> None:
        # LoadGen would wait for this response forever, and must not get a false one. So the run ends here and keeps what is done.
        self._watch.end(f"INVALID: sample {job.sample} failed {job.attempt} times: {reason}; see {self._folder}", process.INVALID)

    def _on_end(self, reason: str) -> None:
        self._progress.close()
        self._write_result(stopped=reason)

    def _write_result(self, *, stopped: str | None = None, verdict: Compliance | None = None) -> Result:
        return run_record.write_result(
            self._folder,
            self._engine,
            prompts=self._test.prompts,
            compliance=verdict,
            scenario=self._test.scenario,
            mode=self._test.mode,
            spans=self._system.spans,
            generate_s=self._system.generate_s,
            start_s=self._start_s,
            stopped=stopped,
            expected=self._expected,
        )
