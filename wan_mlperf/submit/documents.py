"""What a submission says in words: measurements.json, README.md per scenario, calibration.md. From the recipe, not by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from sut.result import Result

LOADGEN = """with the recipe below in `recipe.yaml` and this folder's `user.conf` where it says:

```
python -m wan_mlperf.run --scenario {scenario} --recipe recipe.yaml
python -m wan_mlperf.run --scenario {scenario} --recipe recipe.yaml --mode accuracy
python -m wan_mlperf.vbench outputs/latest
python -m wan_mlperf.run --scenario {scenario} --recipe recipe.yaml --test04
```"""
ENDPOINTS = """with the recipe below in `recipe.yaml` and MLCommons' endpoints client in a Python 3.12 environment `client`:

```
python -m wan_mlperf.submit run --harness endpoints --client client --scenario {scenario} --recipe recipe.yaml --campaign DIR
```

It serves the model by `python -m wan_mlperf.serve` and runs the client with `config.yaml`: performance, the accuracy run's
videos, then the output-caching audit. VBench scored the videos afterwards, and its score was filled in where the client had
left it open (`accuracy/accuracy_results.json`)."""


def measurements(recipe: Mapping[str, Any], result: Result) -> dict[str, str]:
    """Return measurements.json: which weights, and what became of them."""
    gemm = recipe["gemm"]
    dtype, vae_dtype = (recipe["model"][name].replace("checkpoint", "the checkpoint's") for name in ("dtype", "vae_dtype"))
    own = {"bf16": dtype}
    formats = dict.fromkeys(own.get(gemm[name], gemm[name]) for name in ("high_noise", "low_noise"))
    quantised = [name for name in formats if name in ("fp8", "mxfp4")]
    kept = [f"{which} as {name}" for which, name in map(_rule, gemm["keep"])]
    words = f"linear layers of the experts to {' and '.join(quantised)} when they are loaded" if quantised else "none"
    return {
        "input_data_types": dtype,
        "retraining": "no",
        "starting_weights_filename": result.checkpoint,
        "weight_data_types": ", ".join(dict.fromkeys([*formats, dtype, f"{vae_dtype} (VAE)"])),
        "weight_transformations": "; ".join([words, *(kept if quantised else [])]),
    }


def _rule(rule: Any) -> tuple[str, str]:
    """Return which layers an entry of `gemm.keep` names, in words, and their format."""
    if not isinstance(rule, Mapping):
        pattern, name = rule
        return f"those whose name matches `{pattern}`", name
    words = f"those whose name matches `{rule['layers']}`"
    if rule.get("expert"):
        words += f", of the {rule['expert'].replace('_', '-')} expert"
    if rule.get("steps"):
        words += f", in steps {rule['steps'][0]} to {rule['steps'][1]}"
    return words, rule["format"]


def readme(scenario: str, recipe: Mapping[str, Any], result: Result, notes: Mapping[str, str]) -> str:
    """Return a scenario's README.md: what was measured and how to do it again."""
    shown = {key: value for key, value in recipe.items() if key not in ("folder", "exact")}
    lines = [f"- {kind}: {note}" for kind, note in notes.items()]
    commands = LOADGEN if result.harness == "loadgen" else ENDPOINTS
    return f"""# Wan2.2-T2V-A14B, {scenario}

{chr(10).join(lines)}

Made by commit `{result.commit}` (in `src/`) on {result.device}, {result.mesh}.

## To do it again

In `src/`, {commands.format(scenario=scenario)}

The experts: {"; ".join(result.experts)}. Initial noise: {result.noise}.

```yaml
{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip()}
```
"""


def calibration(recipes: Mapping[str, Mapping[str, Any]], results: Mapping[str, Result]) -> str:
    """Return calibration.md: what was quantised and how, per scenario; for each kernel what ran, from the result."""
    parts = [
        "# Calibration",
        "No data set was used for calibration. Every scale is computed from the tensor that is being quantised: weights when "
        "they are loaded, activations and attention operands in each call. Text encoder and scheduler are not quantised.",
    ]
    for scenario, recipe in recipes.items():
        gemm, attention, model = recipe["gemm"], recipe["attention"], recipe["model"]
        kernels, numerics = results[scenario].kernels, results[scenario].numerics
        lines = [
            f"- Linear layers of the {name.replace('_', '-')} expert: {numerics[gemm[name]]}."
            for name in ("high_noise", "low_noise")
        ]
        lines += [f"- Except {which}: {numerics[name]}." for which, name in map(_rule, gemm["keep"])]
        if attention["steps"]:
            lines.append(f"- Self-attention, step by step: {', '.join(attention['steps'])}.")
            used = dict.fromkeys(attention["steps"])
        else:
            lines.append(
                f"- Self-attention: `{attention['early']}` in the first {attention['early_fraction']:.0%} of the steps, then "
                f"`{attention['late']}`."
            )
            used = dict.fromkeys((attention["early"], attention["late"]))
        lines += [f"  - `{name}` ({kernels[name]}): {numerics[name]}." for name in used]
        lines.append(f"- Cross-attention ({kernels['cross']}): {numerics['cross']}.")
        if "exchange" in numerics:  # older results, from before there was a choice, have no text for it
            lines.append(f"- Between the GPUs that share a video's tokens: {numerics['exchange']}.")
        lines.append(f"- VAE: {model['vae_dtype']}, not quantised. Everything else: {model['dtype']}.")
        parts += [f"## {scenario}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"
