"""Every mistake of a user is one line with the value and what is allowed, exit code 2, before weights are read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, SMALL
from wan_mlperf import checkpoint, run
from wan_mlperf.errors import BadInput
from wan_mlperf.generate import __main__ as generate
from wan_mlperf.recipe import load_recipe


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make reading weights or starting processes fail the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read, or ranks started, before the input was checked")

    for loader in ("load_transformer", "load_vae", "load_text_encoder"):
        monkeypatch.setattr(checkpoint.Checkpoint, loader, refuse)
    monkeypatch.setattr("wan_mlperf.parallel.launch.launch", refuse)
    monkeypatch.chdir(tmp_path)


def recipe_file(folder: Path, text: str) -> str:
    file = folder / "my.yaml"
    file.write_text(text)
    (folder / "user.conf").write_text("*.SingleStream.min_query_count = 64\n")
    return str(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("atention: {early: sdpa}", r"atention: no such key, did you mean 'attention'\?; allowed: name, model"),
        ("attention: {ealry: sdpa}", r"attention.ealry: no such key, did you mean 'early'\?; allowed: early, late"),
        ("attention: {early: fp4}", r"attention.early: 'fp4' is not allowed; allowed: 'sdpa', 'sage_fp8' or 'sage_fp4'"),
        ("attention: {early_fraction: 1.5}", r"attention.early_fraction: 1.5 is not allowed; .*less than or equal to 1"),
        ("attention: {early_fraction: half}", r"attention.early_fraction: 'half' is not allowed; .*number"),
        ("warmup_queries: two", r"warmup_queries: 'two' is not allowed; .*integer"),
        ("warmup_queries: true", r"warmup_queries: True is not allowed; .*integer"),
        ("mesh: {replicas: auto}", r"mesh: .*replicas and ulysses cannot both be auto"),
        ("mesh: 4", r"mesh: 4 is not allowed"),
        ("workload: {height: 64}", r"workload.width: is missing"),
        ("folder: /tmp", "folder: is not a key of a recipe"),
        ("- a list", "holds list; allowed: a mapping"),
        ("{", "not YAML"),
    ],
)
def test_recipes(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        run.main(["--recipe", recipe_file(tmp_path, text)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario", "singlestrem"], r"scenario: 'singlestrem' is not known, did you mean 'singlestream'\?"),
        (["--mode", "acuracy"], r"mode: 'acuracy' is not known, did you mean 'accuracy'\?"),
        (["--recipe", "tinny"], r"recipe 'tinny': no such file, did you mean 'tiny'\?"),
        (["--set", "attention.early"], r"--set 'attention.early': allowed: key.path=value"),
        (["--set", "vae.chunk=0"], r"vae.chunk: 0 is not allowed"),
        (["--scenari", "offline", "--frobnicate"], r"--frobnicate.*see --help"),
        (["--prompts", "missing.txt"], r"prompts 'missing.txt': cannot be read"),
        (["--model", "nowhere"], r"model 'nowhere': no such folder.*allowed: embedded, Wan-AI"),
        (["--set", "mesh.ranks=3"], r"world size 3: 8 heads are not divisible by the Ulysses degree 3"),
        (["--set", "compile.decoder=true"], r"compile.decoder: true.* on 2 ranks is slower; allowed: false, or one rank"),
        (["--set", "references=forbid", "--set", "attention.early=sage_fp4"], r"sage_fp4.*AITER.*gfx950"),
        (
            ["--set=references=forbid", "--set=attention.early=sdpa", "--set=attention.late=sdpa"],
            r"gemm 'mxfp4'.*AITER.*gfx950",
        ),
        (
            ["--set=references=forbid", "--set=model.dtype=float32"],
            r"model.dtype 'float32': computes in fp32, and sage_fp4, mxfp4 take 16 bits; allowed: bfloat16, or",
        ),
        (["--set", "model.fixed_latent=none.pt"], r"model.fixed_latent 'none.pt': cannot be read"),
    ],
)
def test_run(arguments: list[str], message: str, model: Path) -> None:
    with pytest.raises(BadInput, match=message):
        run.main([*SMALL, "--model", str(model), *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], r"prompt: '' is empty"),
        (["  "], r"prompt: '  ' is empty"),
        (["a cat " * 200], r"prompt: .* tokens; allowed: at most 512; this part would be cut: '"),
        (["a cat", "--size", "70x64"], r"height: 70 is not allowed; allowed: a multiple of 16"),
        (["a cat", "--size", "big"], r"--size: 'big' is not allowed; allowed: HEIGHTxWIDTH"),
        (["a cat", "--frames", "16"], r"frames: 16 is not allowed; allowed: 4 n \+ 1"),
        (["a cat", "--steps", "0"], r"steps: 0 is not allowed; allowed: greater than or equal to 1"),
        (["a cat", "--steps", "many"], r"--steps: invalid int value: 'many'"),
        (["a cat", "-o", "there.mp4"], r"--output: 'there.mp4' exists; allowed: another name, or --force"),
        (["a cat", "-o", "clip.avi"], r"--output: 'clip.avi' is not allowed; allowed: a name that ends in .mp4"),
        (["a cat", "-o", "/proc/none/x.mp4"], r"output folder '/proc/none': not writable"),
        ([], r"prompt: allowed: either a prompt or --prompts FILE"),
    ],
)
def test_generate(arguments: list[str], message: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "there.mp4").touch()
    with pytest.raises(BadInput, match=message):
        generate.main([*arguments, *SMALL, "--model", str(model)])


def test_empty_prompt_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(BadInput, match="holds no prompt"):
        run.main(["--prompts", "empty.txt", "--model", str(model)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("*.SingleStream.min_querry_count = 64", r"key 'min_querry_count' is not known, did you mean 'min_query_count'\?"),
        ("*.SingelStream.min_query_count = 64", r"scenario 'SingelStream' is not known, did you mean 'SingleStream'\?"),
        ("*.SingleStream.min_query_count = many", r"min_query_count is 'many'; allowed: a number"),
        ("min_query_count = 64", r"is not a setting; allowed: model.scenario.key = value"),
    ],
)
def test_user_conf(line: str, message: str, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, "user_conf: user.conf")
    (tmp_path / "user.conf").write_text(line)
    with pytest.raises(BadInput, match=message):
        run.main(["--recipe", recipe])


def test_output_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"output folder 'file/inner': not writable"):
        run.main(["--outputs", "file/inner", "--model", str(model)])


@pytest.mark.parametrize("part", ["transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_that_lacks_a_part(part: str, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    shutil.rmtree(copy / part)
    with pytest.raises(BadInput, match=rf"lacks {part} \("):
        checkpoint.find(str(copy))


def test_folders_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return shutil.copytree(model, tmp_path / name)

    no_weights = broken("no-weights")
    next((no_weights / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(BadInput, match=r"vae \(VAE\) has no safetensors weights"):
        checkpoint.find(str(no_weights))
    cut = broken("cut")
    file = next((cut / "transformer_2").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"transformer_2 \(low-noise expert\): .* is damaged"):
        checkpoint.find(str(cut))
    wide = broken("wide")
    config = wide / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"ffn_dim": 256', '"ffn_dim": 512'))
    with pytest.raises(BadInput, match=r"transformer \(high-noise expert\): blocks.0.ffn.* has shape .* needs"):
        checkpoint.find(str(wide))
    with pytest.raises(BadInput, match=r"has no model_index\.json"):
        checkpoint.find(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["wan_mlperf.run", "--recipe", "my.yaml"], "error: recipe 'my.yaml': atention: no such key"),
        (["wan_mlperf.generate", "a cat", "-o", "x.mp4", "--recipe", "tinny"], "error: recipe 'tinny': no such file"),
        (["wan_mlperf.run", "--scenario", "singlestrem"], "error: scenario: 'singlestrem' is not known"),
    ],
)
def test_it_is_one_line_and_exit_code_2_before_torch_is_imported(words: list[str], says: str, tmp_path: Path) -> None:
    recipe_file(tmp_path, "atention: {}")
    command = [sys.executable, "-X", "importtime", "-m", *words]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), lines
    assert lines[0].startswith(says)
    assert len(done.stderr.splitlines()) > 100 and not re.search(r"\| +(torch|diffusers)$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("key", ["exchange\n", "a\u2028b", "dty\tpe", "\x1b[31m", "x" * 3000])
def test_a_key_that_cannot_be_printed_is_one_line(key: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for content in ({key: "bf16"}, {"model": {key: 1}}):
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        with pytest.raises(BadInput, match="no such key") as refused:
            load_recipe(file)
        assert str(refused.value).isprintable() and len(str(refused.value)) < 500
    with pytest.raises(BadInput, match="no such key") as refused:
        load_recipe("tiny", overrides=[f"{key}=1"])
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500
