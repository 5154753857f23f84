"""The run folder: LoadGen's logs, the resolved recipe, the plan, the result with its identity."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from rich.table import Table

from sut import loadgen, machine, pace
from sut import result as results
from sut.prompts import SHA256, digest
from sut.result import Compliance, Mode, Result, Scenario
from sut.test04_reasons import Spread
from wan_mlperf import cli, process
from wan_mlperf.division import division_of
from wan_mlperf.doctor.checks import verdict
from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_link, atomic_write, writable_folder
from wan_mlperf.identity import commit, commits, container, versions
from wan_mlperf.inputs import text
from wan_mlperf.inputs.paths import utf8
from wan_mlperf.kernels import attention, gemm, vae
from wan_mlperf.kernels.numerics import exchange_text, gemm_text
from wan_mlperf.pipeline import Pipeline
from wan_mlperf.predict import own_run
from wan_mlperf.predict.predicted import Predicted
from wan_mlperf.recipe import to_yaml
from wan_mlperf.spans import STAGES
from wan_mlperf.step_plan import any_unguided, as_table
from wan_mlperf.workload import MLPERF

LATEST = "latest"
PERCENTILES = (50, 90, 95, 97, 99)


def check_outputs(outputs: Path) -> Path:
    """Check, before the run, that its folder can be made in `outputs`, and that `latest` can point to it. Raises BadInput."""
    utf8(str(outputs), what="output folder")  # LoadGen takes no other
    writable_folder(outputs, what="output folder")
    latest = outputs / LATEST
    if latest.exists() and not latest.is_symlink():
        kind = "folder" if latest.is_dir() else "file"
        raise BadInput(
            f"output folder {str(outputs)!r}: its {LATEST!r} is a {kind} of yours; allowed: rename it, or another folder"
        )
    return outputs


def make_folder(outputs: Path, scenario: str, mode: str) -> Path:
    """Make outputs/<date>-<time>-<scenario>-<mode>/ and return it."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{scenario}-{mode}"
    for number in range(1000):
        folder = outputs / (stem if not number else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError("a thousand runs in one second")


def point_latest(folder: Path) -> None:
    """Make outputs/latest point to this folder. If that fails, print a note: the run itself is unaffected."""
    link = folder.parent / LATEST
    try:
        if link.exists() and not link.is_symlink():
            raise FileExistsError(errno.EEXIST, "it is not ours")
        atomic_link(link, folder.name)
    except OSError as error:
        process.say(f"note: {str(link)!r} does not point to this run: {error.strerror}")


def write_inputs(folder: Path, pipeline: Pipeline) -> None:
    """Write what the run will do: recipe.yaml (resolved), user.conf and plan.txt."""
    atomic_write(folder / "recipe.yaml", to_yaml(pipeline.recipe))
    conf = text.read_text(pipeline.recipe.user_conf_path, what="user.conf", allowed="a LoadGen user.conf")
    atomic_write(folder / "user.conf", "\n".join(text.lines(conf)))
    plan = io.StringIO()
    cli.console(width=100, file=plan).print(as_table(pipeline.plan, title=pipeline.recipe.name))
    atomic_write(folder / "plan.txt", plan.getvalue())


def write_prompts(folder: Path, prompts: Sequence[str]) -> None:
    """Write an accuracy run's prompts.json: index, prompt and video of each."""
    entries = [{"index": index, "prompt": prompt, "video": f"videos/{index}.mp4"} for index, prompt in enumerate(prompts)]
    atomic_write(folder / "prompts.json", json.dumps(entries, indent=1, ensure_ascii=False))


def write_result(
    folder: Path,
    pipeline: Pipeline,
    *,
    scenario: Scenario,
    mode: Mode,
    spans: Mapping[str, float],
    generate_s: Sequence[float],
    start_s: float,
    prompts: Sequence[str],
    compliance: Compliance | None = None,
    stopped: str | None = None,
    expected: Predicted | None = None,
) -> Result:
    """Read LoadGen's verdict, write result.json and return it. `compliance` is the outcome of an audit run.

    `stopped` says why a test ended without LoadGen's verdict. Such a run is invalid, and its numbers cover what had finished.
    `expected` is what `expect` returned.
    """
    detail = {} if stopped else loadgen.read_detail(folder)
    sound = detail.get("result_validity") == "VALID" if mode == "performance" else not detail.get("error_invalid_config")
    valid = sound and not stopped
    mean_s = sum(generate_s) / max(1, len(generate_s))
    result = Result(
        scenario=scenario,
        mode=mode,
        valid=valid,
        invalid_reason=None if valid else stopped or pace.explain(detail) or detail.get("result_invalid_reason"),
        queries=len(generate_s),
        prompts_are_mlperf=digest(prompts) == SHA256,
        spans={stage: spans.get(stage, 0.0) for stage in STAGES},
        generate_mean_s=mean_s,
        start_s=start_s,
        host=verdict(outputs=folder.parent),
        system=machine.measure(folder, world=pipeline.mesh.shape.world),
        sample_seconds=tuple(round(seconds, 6) for seconds in generate_s),
        compliance=compliance,
        prediction=expected.beside(spans, mean_s) if expected else None,
        **identity(pipeline),
        **(_latencies(detail) if mode == "performance" and scenario == "singlestream" else {}),
        samples_per_second=detail.get("result_samples_per_second") if scenario == "offline" else None,
    )
    results.write(folder, result)
    return result


def expect(pipeline: Pipeline) -> Predicted | None:
    """What `predict` expects of a run of this pipeline, None on hardware that it does not know."""
    return own_run.expect(
        pipeline.recipe,
        pipeline.workload,
        pipeline.plan,
        device=pipeline.mesh.device.name,
        shape=pipeline.mesh.shape,
        kernels={name: str(kernel) for name, kernel in pipeline.kernels.items()},
        config=pipeline.checkpoint.config("transformer"),
    )


class KernelTexts(TypedDict):
    """What ran, in words, by name: attention kernels, formats of linear layers, and what each does to its operands."""

    kernels: dict[str, str]
    gemms: dict[str, str]
    numerics: dict[str, str]


def describe_kernels(kernels: Mapping[str, attention.Kernel], gemms: gemm.Backends, fp8_scales: str) -> KernelTexts:
    """Say what each attention kernel and each format of linear layers was, and its numerics (kernels/numerics.py)."""
    return {
        "kernels": {name: str(kernel) for name, kernel in kernels.items()},
        "gemms": {name: key or "reference" for name, key in gemms.items()},
        "numerics": {name: kernel.numerics.text for name, kernel in kernels.items()}
        | {name: gemm_text(name, fp8_scales) for name in gemms},
    }


def identity(pipeline: Pipeline) -> dict[str, Any]:
    """What made the result: the recipe's choices as they came out, the model, the device, the software."""
    recipe, workload, mesh = pipeline.recipe, pipeline.workload, pipeline.mesh
    fixed, division = recipe.model.fixed_latent, division_of(recipe, pipeline.plan)
    texts = describe_kernels(pipeline.kernels, pipeline.gemms, recipe.gemm.fp8_scales)
    texts["numerics"]["exchange"] = exchange_text(recipe.exchange, mesh.shape.sharing(unguided=any_unguided(pipeline.plan)))
    return {
        "world_size": mesh.shape.world,
        "mesh": str(mesh.shape),
        "device": f"{mesh.device.arch}: {mesh.device.name}",
        "checkpoint": pipeline.checkpoint.name,
        "model_revision": pipeline.checkpoint.revision,
        "noise": f"fixed latent {Path(fixed).name}" if fixed else f"drawn from seed {workload.seed}",
        **texts,
        "recipe": recipe.name,
        "workload": {name: getattr(workload, name) for name in ("height", "width", "frames", "fps", "steps", "seed")},
        "workload_is_mlperf": workload == MLPERF,
        "experts": tuple(pipeline.load_summary),
        "vae": vae.precision(pipeline.decoder.vae, mesh.device.arch),
        "plan": tuple(pipeline.plan),
        "division": division.name,
        "division_reasons": division.reasons,
        "versions": versions(),
        "commit": commit(),
        "commits": commits(),
        "container": container(),
    }


def _latencies(detail: Mapping[str, Any]) -> dict[str, Any]:
    """Return LoadGen's latencies in seconds, or None for those it did not report."""

    def seconds(key: str) -> float | None:
        return detail[key] / 1e9 if detail.get(key) else None

    percentiles = {str(one): seconds(f"result_{one}.00_percentile_latency_ns") for one in PERCENTILES}
    return {
        "latency_mean_s": seconds("result_mean_latency_ns"),
        "latency_p90_s": seconds("result_90.00_percentile_latency_ns"),
        "latency_early_stopping_s": seconds("early_stopping_latency_ss"),
        "latency_percentiles_s": {name: value for name, value in percentiles.items() if value is not None},
    }


def print_summary(result: Result, folder: Path) -> None:
    """Print the result as a table."""
    table = Table(title=f"{result.scenario} {result.mode}: {'VALID' if result.valid else 'INVALID'}", show_header=False)
    table.add_row("samples", str(result.queries))
    if result.latency_p90_s is not None and result.latency_mean_s is not None:
        table.add_row("latency, 90th percentile", f"{result.latency_p90_s:.3f} s")
        table.add_row("latency, mean", f"{result.latency_mean_s:.3f} s")
        early = result.latency_early_stopping_s
        table.add_row("early-stopping estimate", f"{early:.3f} s" if early else "too few queries")
    if result.samples_per_second:
        table.add_row("throughput", f"{result.samples_per_second:.4f} samples/s")
    if result.compliance is not None:
        table.add_row(result.compliance.test, result.compliance.verdict)
        table.add_row("  rule", result.compliance.rule)
        for reason in result.compliance.reasons:
            table.add_row("  looks like", reason)
        for name, times in (("reference", result.compliance.reference_seconds), ("this test", result.sample_seconds)):
            if times:
                table.add_row(f"  {name}", str(Spread.of(times)))
    predicted = result.prediction
    for stage, seconds in result.spans.items():
        beside = f", predicted {predicted.stages[stage]:.4f} s" if predicted and stage in predicted.stages else ""
        table.add_row(f"  {stage.replace('_', ' ')}, mean", f"{seconds:.4f} s{beside}")
    if predicted is not None:
        table.add_row("predicted, mean", predicted.text)
        for line in predicted.apart:
            table.add_row("  apart from it", line)
    table.add_row("mesh", f"{result.world_size} ranks: {result.mesh}")
    table.add_row("device", result.device)
    table.add_row("recipe", process.shown(result.recipe))
    table.add_row("division", "; ".join([result.division or "not recorded", *result.division_reasons]))
    table.add_row(
        "workload", "the benchmark's" if result.workload_is_mlperf else "not the benchmark's: a small one of the recipe"
    )
    if result.invalid_reason:
        table.add_row("invalid because", result.invalid_reason)
    table.add_row("folder", process.shown(str(folder)))
    cli.console().print(table)
