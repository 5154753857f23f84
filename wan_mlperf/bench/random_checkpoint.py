"""Writes a Wan2.2 checkpoint of any size with random weights, in the Diffusers layout, for tests and for timing other shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wan_mlperf.step_plan import WAN22_SCHEDULER

# The model_index.json that diffusers writes for Wan2.2-T2V-A14B.
MODEL_INDEX: Final = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.35.0",
    "boundary_ratio": 0.875,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
SMALL_UMT5: Final[Mapping[str, int]] = {"vocab_size": 258, "d_kv": 32, "num_layers": 2, "num_heads": 4}


def write(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    heads: int = 8,
    head_dim: int = 32,
    ffn: int = 1024,
    vae_base: int = 16,
    vae_blocks: int = 1,
    text_dim: int = 128,
    text_encoder: Mapping[str, int] = SMALL_UMT5,
    dtype: torch.dtype = torch.float32,
    shard: str = "10GB",
) -> Path:
    """Write a checkpoint of these sizes into `folder` and return the folder. The same arguments give the same checkpoint.

    `text_encoder` are keys of UMT5Config. No file of an expert is larger than `shard`.
    """
    with torch.random.fork_rng(devices=[]):
        for offset, part in enumerate(("transformer", "transformer_2")):
            torch.manual_seed(seed + offset)
            transformer = WanTransformer3DModel(
                num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=ffn, num_layers=layers, text_dim=text_dim
            )
            transformer.to(dtype).save_pretrained(folder / part, max_shard_size=shard)
        torch.manual_seed(seed + 2)
        vae = AutoencoderKLWan(base_dim=vae_base, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=vae_blocks)
        vae.to(dtype).save_pretrained(folder / "vae")
        torch.manual_seed(seed + 3)
        config = UMT5Config(d_model=text_dim, dropout_rate=0.0, **{"d_ff": 2 * text_dim, **text_encoder})
        UMT5EncoderModel(config).to(dtype).save_pretrained(folder / "text_encoder")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    UniPCMultistepScheduler(**WAN22_SCHEDULER).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, which takes any string."""
    vocabulary = {"<pad>": 0, "</s>": 1}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512)
