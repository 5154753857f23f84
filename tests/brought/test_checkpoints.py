"""Model folders as people bring them: what works, what is refused with its name, and when two are the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_mlperf import Pipeline, checkpoint, load_recipe, preflight
from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import gemm
from wan_mlperf.step_plan import WAN22_SCHEDULER, make_plan, make_scheduler

SIZES = ("workload.steps=2", "workload.height=32", "workload.width=32", "workload.frames=5", "mesh.ranks=1")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy to change. Its files are links until `own` makes one of them the copy's own."""
    return shutil.copytree(model, tmp_path / "copy", copy_function=os.symlink)


def own(file: Path) -> Path:
    """Make a linked file a real one."""
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    return file


def change_json(file: Path, **changes: Any) -> None:
    own(file).write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def weights(folder: Path, part: str) -> Path:
    """The one file of a part's weights."""
    (file,) = (folder / part).glob("*.safetensors")
    return file


def change_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(file))
    own(file)
    save_file(tensors, file, {"format": "pt"})


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(BadInput) as error:
        checkpoint.find(str(folder))
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_identity_follows_content(folder: Path, model: Path, tmp_path: Path) -> None:
    """Wherever it lies and its parts are linked to; one weight in the middle makes it another."""
    before = checkpoint.find(str(model)).identity
    linked = tmp_path / "linked"
    linked.mkdir()
    for one in model.iterdir():
        (linked / one.name).symlink_to(one)
    assert checkpoint.find(str(linked)).identity == checkpoint.find(str(folder)).identity == before
    file = own(weights(folder, "transformer"))
    times = file.stat()
    with file.open("r+b") as stream:
        stream.seek(times.st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `rsync --times` and `cp -p` leave it
    assert checkpoint.find(str(folder)).identity != before
    change_json(folder / "scheduler" / "scheduler_config.json", flow_shift=5.0)
    changed = checkpoint.find(str(folder)).identity
    assert len({before, changed, checkpoint.find(str(linked)).identity}) == 2


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_quantised_weights_are_refused(kind: str, folder: Path) -> None:
    def quantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: one.to(getattr(torch, kind)) if one.ndim == 2 else one for name, one in tensors.items()}

    change_weights(weights(folder, "transformer"), quantise)
    refused(folder, "transformer (high-noise expert)", "is quantised", "allowed: bf16, fp16 or fp32")


def test_scales_are_not_dropped(folder: Path) -> None:
    """fp8 with scales, and scales next to weights in bf16."""

    def scale(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "blocks.0.attn1.to_q.scale_weight": torch.ones(1)}

    change_weights(weights(folder, "transformer_2"), scale)
    refused(folder, "transformer_2 (low-noise expert)", "blocks.0.attn1.to_q.scale_weight")
    change_json(folder / "transformer_2" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused(folder, "quantization_config")


def test_a_variant_alone_is_loaded(folder: Path, model: Path) -> None:
    """`diffusion_pytorch_model.bf16.safetensors` and no other."""
    for part in ("transformer", "transformer_2", "vae", "text_encoder"):
        file = weights(folder, part)
        file.rename(file.with_name(file.name.replace(".safetensors", ".bf16.safetensors")))
    ours, theirs = (
        Pipeline.load(load_recipe("tiny", model=str(one), overrides=SIZES, exact=True)).generate("a cat")
        for one in (folder, model)
    )
    assert ours is not None and theirs is not None and (ours == theirs).all()
    file = weights(folder, "vae")
    file.with_name(file.name.replace("bf16", "fp16")).symlink_to(file)
    refused(folder, "vae (VAE) holds the variants bf16, fp16")


def test_weights_under_another_name(folder: Path) -> None:
    file = weights(folder, "vae")
    file.rename(file.with_name("wan_vae.safetensors"))
    refused(folder, "vae (VAE) has no safetensors weights", "(found: wan_vae.safetensors)")
    file.with_name("wan_vae.safetensors").rename(file.with_name("diffusion_pytorch_model.bin"))
    refused(folder, "(found: diffusion_pytorch_model.bin")


def test_weights_that_the_class_does_not_know(folder: Path) -> None:
    def control(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "vace_blocks.0.proj_in.weight": torch.ones(2, 2), "control_adapter.bias": torch.ones(1)}

    change_weights(weights(folder, "transformer"), control)
    refused(folder, "weights that WanTransformer3DModel does not know", "control_adapter.bias", "vace_blocks.0.proj_in.weight")


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}, ["is a WanVACETransformer3DModel"]),
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, ["a VACE (editing) model"]),
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}, ["an image-to-video model"]),
        ("model_index.json", {"_class_name": "FluxPipeline"}, ["is a FluxPipeline"]),
        ("model_index.json", {"_class_name": None}, ["names no pipeline"]),
        (
            "model_index.json",
            {"transformer_2": [None, None]},
            ["has one transformer, like Wan2.1", "Wan-AI/Wan2.2"],
        ),
        ("model_index.json", {"transformer_2": [None, None], "expand_timesteps": True}, ["TI2V-5B"]),
        ("model_index.json", {"transformer": ["diffusers", "WanVACETransformer3DModel"]}, ["is a WanVACETransformer3DModel"]),
        ("model_index.json", {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}, ["model_index.json says EulerDiscreteSch"]),
        ("transformer/config.json", {"in_channels": 36}, ["shape"]),
        ("transformer/config.json", {"num_layers": 10**9}, ["num_layers is 1000000000"]),
        ("transformer/config.json", {"num_attention_heads": "8"}, ["transformer (high-noise expert)"]),
    ],
)
def test_other_models_are_named(file: str, changes: dict[str, Any], words: list[str], folder: Path) -> None:
    change_json(folder / file, **changes)
    refused(folder, *words)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["high_noise_model/", "low_noise_model/", "Wan2.1_VAE.pth"], ["Wan2.2 in its original layout"]),
        (["diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth"], ["Wan2.1 in its original layout"]),
        (["Wan2.2_VAE.pth", "config.json"], ["Wan2.2-TI2V-5B in its original layout"]),
        (["blobs/", "refs/", "snapshots/", "snapshots/5be7/"], ["allowed: its folder snapshots/5be7"]),
        (["model/", "model/model_index.json"], ["its folder 'model' has one"]),
        (["wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"], ["as for ComfyUI"]),
        (["Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf"], ["GGUF"]),
        ([], ["it is empty"]),
    ],
)
def test_other_layouts_are_named(names: list[str], words: list[str], tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for name in names:
        (place / name).mkdir() if name.endswith("/") else (place / name).touch()
    refused(place, *words)


def test_one_part_of_a_model(model: Path) -> None:
    refused(model / "vae", "one part of a model")
    refused(weights(model, "vae"), "is a file")
    refused(Path("Wan-AI/Wan2.2-T2V-A14B"), "the original layout on the hub", "Wan-AI/Wan2.2-T2V-A14B-Diffusers")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_git_lfs_pointers_are_named(part: str, folder: Path) -> None:
    for file in (folder / part).iterdir():
        own(file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n")
    refused(folder, part, "is a Git LFS pointer", "git lfs pull")


def test_a_shard_that_is_missing(folder: Path) -> None:
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    file = weights(folder, "transformer")
    file.rename(file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}))
    refused(folder, "lacks diffusion_pytorch_model-00002-of-00002.safetensors")
    broken: tuple[dict[str, Any], ...] = (
        {},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../vae/x.safetensors"}},
    )
    for wrong in broken:
        index.write_text(json.dumps(wrong))
        refused(folder, "transformer (high-noise expert)", "index.json")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer"])
def test_an_index_without_metadata(part: str, folder: Path) -> None:
    """diffusers and transformers look into it. The experts are read by a reader that does not."""
    file = weights(folder, part)
    name = file.name.replace(".safetensors", "-00001-of-00001.safetensors")
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(load_file(file), name)}))
    file.rename(file.with_name(name))
    if part == "transformer":
        checkpoint.find(str(folder))
    else:
        refused(folder, f"{part} (", "has no metadata")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vae", {"latents_std": [0.0] * 16}),
        ("vae", {"latents_std": 1.0}),
        ("vae", {"latents_mean": [0.1]}),
        ("vae", {"latents_mean": None}),
        ("vae", {"latents_mean": ["a"] * 16}),
        ("vae", {"latents_mean": [float("nan")] * 16}),
        ("vae", {"scale_factor_spatial": 16}),
        ("vae", {"scale_factor_temporal": 8}),
        ("vae", {"patch_size": 2}),
        ("transformer", {"eps": "x"}),
        ("transformer_2", {"eps": None}),
        ("transformer_2", {"eps": float("nan")}),
        ("transformer", {"eps": -1.0}),
        ("text_encoder", {"relative_attention_max_distance": 0}),
    ],
)
def test_settings_that_no_shape_shows(part: str, changes: dict[str, Any], folder: Path) -> None:
    change_json(folder / part / "config.json", **changes)
    (key,) = changes
    refused(folder, f"{part} (", f"{key} is ", "; allowed: ")


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_mark_in_what_the_libraries_read(part: str, encoding: str, folder: Path) -> None:
    file = own(folder / part / "config.json")
    file.write_bytes(file.read_text().encode(encoding))
    refused(folder, f"{part} (", "config.json starts with a byte order mark")


@pytest.mark.parametrize("name", ["transformer/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"])
def test_a_pipe_in_place_of_a_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, f"{Path(name).name} is a folder, a pipe or a device")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("part", "dtype"), [("transformer", "bfloat16"), ("transformer_2", "float32"), ("vae", "float32")])
def test_weights_that_are_no_numbers(part: str, dtype: str, value: float, folder: Path) -> None:
    """Low-precision formats would make ordinary numbers of them, and a video that looks whole."""
    name = "blocks.0.attn1.to_v.weight" if part != "vae" else "decoder.conv_in.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[-1] = value
        return tensors

    change_weights(weights(folder, part), spoil)
    found = checkpoint.find(str(folder))
    with pytest.raises(BadInput, match=rf"{part} \(.*{name} holds NaN or infinity"):
        found.load_vae("float32") if part == "vae" else found.load_transformer(part, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_max_seq_len": 1}, "rope_max_seq_len is 1; allowed: at least 2"),
        ({"num_attention_heads": 16, "attention_head_dim": 16}, "attention_head_dim is 16; allowed with attention sage_fp4"),
    ],
)
def test_experts_that_do_not_fit_the_recipe(changes: dict[str, Any], words: str, model: Path) -> None:
    found = checkpoint.find(str(model))
    configs = {part: {**found.config(part), **changes} for part in ("transformer", "transformer_2")}
    recipe = load_recipe("tiny", model=str(model), overrides=SIZES)
    plan = preflight.prepare(recipe).plan
    fake = SimpleNamespace(config=configs.__getitem__)
    with pytest.raises(BadInput, match=words):
        preflight._check_experts(recipe, recipe.effective_workload, fake, plan)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["nothing.*", "block.0.*", "["])
def test_a_pattern_that_no_layer_matches(pattern: str, model: Path) -> None:
    recipe = load_recipe("tiny", model=str(model), overrides=(*SIZES, f"gemm.keep=[['{pattern}', fp8]]"))
    with pytest.raises(BadInput, match=r"gemm.keep: no layer's name matches .* names such as blocks.0.attn1.to_q"):
        preflight.prepare(recipe)


def test_the_names_of_linear_layers_are_the_transformers(model: Path) -> None:
    expert = checkpoint.find(str(model)).load_transformer("transformer", "float32")
    names = [name for name, one in expert.named_modules() if isinstance(one, torch.nn.Linear) and name.startswith("blocks.")]
    assert names == gemm.linear_names(expert.config.num_layers)


def test_an_empty_name_for_the_noise(model: Path) -> None:
    with pytest.raises(BadInput, match=r"model\.fixed_latent"):
        preflight.prepare(load_recipe("tiny", model=str(model), overrides=(*SIZES, "model.fixed_latent=")))


def test_a_damaged_tokenizer(folder: Path) -> None:
    own(folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer \(tokenizer\) cannot be loaded"):
        preflight.prepare(load_recipe("tiny", model=str(folder), overrides=SIZES))


def test_the_device_is_asked_before_126_gb_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_from_hub", lambda: pytest.fail("the model was fetched"))
    recipe = load_recipe("mi355x-singlestream")
    assert recipe.model.checkpoint == checkpoint.HUB_NAME
    with pytest.raises(BadInput, match="gfx950"):
        preflight.prepare(recipe)


def test_a_folder_of_the_hubs_name_is_taken_before_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_from_hub", lambda: pytest.fail("the model was fetched"))
    monkeypatch.chdir(tmp_path)
    place = tmp_path / checkpoint.HUB_NAME
    place.parent.mkdir()
    place.symlink_to(model)
    assert checkpoint.find(checkpoint.HUB_NAME).identity == checkpoint.find(str(model)).identity


def test_the_models_own_scheduler_is_used(folder: Path, model: Path) -> None:
    """Another flow_shift, and another class, in the plan and in the video, as diffusers' own pipeline has them."""
    from diffusers import WanPipeline

    config = folder / "scheduler" / "scheduler_config.json"
    change_json(config, flow_shift=7.0)
    shifted = preflight.prepare(load_recipe("tiny", model=str(folder), overrides=SIZES)).plan
    plain = preflight.prepare(load_recipe("tiny", model=str(model), overrides=SIZES)).plan
    assert shifted[1].sigma > plain[1].sigma
    config.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0}))
    change_json(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    theirs = WanPipeline.from_pretrained(folder)
    theirs.scheduler.set_timesteps(2)
    pipeline = Pipeline.load(load_recipe("tiny", model=str(folder), overrides=SIZES, exact=True))
    assert [step.timestep for step in pipeline.plan] == theirs.scheduler.timesteps.tolist()
    theirs.set_progress_bar_config(disable=True)
    made = theirs(
        prompt="a red circle",
        negative_prompt=pipeline.workload.negative_prompt,
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=pipeline.workload.guidance_high,
        guidance_scale_2=pipeline.workload.guidance_low,
        latents=pipeline.noise(),
        output_type="latent",
    ).frames
    assert torch.allclose(pipeline.latents(["a red circle"]), made, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "EulerDiscreteScheduler"},
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "epsilon"},
        {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True},
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "num_train_timesteps": 10**12},
        {
            "_class_name": "UniPCMultistepScheduler",
            "prediction_type": "flow_prediction",
            "flow_shift": "three",
            "use_flow_sigmas": True,
        },
    ],
)
def test_schedulers_that_cannot_be(config: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="scheduler: "):
        make_scheduler(config, 20)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {"predict_x0": False},
        {"solver_order": 0},
        {"solver_order": -1},
        {"disable_corrector": None},
        {"flow_shift": -3.0},
        {"flow_shift": 1e30},
        {"flow_shift": 0},
        {"num_train_timesteps": 1},
    ],
)
def test_scheduler_settings_that_fail_at_a_step(changes: dict[str, Any]) -> None:
    recipe = load_recipe("tiny")
    with pytest.raises(BadInput, match=r"scheduler: .*the model's settings"):
        make_plan(recipe, recipe.effective_workload, {**WAN22_SCHEDULER, **changes})
