"""Checkpoint folders with one thing changed: refused in one line, or every part loads and the identity is another."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.brought.generate_input import few
from wan_mlperf import checkpoint, preflight
from wan_mlperf.errors import BadInput
from wan_mlperf.model_folder.parts import PARTS
from wan_mlperf.recipe import load_recipe


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def tensors_changed(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, {"format": "pt"})


def replaced(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one thing in a checkpoint's folder; return what."""
    part = draw.choice(list(PARTS))
    files = sorted(one for one in (folder / part).iterdir() if one.is_file())
    file = draw.choice([one for one in (*files, folder / "model_index.json") if one.is_file()])
    weights = next((one for one in files if one.suffix == ".safetensors"), None)
    kinds = ["remove", "cut", "flip", "empty", "pointer", "rename", "extra file", "a folder in its place", "not readable as text"]
    kinds += ["value"] * 6 if file.suffix == ".json" else []
    kinds += ["drop", "unknown", "shape", "dtype", "rank", "variant", "two files"] if weights is not None else []
    kind = draw.choice(kinds)
    if kind in ("remove", "rename", "a folder in its place"):
        content = file.read_bytes()
        file.unlink()
        if kind == "rename":
            file.with_name(f"{file.stem}-old{file.suffix}").write_bytes(content)
        if kind == "a folder in its place":
            file.mkdir()
    elif kind in ("cut", "flip", "empty", "pointer", "not readable as text"):
        altered = bytearray(file.read_bytes())
        place = draw.randrange(min(len(altered), draw.choice([8, 500, 10**9])))
        if kind == "flip":
            altered[place] ^= 1 << draw.randrange(8)
        changed = {
            "cut": altered[:place],
            "flip": altered,
            "empty": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        }
        replaced(file, bytes(changed.get(kind, b"\xff\xfe\xff{}")))
    elif kind == "value":
        values = json.loads(file.read_text())
        key = draw.choice(sorted(values)) if values else "new"
        values[key] = draw.choice([None, 0, -1, 10**12, "x", [], {}, True, 1.5, [1, 2], "WanTransformer3DModel", {"a": 1}])
        kind = f"{key} = {values[key]!r}"
        replaced(file, json.dumps(values).encode())
    elif kind == "extra file":
        (folder / part / draw.choice(["README.md", ".DS_Store", "config.json.bak", "._config.json"])).write_bytes(b"\0\1")
    elif weights is not None:
        file = weights
        name = draw.choice(sorted(load_file(weights)))
        changes: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
            "drop": lambda tensors: tensors.pop(name),
            "unknown": lambda tensors: tensors.update({f"{name}_extra": torch.ones(1)}),
            "shape": lambda tensors: tensors.update({name: torch.cat([tensors[name].reshape(1, -1)] * 2)}),
            "rank": lambda tensors: tensors.update({name: tensors[name].reshape(-1, 1).contiguous()}),
            "dtype": lambda tensors: tensors.update(
                {name: tensors[name].to(draw.choice([torch.float64, torch.int32, torch.bool]))}
            ),
        }
        if kind in changes:
            tensors_changed(weights, changes[kind])
            kind += f" {name}"
        elif kind == "variant":
            weights.rename(weights.with_name(weights.name.replace(".safetensors", ".fp16.safetensors")))
        else:
            shutil.copy(weights, weights.with_name(f"other-{weights.name}"))
    return f"{kind} in {file.relative_to(folder)}"


@few(6, 200)
def test_mutated_checkpoints(number: int, model: Path, tmp_path: Path) -> None:
    """Refused in one line, or every part of it loads. What was changed in a weight or a setting changes the identity."""
    before, kept = checkpoint.find(str(model)).identity, {one: one.read_bytes() for one in model.rglob("*") if one.is_file()}
    recipe = load_recipe("tiny", model="place", overrides=["mesh.ranks=1"])
    for seed in range(number):
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(model, place, copy_function=os.symlink)
        what = mutate(place, random.Random(seed))
        try:
            found = preflight.prepare(recipe).checkpoint
        except BadInput as error:
            line = str(error)
            assert "\n" not in line and ("model 'place'" in line or "scheduler" in line), (seed, what, line)
            continue
        except Exception as error:
            raise AssertionError((seed, what, error)) from error
        try:
            for part in ("transformer", "transformer_2"):
                found.load_transformer(part, "float32")
            found.load_vae("float32"), found.load_text_encoder("float32")
        except Exception as error:
            raise AssertionError(f"{seed}: {what}: accepted, and then {type(error).__name__}: {error}") from error
        same = all(
            (place / one.relative_to(model)).is_file() and (place / one.relative_to(model)).read_bytes() == kept[one]
            for one in kept
        )
        assert same or found.identity != before, (seed, what)
