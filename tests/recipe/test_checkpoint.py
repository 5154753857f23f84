"""The embedded checkpoint: expanded once, checked by content, safe when several ranks come at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from wan_mlperf import checkpoint


def expand(cache: Path, told: Path) -> None:
    os.environ["WAN_MLPERF_CACHE"] = str(cache)
    (told / os.environ["RANK"]).write_text(str(checkpoint.find("embedded").folder))


@pytest.mark.job
def test_several_ranks_at_once(tmp_path: Path) -> None:
    cache, told = tmp_path / "cache", tmp_path / "told"
    told.mkdir()
    run_ranks(expand, cache, told, ranks=3)
    folders = {file.read_text() for file in told.iterdir()}
    assert len(list(told.iterdir())) == 3 and len(folders) == 1
    assert [one.name for one in cache.iterdir()] == [Path(folders.pop()).name]  # nothing half-built is left


def test_a_damaged_file_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_MLPERF_CACHE", str(tmp_path))
    folder = checkpoint.find("embedded").folder
    file = next((folder / "vae").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert checkpoint.find("embedded").folder == folder
    assert file.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 1


def test_it_is_what_the_design_says() -> None:
    found = checkpoint.find("embedded")
    for part in ("transformer", "transformer_2"):
        config = found.config(part)
        assert (config["num_attention_heads"], config["attention_head_dim"]) == (8, 32)
        assert config["patch_size"] == [1, 2, 2]
    assert found.config("vae")["dim_mult"] == [1, 2, 4, 4]
    assert found.boundary_ratio == 0.875
    assert found.config("text_encoder")["dtype"] == "float32"  # as its weights are, once expanded
    assert {kind for kind, _ in checkpoint.headers(found.folder / "text_encoder", "text_encoder").values()} == {"F32"}
    high, low = (found.load_transformer(part, "float32").proj_out.weight for part in ("transformer", "transformer_2"))
    assert not torch.equal(high, low)
    for wanted in ("checkpoint", "bfloat16", "float32"):
        assert found.load_transformer("transformer", wanted).dtype == checkpoint.expert_dtype(wanted)


def test_it_ships_in_16_bits_and_at_most_40_mib() -> None:
    files = [file for file in checkpoint.EMBEDDED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40 * 2**20
    for part in ("transformer", "transformer_2", "vae", "text_encoder"):
        kinds = {kind for kind, _ in checkpoint.headers(checkpoint.EMBEDDED / part, part).values()}
        assert kinds <= {"BF16", "F16"}, part


def test_plain_diffusers_loads_the_shipped_folder() -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(checkpoint.EMBEDDED)
    assert pipeline.config.boundary_ratio == 0.875
    assert pipeline.tokenizer("any string, even ☃ and emoji 🎬").input_ids


def test_the_hub_is_named_with_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from wan_mlperf.errors import BadInput

    with pytest.raises(BadInput, match=r"revision 5be7df9619b5 is neither in the local"):
        checkpoint.find(checkpoint.HUB_NAME)
