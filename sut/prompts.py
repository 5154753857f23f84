"""The prompts that LoadGen's sample indices stand for: the benchmark's 248, or those of a text file, one per line."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from wan_mlperf.errors import BadInput
from wan_mlperf.inputs import text
from wan_mlperf.workload import DIMENSIONS

SHA256 = "f45433f7d3f6ac055613bb36ea21f38120e3cb5873d91f7e621477761b7284e8"


def benchmark_prompts() -> list[str]:
    """Return the 248 prompts from the installed vbench package's own JSON, checked by hash; vbench is not imported.

    They are those of the six dimensions that MLCommons scores, in file order without repeats.
    """
    spec = importlib.util.find_spec("vbench")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            "prompts: package vbench is not installed; allowed: pip install --no-deps vbench==0.1.5, or --prompts FILE"
        )
    file = Path(next(iter(spec.submodule_search_locations))) / "VBench_full_info.json"
    entries = text.read_json(file, what="prompts of vbench", allowed="vbench==0.1.5, or --prompts FILE")
    wanted = (entry["prompt_en"] for entry in entries if set(entry["dimension"]) & set(DIMENSIONS))
    prompts = list(dict.fromkeys(wanted))
    if digest(prompts) != SHA256:
        raise BadInput(
            f"prompts: this version of vbench gives {len(prompts)} other prompts than the benchmark's; allowed: vbench==0.1.5"
        )
    return prompts


def digest(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts, written one per line with a final newline."""
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode()).hexdigest()


def prompt_set(file: str | Path | None) -> list[str]:
    """Return the prompts of a text file, one per line, without empty lines; without a file, the benchmark's. Raises BadInput."""
    return benchmark_prompts() if file is None else text.read_prompts(file)
