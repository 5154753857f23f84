"""One scenario measured by MLCommons' endpoints client: a server of this system, the client next to it, and their results.

`submit run --harness endpoints` starts it as a separate process: `python -m wan_mlperf.submit.client_run`. The run folder is
the client's report folder, and also holds `result.json` and the accuracy run's `videos/`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from sut import machine, prompts, run_record
from sut import result as results
from sut.result import Scenario
from wan_mlperf import cli, preflight, process
from wan_mlperf.doctor.checks import verdict
from wan_mlperf.errors import BadInput, Failed
from wan_mlperf.files import atomic_write
from wan_mlperf.recipe import Recipe, to_yaml
from wan_mlperf.submit import client, client_results

PR_SET_PDEATHSIG = 1  # from Linux's sys/prctl.h
STOP_S = 60.0  # how long the server may take to end
LOOK_S = 2.0  # how often the progress is read


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit code."""
    parser = cli.Parser(prog="python -m wan_mlperf.submit.client_run", description=__doc__)
    cli.add_recipe_arguments(parser)
    parser.add_argument("--scenario", required=True, choices=("singlestream", "offline"))
    parser.add_argument("--client", type=cli.path, required=True)
    parser.add_argument("--outputs", type=cli.path, required=True)
    parser.add_argument("--audit-of", type=cli.path, metavar="RUN", help="only the audit, for this run")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    program = client.find(options.client)
    recipe = preflight.recipe_from(options, scenario=options.scenario)
    measurement = Measurement(options.scenario, program, recipe, dry_run=options.dry_run)
    if options.audit_of is not None:
        run = Path(options.audit_of).resolve()
        with measurement.serving(run, options) as address:
            measurement.audit(run, address)
        return process.DONE
    run = run_record.make_folder(Path(options.outputs), options.scenario, "performance").resolve()
    atomic_write(run / "recipe.yaml", to_yaml(recipe))
    begun = time.monotonic()
    with measurement.serving(run, options) as address:
        start_s = time.monotonic() - begun
        measurement.measure(run, address, start_s=start_s)
        measurement.audit(run, address)
    run_record.point_latest(run)
    return process.DONE if results.read(run).valid else process.INVALID


class Measurement:
    """The client's calls for one scenario."""

    def __init__(self, scenario: Scenario, program: Path, recipe: Recipe, *, dry_run: bool) -> None:
        self._scenario, self._program, self._dry_run = scenario, program, dry_run
        self._workload, self._checkpoint = recipe.effective_workload, recipe.model.checkpoint
        self._prompts = prompts.benchmark_prompts()
        self._server: subprocess.Popen[str] | None = None

    @contextlib.contextmanager
    def serving(self, run: Path, options: argparse.Namespace) -> Iterator[str]:
        """Check the client's configuration, start the server and yield its address; stop it at the end."""
        rows = run / "wan22_prompts.jsonl"
        client.write_rows(rows, self._prompts, self._workload)
        client.write_scorer(run)
        self._config = client.configuration(self._scenario, rows=rows, run=run, dry_run=self._dry_run)
        trial = _write(run / "client.yaml", client.main_of(self._config, "http://127.0.0.1:1"))
        client.check(self._program, trial)
        words = [sys.executable, "-m", "wan_mlperf.serve", "--port", "0", "--folder", str(run / "served")]
        words += ["--recipe", options.recipe or preflight.default_recipe(self._scenario)]
        words += ["--model", options.model] if options.model is not None else []
        words += [f"--set={change}" for change in options.set] + (["--exact"] if options.exact else [])
        self._server = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace", preexec_fn=_end_with_parent
        )
        try:
            yield self._await_server()
            self._server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(STOP_S)
            if results.read(run).valid:  # what counts has been moved to videos/
                shutil.rmtree(run / "served", ignore_errors=True)
        finally:
            if self._server.poll() is None:
                self._server.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._server.wait(STOP_S)
                self._server.kill()

    def _await_server(self) -> str:
        server = self._server
        assert server is not None and server.stdout is not None
        for line in server.stdout:
            process.tell(line.rstrip())
            if found := re.search(r"ready at (http://\S+)", line):
                threading.Thread(target=server.stdout.read, daemon=True).start()  # so that it can go on writing
                return found[1]
        code = server.wait()
        if code == process.BAD_INPUT:
            raise BadInput("the server refuses its recipe; allowed: as the line above says")
        raise Failed(f"the server ended with exit code {code} before it was ready")

    def measure(self, run: Path, address: str, *, start_s: float) -> None:
        """Performance and accuracy: run the client, keep the accuracy run's videos, write result.json."""
        made_by = {**_get(f"{address}/about")["made_by"], "checkpoint": self._checkpoint}
        planned = client.samples(self._config, len(self._prompts))
        planned.pop("audit")
        config = _write(run / "client.yaml", client.main_of(self._config, address))
        code = self._call(config, run / "client.log", address, total=sum(planned.values()), what="videos")
        stages = client_results.mean_stages(_text(f"{address}/metrics"))
        stopped = (
            None if code == 0 else f"the client ended with exit code {code} ({client_results.last_error(run / 'client.log')})"
        )
        videos = client_results.keep_videos(run, self._prompts)
        result = client_results.write_result(
            run,
            made_by,
            scenario=self._scenario,
            prompts=self._prompts,
            planned=planned["performance"],
            videos=videos,
            stages=stages,
            start_s=start_s,
            host=verdict(outputs=run.parent),
            system=machine.measure(run, world=made_by["world_size"]),
            stopped=stopped,
        )
        run_record.print_summary(result, run)

    def audit(self, run: Path, address: str) -> None:
        """The output-caching audit, MLCommons' TEST04 for endpoints, into `audit/` of the run."""
        result = results.read(run)
        if not result.valid:
            return
        shutil.rmtree(run / client_results.AUDIT, ignore_errors=True)
        total = client.samples(self._config, 0)["audit"]
        config = _write(run / "audit.yaml", client.audit_of(self._config, address))
        code = self._call(config, run / "audit.log", address, total=total, what="videos of the audit")
        if client_results.audit(run) is None:
            reason = client_results.last_error(run / "audit.log")
            raise Failed(f"the client's audit ended with exit code {code} and no verdict ({reason})")

    def _call(self, config: Path, log: Path, address: str, *, total: int, what: str) -> int:
        """Run the client with its output in `log`; show how many videos it has got. Returns its exit code."""
        before = _completed(address)
        words = [str(self._program), "benchmark", "from-config", "--config", str(config)]
        progress, shown = cli.Progress(what, total), 0
        with log.open("w", encoding="utf-8") as stream:
            running = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, cwd=log.parent)
            try:
                while running.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        running.wait(LOOK_S)
                    if self._server is None or self._server.poll() is not None:
                        raise Failed("the server has ended; the lines above say why")
                    done = min(total, _completed(address) - before)
                    for _ in range(done - shown):
                        progress.advance()
                    shown = max(shown, done)
            finally:
                progress.close()
                if running.poll() is None:
                    running.terminate()
                    running.wait()
        return running.returncode


def _end_with_parent() -> None:
    """In a child: SIGTERM when its parent dies, so that a killed measurement leaves no server that holds the GPUs."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _write(file: Path, config: dict[str, object]) -> Path:
    atomic_write(file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return file


def _text(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


def _get(url: str) -> Any:
    return json.loads(_text(url))


def _completed(address: str) -> int:
    found = re.search(
        r'^wan_mlperf_videos_total\{outcome="completed",route="generations"\} (\S+)', _text(f"{address}/metrics"), re.M
    )
    return int(float(found[1])) if found else 0


if __name__ == "__main__":
    process.entry(main)
