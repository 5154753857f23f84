"""Random and mutated recipes, user.conf files, prompt files and manifests: each works or is refused in one line, 500 in all."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sut import loadgen
from wan_mlperf.bench.random_checkpoint import byte_tokenizer
from wan_mlperf.errors import BadInput
from wan_mlperf.generate.video_list import VideoList
from wan_mlperf.inputs.text import read_prompts
from wan_mlperf.kernels import attention, device, gemm
from wan_mlperf.parallel import mesh
from wan_mlperf.recipe import CONFIGS, load_recipe
from wan_mlperf.step_plan import make_plan
from wan_mlperf.text_encoder import check_prompt
from wan_mlperf.videos.manifest import MANIFEST

RECIPES = [yaml.safe_load(file.read_text()) for file in sorted(CONFIGS.glob("*.yaml"))]
CONF = (CONFIGS / "mlperf" / "user.conf").read_text()
VIDEOS = {"recipes": {"k": {"a": 1}}, "videos": {"0.mp4": {"prompt": "a", "seed": 42, "recipe": "k", "sha256": "0"}}}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5000),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["auto", "sdpa", "sage_fp4", "mxfp4", "bf16", "allow", "1e3", "~", "0x10", "2020-01-01", "../..", "/dev/null", ""]
    ),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@st.composite
def mutated(draw: st.DrawFn, originals: list[Any]) -> Any:
    """A nested value with up to three places changed, removed or added."""
    whole = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 3))):
        place = whole
        while True:
            if not isinstance(place, dict) or not place:
                break
            key = draw(st.sampled_from(sorted(place, key=str)))
            inner = place[key]
            if isinstance(inner, dict) and inner and draw(st.booleans()):
                place = inner
                continue
            action = draw(st.sampled_from(["change", "change", "remove", "rename", "add"]))
            if action in ("remove", "rename"):
                del place[key]
            if action in ("rename", "add"):
                place[str(key) + draw(st.text(max_size=3))] = draw(values)
            if action == "change":
                place[key] = draw(values)
            break
    return whole


@st.composite
def cut(draw: st.DrawFn, original: str) -> bytes:
    """A text with a few pieces cut out, inserted or doubled, as bytes that may not be UTF-8."""
    content = bytearray(original.encode())
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        content[start : start + draw(st.integers(0, 9))] = draw(
            st.one_of(
                st.binary(max_size=6), st.sampled_from([b"\n", b"=", b" = 1e99", b".", b"*", b"-1", b"\x00", b"9" * 30, b"nan"])
            )
        )
    return bytes(content)


def works_or_refuses(call: Any) -> None:
    """Run it. A refusal must be one line of readable length."""
    try:
        call()
    except BadInput as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000


def examples(number: int) -> Any:
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def use_recipe(file: Path) -> None:
    recipe = load_recipe(file)
    workload = recipe.effective_workload
    plan = make_plan(recipe, workload)
    here, smooth_k = device.probe(), recipe.attention.smooth_k
    attention.check([step.attention for step in plan], here, references=recipe.stands_for, smooth_k=smooth_k)
    gemm.check(recipe.gemm, here, allow_reference=recipe.stands_for is not None)
    _, _, rows, columns = workload.latent_shape(16)
    for world in (1, 2, 8):
        works_or_refuses(lambda world=world: mesh.plan_shape(recipe.mesh, world=world, heads=8, latent_rows=max(rows, columns)))


@examples(150)
@given(recipe=mutated(RECIPES))
def test_mutated_recipes(tmp_path: Path, recipe: Any) -> None:
    file = tmp_path / "recipe.yaml"
    try:
        file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    except UnicodeEncodeError:
        return
    works_or_refuses(lambda: use_recipe(file))


@examples(100)
@given(content=cut((CONFIGS / "tiny.yaml").read_text()))
def test_recipe_files_cut_up(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    works_or_refuses(lambda: use_recipe(file))


@examples(100)
@given(content=cut(CONF))
def test_user_conf_files(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "user.conf"
    file.write_bytes(content)
    for scenario in loadgen.SCENARIOS:
        works_or_refuses(lambda scenario=scenario: loadgen.make_settings(scenario, "performance", file, 248))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@examples(75)
@given(content=st.one_of(st.binary(max_size=200), cut("a red circle\n\n  ein grüner Kreis \n" + "word " * 120)))
def test_prompt_files(tmp_path: Path, tokenizer: Any, content: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)

    def use() -> None:
        for prompt in read_prompts(file):
            works_or_refuses(lambda prompt=prompt: check_prompt(tokenizer, prompt))

    works_or_refuses(use)


@examples(75)
@given(content=st.one_of(mutated([VIDEOS]).map(lambda value: json.dumps(value).encode()), cut(json.dumps(VIDEOS))))
@pytest.mark.parametrize("force", [False, True])
def test_manifests(tmp_path: Path, force: bool, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    (tmp_path / "0.mp4").write_bytes(b"video")
    works_or_refuses(lambda: VideoList(tmp_path, ["a"], seed=42, recipe={"a": 1}, force=force).missing())
