"""A run's videos -> the MLPerf accuracy score: `python -m wan_mlperf.vbench outputs/latest`.

Scores six dimensions of VBench in a separate environment (`--setup` builds it once) and writes `accuracy.txt`,
`vbench/summary.json` and, per dimension, `vbench/raw/<dimension>.json`. A dimension that was already scored for exactly these
videos and checkpoints is not scored again. Exit codes: 0 the benchmark's score reaches the floor, 1 it does not or is incomplete,
2 bad input, 3 failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sut import accuracy_log
from sut import result as results
from wan_mlperf import cli, process
from wan_mlperf.errors import BadInput, Failed, choose
from wan_mlperf.files import atomic_write, writable_folder
from wan_mlperf.vbench import checkpoints as vbench_checkpoints
from wan_mlperf.vbench import environment as vbench_environment
from wan_mlperf.vbench import score as vbench_score
from wan_mlperf.vbench import summary as vbench_summary
from wan_mlperf.vbench import videos as vbench_videos
from wan_mlperf.vbench.environment import WORKER, Environment
from wan_mlperf.vbench.summary import Summary
from wan_mlperf.vbench.videos import Videos
from wan_mlperf.workload import DIMENSIONS

LISTED = 10  # lines of a list that are printed; summary.json has them all


def main(arguments: Sequence[str]) -> int:
    """Set up, score, judge, and return the exit code."""
    options = parse(arguments)
    if options.setup:
        vbench_environment.setup(options.torch)
        if options.folder is None:
            return process.DONE
    folder = Path(options.folder)
    if not folder.is_dir():
        raise BadInput(f"{options.folder!r} is not a folder; allowed: an accuracy run's folder, such as outputs/latest")
    environment = None if options.parse_only else ready(options.dimensions)
    prompts = vbench_videos.dimensions_by_prompt(environment.full_info if environment else full_info())
    made_by = results.read(folder) if (folder / results.FILE).is_file() else None
    run = vbench_videos.read_run(folder)
    progress = cli.Progress("videos checked", len(run))
    videos = vbench_videos.sort_out(folder, run, prompts, checked=progress.advance)
    progress.close()
    print_lists(videos)
    raw = writable_folder(folder / "vbench" / "raw", what="results folder")
    failures = [] if environment is None else score(environment, folder, videos, prompts, options.dimensions, options.device)
    raws = {}
    for dimension in DIMENSIONS:
        expected = videos.of(dimension, prompts)
        found = vbench_score.read_raw(raw / f"{dimension}.json", expected) if expected else None
        if found is not None:
            raws[dimension] = found
    more = vbench_videos.manifest_problems(folder)
    summary = vbench_score.summarise(folder, videos, prompts, raws, made_by, more)
    write(folder, summary)
    cli.console().print(vbench_score.as_table(summary))
    process.tell(vbench_score.verdict(summary))
    if failures:
        raise Failed(f"{len(failures)} of the dimensions: {'; '.join(failures)}")
    return process.DONE if summary.valid else process.INVALID


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="python -m wan_mlperf.vbench", description=__doc__)
    parser.add_argument(
        "folder",
        nargs="?",
        type=cli.path,
        metavar="RUN_OR_FOLDER",
        help="an accuracy run's folder, or `generate --prompts`'s",
    )
    parser.add_argument("--setup", action="store_true", help="build VBench's environment first")
    parser.add_argument("--torch", action="append", default=[], metavar="SPEC", help="with --setup: install this torch there")
    parser.add_argument(
        "--dimensions", default=",".join(DIMENSIONS), metavar="A,B", help="score only these now (default: all six)"
    )
    parser.add_argument("--device", help="cpu or cuda; cuda also means a ROCm GPU (default: cuda if there is a GPU)")
    parser.add_argument("--parse-only", action="store_true", help="judge the existing raw results, and score nothing")
    options = parser.parse_args(arguments)
    options.dimensions = options.dimensions.split(",")
    for name in options.dimensions:
        choose("dimension", name, DIMENSIONS)
    if options.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        raise BadInput(f"device: {options.device!r}; allowed: cpu, cuda, cuda:0 and so on")
    if options.torch and not options.setup:
        raise BadInput(f"--torch {options.torch[0]!r} has no effect; allowed: only together with --setup")
    if options.folder is None and not options.setup:
        raise BadInput("no folder was given; allowed: an accuracy run's folder, such as outputs/latest, or --setup")
    return options


def ready(dimensions: Sequence[str]) -> Environment:
    """Return VBench's environment if it and all checkpoints are there. Otherwise name what is missing and raise BadInput."""
    environment = vbench_environment.find()
    missing = vbench_checkpoints.missing(dimensions)
    for line in missing:
        process.say(f"missing checkpoint: {line}")
    if missing:
        where = vbench_checkpoints.checkpoint_folder()
        raise BadInput(f"{len(missing)} of VBench's checkpoints are not in {str(where)!r}; allowed: as the lines above say")
    return environment


def full_info() -> Path:
    """Return VBench's list of prompts, from its environment or from the package that is installed here. Raises BadInput."""
    try:
        return vbench_environment.find().full_info
    except BadInput:
        spec = importlib.util.find_spec("vbench")
        if spec is None or not spec.submodule_search_locations:
            raise
        return Path(next(iter(spec.submodule_search_locations))) / "VBench_full_info.json"


def score(
    environment: Environment,
    folder: Path,
    videos: Videos,
    prompts: Mapping[str, Sequence[str]],
    dimensions: Sequence[str],
    device: str | None,
) -> list[str]:
    """Score what is not scored yet, one process per dimension. Returns a line for each that failed."""
    staged = folder / "vbench" / "staged"
    vbench_videos.stage(folder, videos, staged)
    failures = []
    for dimension in dimensions:
        expected = videos.of(dimension, prompts)
        identity = {"sha256": expected, "checkpoints": vbench_checkpoints.hashes([dimension])}
        output = folder / "vbench" / "raw" / f"{dimension}.json"
        old = vbench_score.read_raw(output, expected) if output.is_file() else None
        if not expected:
            process.tell(f"{dimension}: no video counts for it")
        elif old is not None and old["checkpoints"] == identity["checkpoints"]:
            process.tell(f"{dimension}: scored before, {old['mean']:.4f}")
        else:
            device = device or default_device()
            process.tell(f"{dimension}: {len(expected)} videos on {device}")
            job = {
                "dimension": dimension,
                "device": device,
                "videos": str(staged.absolute()),
                "output": str(output.absolute()),
            }
            failure = run_worker(environment, {**job, "identity": identity}, folder / "vbench" / f"{dimension}.log")
            if failure:
                process.say(f"{dimension}: failed, {failure}")
                failures.append(f"{dimension}: {failure}")
    return failures


def run_worker(environment: Environment, job: Mapping[str, object], log: Path) -> str | None:
    """Run one dimension's process, with output to `log` and progress to the terminal. Returns what went wrong, or None."""
    start = time.perf_counter()
    last, done = "no message", 0
    progress: cli.Progress | None = None
    with vbench_checkpoints.surroundings() as (working, variables), log.open("w", encoding="utf-8") as stream:
        file = working / "job.json"
        file.write_text(json.dumps(job))
        command = [str(environment.python), "-I", str(WORKER), str(file)]
        worker = subprocess.Popen(
            command, cwd=working, env=variables, stdout=stream, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        assert worker.stderr is not None
        try:
            for line in worker.stderr:  # text mode ends a line at a carriage return too: one per step of VBench's bar
                stream.write(line)
                last = line.strip() or last
                step = re.search(r"\| (\d+)/(\d+) \[", line)
                if step:
                    progress = progress or cli.Progress(str(job["dimension"]), int(step[2]))
                    for _ in range(int(step[1]) - done):
                        progress.advance()
                    done = max(done, int(step[1]))
            code = worker.wait()
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
            if progress is not None:
                progress.close()
    if code:
        ending = f"exit code {code}" if code > 0 else signal.Signals(-code).name  # SIGKILL mostly means out of memory
        return f"{last} ({ending}, see {log})"
    process.tell(f"{job['dimension']}: done in {time.perf_counter() - start:.0f} s")
    return None


def default_device() -> str:
    """Return "cuda" if this host's torch sees a GPU, else "cpu"."""
    from wan_mlperf.kernels.device import gpu_count

    return "cuda" if gpu_count() else "cpu"


def print_lists(videos: Videos) -> None:
    """Print which videos are missing, unreadable or extra: the first ones, and how many more there are."""
    for name in ("missing", "unreadable", "refused", "extra", "unnamed"):
        lines = getattr(videos, name)
        for line in lines[:LISTED]:
            process.tell(f"{name}: {line}")
        if len(lines) > LISTED:
            process.tell(f"{name}: and {len(lines) - LISTED} more, all in vbench/summary.json")


def write(folder: Path, summary: Summary) -> None:
    """Write vbench/summary.json and accuracy.txt. Without a score of the whole run, an older accuracy.txt is removed."""
    vbench_summary.write(folder, summary)
    text = vbench_score.accuracy_text(summary)
    if text is None:
        (folder / "accuracy.txt").unlink(missing_ok=True)
        print("no accuracy.txt: there is no score of the whole run")
    else:
        atomic_write(folder / "accuracy.txt", text)
        if summary.hash is None:
            process.tell(f"accuracy.txt has no hash line: the folder holds no {accuracy_log.NAME}")


if __name__ == "__main__":
    process.entry(main)
