"""What we tune: one frozen, nested recipe per run (parts.py), read from one complete YAML (reading.py)."""

from wan_mlperf.recipe.parts import (
    Attention,
    AttentionName,
    Compile,
    Dtype,
    Faults,
    Gemm,
    GemmName,
    Guidance,
    MeshRecipe,
    Model,
    Offline,
    Recipe,
    Reuse,
    Vae,
    make_exact,
)
from wan_mlperf.recipe.reading import CONFIGS, load_recipe, parse, replace_workload, to_yaml

__all__ = [
    "CONFIGS",
    "Attention",
    "AttentionName",
    "Compile",
    "Dtype",
    "Faults",
    "Gemm",
    "GemmName",
    "Guidance",
    "MeshRecipe",
    "Model",
    "Offline",
    "Recipe",
    "Reuse",
    "Vae",
    "load_recipe",
    "make_exact",
    "parse",
    "replace_workload",
    "to_yaml",
]
