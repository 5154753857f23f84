"""Wan2.2 text-to-video under MLPerf LoadGen."""

from __future__ import annotations

import logging
import os
from typing import Any

# transformers, diffusers and torchao warn once per rank about optional parts that are not used here; your own setting wins.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
for _name in ("torchao", "torch.utils._pytree", "yunchang"):
    logging.getLogger(_name).setLevel(logging.ERROR)

__all__ = ["Pipeline", "Workload", "load_recipe"]


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that an entry point without a model (doctor) starts without torch.
    if name == "Pipeline":
        from wan_mlperf.pipeline import Pipeline

        return Pipeline
    if name == "load_recipe":
        from wan_mlperf.recipe import load_recipe

        return load_recipe
    if name == "Workload":
        from wan_mlperf.workload import Workload

        return Workload
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
