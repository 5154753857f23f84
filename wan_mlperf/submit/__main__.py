"""A whole campaign of runs, and the folder to submit.

`submit run --campaign DIR` does performance, accuracy, VBench and TEST04 for both scenarios and can be stopped and started again;
`submit system` writes a system description to fill in; `submit pack` builds the tree that MLCommons' checker takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wan_mlperf import cli, files, process
from wan_mlperf.errors import BadInput, choose
from wan_mlperf.files import atomic_write, writable_folder
from wan_mlperf.inputs import locks, text

if TYPE_CHECKING:  # imported when it is needed: --help and a misspelt flag must not wait for torch
    from sut.result import Scenario
    from wan_mlperf.submit.campaign import Campaign, Stage

Start = Callable[[Sequence[str]], int]
WORDS = {process.DONE: "done", process.INVALID: "INVALID", process.BAD_INPUT: "bad input", process.FAILED: "failed"}


def main(arguments: Sequence[str]) -> int:
    """Run the chosen subcommand, and return the exit code."""
    options = parse(arguments)
    return {"run": run, "system": system, "pack": pack}[options.command](options)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="python -m wan_mlperf.submit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | system | pack", parser_class=cli.Parser)
    one = commands.add_parser("run", help="do every stage that is not done yet")
    one.add_argument("--campaign", required=True, type=cli.path, metavar="DIR", help="where the runs go; the same one continues")
    one.add_argument("--scenario", action="append", choices=("singlestream", "offline"), help="only this one (default: both)")
    cli.add_recipe_arguments(one)
    one.add_argument("--no-lock", action="store_true", help="continue where the campaign's file system has no locks")
    one.add_argument("--offline-recipe", type=cli.path, metavar="RECIPE", help="the recipe for Offline, if not that of --recipe")
    one.add_argument("--dry-run", action="store_true", help="allow a workload that is not the benchmark's, and no VBench score")
    one.add_argument("--full-length", action="store_true", help="with --dry-run: 600 s per test, as MLCommons' checker asks")
    again = "do a stage again, such as performance or offline-test04; the old run is kept aside"
    one.add_argument("--again", action="append", default=[], metavar="STAGE", help=again)
    harness = "who asks for the samples: LoadGen, or MLCommons' endpoints client by HTTP (default: loadgen)"
    one.add_argument("--harness", choices=("loadgen", "endpoints"), default="loadgen", help=harness)
    client = "the Python 3.12 that has MLCommons' endpoints client, or its environment's folder"
    one.add_argument("--client", type=cli.path, metavar="PATH", help=client)
    one.add_argument("--keep-accuracy-log", action="store_true", help="keep LoadGen's whole accuracy logs, 111 GB each")
    two = commands.add_parser("system", help="write the system description, with what was measured filled in")
    two.add_argument("campaign", type=cli.path, metavar="CAMPAIGN")
    two.add_argument("-o", "--output", required=True, type=cli.path, metavar="SYSTEM.json", help="its name becomes the system's")
    three = commands.add_parser("pack", help="build the tree to submit; the campaign stays as it is")
    three.add_argument("campaign", type=cli.path, metavar="CAMPAIGN")
    three.add_argument("--submitter", required=True, metavar="ORG")
    three.add_argument("--division", required=True, choices=("open", "closed"))
    three.add_argument(
        "--system", required=True, type=cli.path, metavar="SYSTEM.json", help="what `submit system` wrote, filled in"
    )
    three.add_argument("-o", "--output", required=True, type=cli.path, metavar="DIR", help="a folder that is not there yet")
    bandwidth = "the data path in your words, for documentation/bandwidth.md"
    three.add_argument("--bandwidth", type=cli.path, metavar="FILE", help=bandwidth)
    three.add_argument("--dry-run", action="store_true", help="build the tree despite what is missing, and list it")
    options = parser.parse_args(arguments)
    if options.command == "run" and options.full_length and not options.dry_run:
        raise BadInput("--full-length has no effect: the benchmark's own tests take 600 s anyway; allowed: with --dry-run")
    if options.command == "run":
        _check_harness(options)
    return options


def _check_harness(options: argparse.Namespace) -> None:
    """Raise BadInput for flags that do not apply to the chosen harness, and for a client that is not there."""
    if options.harness == "endpoints":
        for flag, value in (("--full-length", options.full_length), ("--keep-accuracy-log", options.keep_accuracy_log)):
            if value:
                raise BadInput(f"{flag} with --harness endpoints: it is about LoadGen; allowed: without it")
        from wan_mlperf.submit import client

        client.find(options.client)
    elif options.client is not None:
        raise BadInput("--client has no effect; allowed: only together with --harness endpoints")


def run(options: argparse.Namespace, start: Start | None = None) -> int:
    """Run the stages that are not done; return the worst of their exit codes. `start` runs a command (for tests)."""
    from wan_mlperf.submit.campaign import Stage
    from wan_mlperf.submit.show import duration, estimate, explain_failure, show, show_missing

    campaign, user_confs = begin(options)
    repeated = chosen_again(campaign, options.again)
    with locked(campaign.folder, needed=not options.no_lock) as lock, files.scratch("submit") as folder:
        streams = text.hand_over(folder)  # a recipe that came through a pipe
        begin_call = start or (lambda command: call(command, lock, streams))
        for stage in repeated:
            for place in campaign.set_aside(stage):
                process.tell(f"{stage}: the old one is now {place}")
        show(campaign, user_confs)
        warn_of_vbench(campaign)
        worst, begun_now = process.DONE, set[Stage]()
        for stage in campaign.stages():
            state = campaign.state(stage)
            if state.done:
                continue
            need = campaign.need(stage)
            if need is not None and not campaign.state(need).done:
                process.tell(f"{stage}: has to wait for {need}")
                continue
            if stage.kind == "test04" and campaign.harness == "endpoints" and need in begun_now and state.run is not None:
                # The client's audit was made in the same call.
                process.tell(f"{stage}: INVALID, {state.note}")
                worst = max(worst, process.INVALID)
                continue
            begun_now.add(stage)
            process.tell(f"{stage}: starts, estimate {duration(estimate(campaign, stage, user_confs))}")
            begun = time.monotonic()
            code = begin_call(command(campaign, stage, options))
            state = campaign.state(stage)
            # What is in the folder counts, not the exit code: VBench ends with 1 for a score below the floor.
            word = "done" if state.done else WORDS.get(code, f"ended with exit code {code}")
            note = f", {state.note}" if state.run else ""
            process.tell(f"{stage}: {word} after {duration(time.monotonic() - begun)}{note}")
            if not state.done:
                explain_failure(state)
                worst = max(worst, code if code in WORDS else process.FAILED, process.INVALID)
        show(campaign, user_confs)
        if campaign.dry_run:
            show_missing(campaign)
    left = [str(stage) for stage in campaign.stages() if not campaign.state(stage).done]
    process.tell(f"left: {', '.join(left)}" if left else "everything is done: next is `python -m wan_mlperf.submit pack`")
    return worst


def chosen_again(campaign: Campaign, names: Sequence[str]) -> list[Stage]:
    """The stages that --again names: "performance" for every scenario, "offline-performance" for one. Raises BadInput."""
    known: dict[str, list[Stage]] = {}
    for stage in campaign.stages():
        known.setdefault(stage.kind, []).append(stage)
        known[f"{stage.scenario}-{stage.kind}"] = [stage]
    return [stage for name in names for stage in known[choose("--again", name, known)]]


def begin(options: argparse.Namespace) -> tuple[Campaign, dict[Scenario, Path]]:
    """Check the recipes and open the campaign; also return each scenario's user.conf. Raises BadInput."""
    from sut import accuracy_log, prompts, run_record
    from wan_mlperf import preflight
    from wan_mlperf.recipe import to_yaml
    from wan_mlperf.submit.campaign import Campaign
    from wan_mlperf.workload import MLPERF

    recipes, user_confs, workload = {}, {}, MLPERF
    scenarios: Sequence[Scenario] = options.scenario or ("singlestream", "offline")
    for scenario in scenarios:
        recipe = preflight.recipe_from(for_scenario(options, scenario), scenario=scenario)
        if recipe.effective_workload != MLPERF and not options.dry_run:
            raise BadInput(f"recipe {recipe.name!r} names a workload that is not the benchmark's; allowed: with --dry-run")
        recipes[scenario], user_confs[scenario] = to_yaml(recipe), recipe.user_conf_path
        workload = recipe.effective_workload
    folder = writable_folder(Path(options.campaign), what="campaign folder")
    campaign = Campaign.begin(folder, recipes, dry_run=options.dry_run, commit=run_record.commit(), harness=options.harness)
    left = [stage for stage in campaign.stages() if stage.kind == "accuracy" and not campaign.state(stage).done]
    if left:  # now, not hours later
        number = len(prompts.benchmark_prompts())
        accuracy_log.check_space(folder, workload, number * (len(left) if options.keep_accuracy_log else 1))
    return campaign, user_confs


def for_scenario(options: argparse.Namespace, scenario: str) -> argparse.Namespace:
    """The options with the recipe of this scenario, and with --full-length the benchmark's user.conf instead of the recipe's."""
    from wan_mlperf.recipe import CONFIGS

    own = vars(options).copy()
    if scenario == "offline" and options.offline_recipe:
        own["recipe"] = options.offline_recipe
    if options.full_length:
        ours = own["recipe"] is None or not Path(own["recipe"]).is_file()  # a name from configs/, which has the file, too
        own["set"] = [*options.set, f"user_conf={'mlperf/user.conf' if ours else CONFIGS / 'mlperf' / 'user.conf'}"]
    return argparse.Namespace(**own)


def command(campaign: Campaign, stage: Stage, options: argparse.Namespace) -> list[str]:
    """The command that performs a stage, as a separate process."""
    from wan_mlperf.submit.campaign import Stage

    if stage.kind == "vbench" and (made := campaign.need(stage)):
        return [sys.executable, "-m", "wan_mlperf.vbench", str(campaign.state(made).run)]
    words = [sys.executable, "-m", "wan_mlperf.run", "--scenario", stage.scenario, "--outputs", str(campaign.folder)]
    chosen = for_scenario(options, stage.scenario)
    if campaign.harness == "endpoints":
        words[2:5] = ["wan_mlperf.submit.client_run", "--scenario", stage.scenario, "--client", options.client]
        words += ["--dry-run"] if options.dry_run else []
    for flag, value in (("--recipe", chosen.recipe), ("--model", chosen.model)):
        words += [flag, value] if value is not None else []
    words += [f"--set={change}" for change in chosen.set] + (["--exact"] if chosen.exact else [])
    if stage.kind == "accuracy":
        words += ["--mode", "accuracy"] + (["--keep-accuracy-log"] if options.keep_accuracy_log else [])
    if stage.kind == "test04":
        performance = campaign.state(Stage(scenario=stage.scenario, kind="performance")).run
        words += ["--audit-of", str(performance)] if campaign.harness == "endpoints" else []
        words += ["--test04", "--reference", str(performance)] if campaign.harness == "loadgen" else []
    return words


def call(words: Sequence[str], lock: int | None, variables: Mapping[str, str]) -> int:
    """Run a command; it ends with this process. It holds the campaign's lock too, should this process be killed."""
    stage = subprocess.Popen(words, pass_fds=() if lock is None else (lock,), env={**os.environ, **variables})
    try:
        return stage.wait()
    except BaseException:
        stage.terminate()
        stage.wait()
        raise


@contextmanager
def locked(folder: Path, *, needed: bool = True) -> Iterator[int | None]:
    """Lock the campaign and yield the lock's file descriptor. Raises BadInput while another process works in it."""
    busy = "another `submit run`, or a run that it started, still works in it"
    held = locks.lock(folder, what="campaign", busy=busy, without=None if needed else process.note)
    try:
        yield held
    finally:
        locks.unlock(folder, held)


def warn_of_vbench(campaign: Campaign) -> None:
    """Print at the start, not hours later, why VBench cannot run here."""
    from wan_mlperf.vbench import __main__ as vbench
    from wan_mlperf.workload import DIMENSIONS

    if not campaign.dry_run and any(not campaign.state(stage).done for stage in campaign.stages() if stage.kind == "vbench"):
        try:
            vbench.ready(DIMENSIONS)
        except BadInput as error:
            process.say(f"VBench is not ready: {process.one_line(error)}")


def system(options: argparse.Namespace) -> int:
    """Write a system description from the newest run, and name the fields that a person must fill."""
    from sut import run_record
    from wan_mlperf.submit import system_description
    from wan_mlperf.submit.campaign import Campaign

    campaign = Campaign.load(Path(options.campaign), commit=run_record.commit())
    results = [state.result for state in map(campaign.state, campaign.stages()) if state.result and state.result.system]
    if not results:
        raise BadInput(f"campaign {options.campaign!r}: holds no finished run yet; allowed: after `submit run`")
    file = Path(options.output)
    if file.exists():
        raise BadInput(f"{options.output!r} is there already; allowed: a new file, so that nothing filled in is lost")
    description = system_description.template(results[0].system)
    atomic_write(file, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    empty = system_description.unfilled({**description, "division": "-", "submitter": "-"})
    process.tell(f"{file}: to be filled in: {', '.join(empty)}")
    return process.DONE


def pack(options: argparse.Namespace) -> int:
    """Build the tree to submit."""
    from wan_mlperf.submit import submission

    notes = submission.pack(
        Path(options.campaign),
        submitter=options.submitter,
        division=options.division,
        system=Path(options.system),
        output=Path(options.output),
        dry_run=options.dry_run,
        bandwidth=Path(options.bandwidth) if options.bandwidth else None,
    )
    for note in notes:
        process.tell(f"note: {note}")
    process.tell(options.output)
    return process.DONE


if __name__ == "__main__":
    process.entry(main)
