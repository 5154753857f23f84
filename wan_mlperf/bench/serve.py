"""What a server costs: in `python -m wan_mlperf.bench serve`, LoadGen and an HTTP client take turns with the same loaded engine.

SingleStream: one request in flight. LoadGen gets the frames, as the rules require. The server's client gets an MP4 on disk and
runs in a separate process. The blocks alternate as A B B A, so that a machine that slows down over time favours neither side; the
means of neighbouring blocks are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from sut import loadgen, prompts
from sut.system import SystemUnderTest
from wan_mlperf import cli, files, preflight, process, ranks
from wan_mlperf.errors import BadInput, Failed
from wan_mlperf.parallel.launch import launch
from wan_mlperf.pipeline import Pipeline
from wan_mlperf.preflight import Setup
from wan_mlperf.replicas import dispatch
from wan_mlperf.replicas.dispatch import ServingDispatcher
from wan_mlperf.replicas.messages import Job
from wan_mlperf.replicas.watch import Watch
from wan_mlperf.serve import server
from wan_mlperf.serve.book import Book
from wan_mlperf.serve.encoder import encode
from wan_mlperf.serve.options import Options
from wan_mlperf.serve.session import Session

HOST = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Block:
    """Mean seconds per query of one block: in all, as LoadGen or the client measured it, and per stage."""

    seconds: float
    spans: dict[str, float]


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table, and return the exit code."""
    parser = cli.Parser(prog="python -m wan_mlperf.bench serve", description=__doc__)
    cli.add_recipe_arguments(parser)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of blocks (default: 10)")
    parser.add_argument("--queries", type=int, default=8, help="queries per block (default: 8)")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args(arguments)
    if options.pairs < 1 or options.queries < 1:
        raise BadInput(f"--pairs {options.pairs} --queries {options.queries}; allowed: at least 1")
    recipe = preflight.recipe_from(options)
    setup = preflight.prepare(recipe, world=preflight.ranks_for(recipe))
    if setup.shape.replicas > 1:
        raise BadInput(f"mesh.replicas: {setup.shape.replicas} is not allowed, with one query at a time; allowed: 1")
    if not ranks.under_torchrun():
        return launch("wan_mlperf.bench", ["serve", *arguments], setup.shape.world)
    with Watch(recipe.faults) as watch:
        engine = Pipeline.load(setup)
        watch.follow(engine.spans)
        engine.warm_up(max(2, recipe.warmup_queries))
        turns = _Turns(setup, watch, options)
        dispatcher = dispatch.start(engine, watch, pack=lambda frames: frames, encode=encode(turns.fps))
        if engine.mesh.rank:
            dispatcher.serve()
        else:
            dispatcher.run(lambda: turns.measure(dispatcher))
            turns.report()
        engine.mesh.close()
    return process.DONE


class _Turns:
    """The blocks of LoadGen and of the server in turn, on rank 0."""

    def __init__(self, setup: Setup, watch: Watch, options: argparse.Namespace) -> None:
        self._setup, self._watch, self._options = setup, watch, options
        self._prompts = prompts.benchmark_prompts()[: options.queries]
        self._serving = False
        self._pairs: list[dict[str, Block]] = []

    def fps(self, _job: Job) -> int | None:
        """Return the frame rate of a job's MP4; None for LoadGen, which gets frames."""
        return self._setup.workload.fps if self._serving else None

    def measure(self, dispatcher: ServingDispatcher) -> None:
        """Run all pairs of blocks."""
        progress = cli.Progress("pairs of blocks", self._options.pairs)
        with files.scratch("bench") as folder:
            for pair in range(self._options.pairs):
                order = ("loadgen", "server") if pair % 2 == 0 else ("server", "loadgen")
                blocks = {}
                for name in order:
                    self._serving = name == "server"
                    place = folder / f"{pair}-{name}"
                    place.mkdir()
                    blocks[name] = self._by_server(dispatcher, place) if self._serving else self._by_loadgen(dispatcher, place)
                self._pairs.append(blocks)
                progress.advance()
        progress.close()

    def _by_loadgen(self, dispatcher: ServingDispatcher, folder: Path) -> Block:
        count = len(self._prompts)
        settings = loadgen.make_settings("singlestream", "performance", self._setup.recipe.user_conf_path, count)
        settings.min_query_count = settings.max_query_count = count
        settings.min_duration_ms = 0
        system = SystemUnderTest(
            dispatcher, self._prompts, accuracy=None, on_sample=lambda: None, on_lost=self._lost, on_failure=self._watch.fail
        )
        loadgen.run(settings, folder=folder, samples=count, issue=system.issue, flush=system.flush)
        mean = loadgen.read_detail(folder)["result_mean_latency_ns"] / 1e9
        return Block(seconds=mean, spans=system.spans)

    def _by_server(self, dispatcher: ServingDispatcher, folder: Path) -> Block:
        options = Options(folder=folder, latents=None, token=None, policy="fixed", most_waiting=1, drain_s=0.0)
        book = Book(folder)
        book.open()
        session = Session(options, self._setup, self._watch, dispatcher, book, server.bind(HOST, 0))
        session.server.start()
        words = [sys.executable, "-c", CLIENT, session.server.address.rpartition(":")[2]]
        client = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert client.stdin is not None
        client.stdin.write(json.dumps(self._prompts))
        client.stdin.close()
        session.desk.work(until=lambda: client.poll() is not None, look_s=0.05)
        assert client.stdout is not None
        answers = json.loads(client.stdout.read())
        session.desk.stop()
        session.close()
        return Block(seconds=statistics.fmean(one["seconds"] for one in answers), spans=_mean([one["spans"] for one in answers]))

    def _lost(self, job: Job, reason: str) -> None:
        raise Failed(f"prompt {job.sample + 1}: {reason}")

    def report(self) -> None:
        """Print where the time goes, and what the server costs overall."""
        means = {name: _mean([pair[name].spans for pair in self._pairs]) for name in ("loadgen", "server")}
        whole = {name: statistics.fmean(pair[name].seconds for pair in self._pairs) for name in means}
        ratios = sorted(pair["server"].seconds / pair["loadgen"].seconds for pair in self._pairs)
        table = Table(title=f"{self._setup.recipe.name}, {self._setup.shape}: seconds per video")
        for heading in ("part", "LoadGen", "%", "server", "%"):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        stages = list(dict.fromkeys([*means["server"], *means["loadgen"]]))
        rows = [(stage, [means[name].get(stage, 0.0) for name in means]) for stage in stages]
        rows.append(("everything else", [whole[name] - sum(means[name].values()) for name in means]))
        rows.append(("in all", [whole[name] for name in means]))
        for stage, (ours, theirs) in rows:
            shares = [f"{100 * value / whole[name]:.2f}" for value, name in zip((ours, theirs), means, strict=True)]
            table.add_row(stage.replace("_", " "), f"{ours:.4f}", shares[0], f"{theirs:.4f}", shares[1])
        cli.console().print(table)
        median = statistics.median(ratios)
        print(f"server / LoadGen: median {median:.4f} of {len(ratios)} pairs ({ratios[0]:.4f} to {ratios[-1]:.4f})")
        if self._options.json:
            figures = {"ratios": ratios, "seconds": whole, "spans": means}
            files.atomic_write(Path(self._options.json), json.dumps(figures, indent=1) + "\n")


def _mean(spans: Sequence[dict[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for one in spans:
        for stage, seconds in one.items():
            found[stage].append(seconds)
    return {stage: statistics.fmean(values) for stage, values in found.items()}


# One connection and one request in flight, like MLCommons' client in SingleStream. Standard library only: it starts quickly.
CLIENT = r"""
import http.client, json, re, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
answers = []
for prompt in json.load(sys.stdin):
    body = json.dumps({"prompt": prompt, "seed": 42, "response_format": "video_path"})
    begin = time.perf_counter()
    connection.request("POST", "/v1/videos/generations", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    seconds = time.perf_counter() - begin
    assert response.status == 200, content
    spans = re.findall(r"(\w+);dur=([\d.]+)", response.headers["Server-Timing"])
    answers.append({"seconds": seconds, "spans": {stage: float(value) / 1e3 for stage, value in spans}})
print(json.dumps(answers))
"""
