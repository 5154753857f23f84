"""Writes checkpoints of the right architectures with random weights, so that VBench runs without the real ones.

Run by the VBench environment's interpreter: `python -I make_random_checkpoints.py FOLDER`. Scores with them mean nothing:
they only prove that the six dimensions load, run and are read back. They are in half precision (about 1.3 GB).
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

DINO_CODE = '''"""Stands in for the DINO repository's torch.hub entry: the same ViT-B/16, the same names, from timm."""
import timm
import torch

ADDRESS = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"


def dino_vitb16(pretrained=True, **ignored):
    model = timm.create_model("vit_base_patch16_224", num_classes=0, dynamic_img_size=True, dynamic_img_pad=True)
    if pretrained:
        model.load_state_dict(torch.hub.load_state_dict_from_url(url=ADDRESS, map_location="cpu"), strict=True)
    return model
'''
WORDS = ["picture", "of", "alley"]
FIRST_WORD, END = 1000, 102


def make_all(folder: Path) -> None:
    """Write every checkpoint of the six dimensions under `folder`, at the paths that VBench reads."""
    make_dino(folder / "dino_model")
    make_clip(folder / "clip_model")
    make_amt(folder / "amt_model")
    make_raft(folder / "raft_model" / "models")
    make_bert(folder / "bert-base-uncased")
    make_tag2text(folder / "caption_model", folder)


def make_dino(folder: Path) -> None:
    import timm

    code = folder / "facebookresearch_dino_main"
    code.mkdir(parents=True)
    (code / "hubconf.py").write_text(DINO_CODE)
    model = timm.create_model("vit_base_patch16_224", num_classes=0)
    save(model.state_dict(), folder / "dino_vitbase16_pretrain.pth")


def make_clip(folder: Path) -> None:
    import torch
    from clip.model import CLIP

    folder.mkdir(parents=True)
    model = CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12).eval()  # OpenAI's ViT-B/32
    pixels, tokens = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
    with torch.no_grad():  # OpenAI ships a TorchScript archive, and openai-clip reads the widths from its weights
        torch.jit.trace(model, (pixels, tokens), check_trace=False).save(str(folder / "ViT-B-32.pt"))


def make_amt(folder: Path) -> None:
    from omegaconf import OmegaConf
    from vbench.third_party.amt.utils.build_utils import build_from_cfg

    configuration = Path(sys.modules["vbench.third_party.amt"].__path__[0]) / "cfgs" / "AMT-S.yaml"
    model = build_from_cfg(OmegaConf.load(configuration).network)
    save({"state_dict": model.state_dict()}, folder / "amt-s.pth")


def make_raft(folder: Path) -> None:
    from easydict import EasyDict
    from vbench.third_party.RAFT.core.raft import RAFT

    model = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False))
    save({f"module.{name}": value for name, value in model.state_dict().items()}, folder / "raft-things.pth")


def make_bert(folder: Path) -> None:
    """BERT base with its real sizes and a vocabulary of the real length, special tokens in their real places."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [f"[unused{index}]" for index in range(30522)]
    vocabulary[0] = "[PAD]"
    vocabulary[100 : END + 2] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for index, word in enumerate([*letters, *(f"##{letter}" for letter in letters), *WORDS]):
        vocabulary[FIRST_WORD + index] = word
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    BertModel(BertConfig()).half().save_pretrained(folder)


def make_tag2text(folder: Path, beside_bert: Path) -> None:
    from vbench.third_party.tag2Text.tag2text import Tag2Text_Caption

    os.chdir(beside_bert)  # it opens "bert-base-uncased"
    model = Tag2Text_Caption(image_size=384, vit="swin_b")
    # The only wish of these weights: captions say "alley" and end as soon as they may, or each would run to 30 random words.
    likely = model.text_decoder.cls.predictions.bias
    likely.data[model.tokenizer.convert_tokens_to_ids("alley")] = 19.0
    likely.data[END] = 20.0
    save({"model": model.state_dict()}, folder / "tag2text_swin_14m.pth")


def save(weights: dict[str, Any], path: Path) -> None:
    """Save tensors as half precision; loading copies them into the model's own single precision."""
    import torch

    def halved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: halved(inner) for name, inner in value.items()}
        return value.half() if torch.is_floating_point(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(halved(weights), path)


if __name__ == "__main__":
    target, worker = Path(sys.argv[1]).resolve(), sys.argv[2]
    runpy.run_path(worker)["declare_torchvision_operators"]()
    import torch as _torch

    _torch.manual_seed(0)
    make_all(target)
