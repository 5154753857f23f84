"""A machine with a GPU and given packages, for xDiT's own probe and ours: run as a program, prints JSON.

For each case of standard input a forked process writes packages of the right or of other signatures, lets torch say that there is
a GPU of the case's architecture, imports xDiT anew and asks what every kernel lacks. What cannot be had here and is made up: the
packages' functions have their real names and arguments and no bodies, no device exists (`torch.cuda.device_count()` is 0), and
cuDNN's version is the case's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import attention, gemm
from wan_mlperf.kernels.backends import ATTENTION, GEMM
from wan_mlperf.kernels.device import Device
from wan_mlperf.kernels.probe import missing_gemm
from wan_mlperf.parallel import xdit
from wan_mlperf.recipe import Gemm, GemmName

FLASH_ARGUMENTS = "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)"
WRAPPED_GEMM = """
def gemm_a4w4(*args, **kwargs): ...  # as AITER's torch_compile_guard leaves it; the operator has the arguments
LIBRARY = torch.library.Library("aiter", "FRAGMENT")
LIBRARY.define("gemm_a4w4(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, {out}Tensor? bias=None, float? alpha=1.0, "
               "float? beta=0.0, bool? bpreshuffle=True) -> Tensor")
"""
AITER_TOP = f"""
import torch
class dtypes: fp8 = torch.float8_e4m3fn
class QuantType: per_1x32 = 1
def get_hip_quant(qType): ...
def per_tensor_quant(x, scale=None, scale_dtype=None, quant_dtype=None, dtypeMax=None): ...
def flash_attn_func({FLASH_ARGUMENTS}, return_lse=False, return_attn_probs=False, how_v3_bf16_cvt=1): ...
def flash_attn_varlen_func({FLASH_ARGUMENTS}, return_lse=False, return_attn_probs=False, how_v3_bf16_cvt=1): ...
"""
FP8_WITH_DESCALES = "def flash_attn_fp8_pertensor_func(q, k, v, q_descale, k_descale, v_descale, causal=False): ...\n"
SHUFFLE = "def shuffle_weight(x, layout=(16, 16), use_int4=False): ...\n"
SAGE = "def get_sage_fwd_configs(): ...\ndef fav3_sage_wrapper_func(q, k, v, causal=False, layout='bshd'{}): ...\n"
SAGE_V2 = """
def get_sage_fwd_configs_mxfp4(): ...
def fav3_sage_mxfp4_wrapper(q, k, v, causal, layout="bshd", q_smooth=False, hadamard_rotation=False, config=None, R=None{}): ...
"""
MHA_V4 = """
from enum import IntEnum
class AttentionFormat(IntEnum): MXFP4 = 9
class AttentionScaleMode(IntEnum): F32_PER_TENSOR = 1
def native_fp8_format(): ...
def mha_v4(q, k, v, q_format, k_format, v_format, softmax_scale=None, out=None, return_lse=False): ...
def mha_v4_packed(q, k, v, q_descale, k_descale, v_descale, q_format, k_format, v_format): ...
def mha_v4_q_multiplier(softmax_scale): ...
def quantize_fp8(input): ...
def quantize_mxfp8_q(input, multiplier): ...
"""
TRITON = "aiter/ops/triton/attention"
AITER_FEBRUARY = {
    "aiter/__init__.py": AITER_TOP + FP8_WITH_DESCALES + WRAPPED_GEMM.format(out=""),
    "aiter/ops/shuffle.py": SHUFFLE,
    f"{TRITON}/fav3_sage.py": SAGE.format(""),
    f"{TRITON}/fav3_sage_attention_mxfp4_wrapper.py": SAGE_V2.format(""),
}
AITER = AITER_FEBRUARY | {
    f"{TRITON}/fav3_sage.py": SAGE.format(", return_lse=False, smooth_k=True"),
    f"{TRITON}/fav3_sage_attention_mxfp4_wrapper.py": SAGE_V2.format(", return_lse=False, smooth_k=True"),
    "aiter/ops/mha_v4.py": MHA_V4 + "def quantize_mxfp8_k(input): ...\n",
}
FA3 = "def flash_attn_func(q, k, v, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None{}): ...\n"
FA4 = "def flash_attn_func(q, k, v, softmax_scale=None, causal=False{}): ...\ndef flash_attn_varlen_func(q, k, v): ...\n"
SAGEATTN = "def sageattn(q, k, v, tensor_layout='HND', is_causal=False, sm_scale=None, {}**kwargs): ...\n"
PACKAGES: dict[str, dict[str, str]] = {
    "aiter": AITER,
    "aiter of february 2026": AITER_FEBRUARY,
    "aiter with half of mha_v4": AITER | {"aiter/ops/mha_v4.py": MHA_V4},
    "amd-aiter of PyPI": {
        "aiter/__init__.py": AITER_TOP
        + "def flash_attn_fp8_pertensor_func(q, k, v, causal=False, softmax_scale=None): ...\n"
        + WRAPPED_GEMM.format(out="Tensor out, "),
        "aiter/ops/shuffle.py": SHUFFLE,
    },
    "aiter of PyPI": {"aiter/__init__.py": "async def anext(iterator): ...\n"},
    "flash_attn_3": {"flash_attn_interface.py": FA3.format(", return_attn_probs=False") + "def flash_attn_varlen_func(): ...\n"},
    "flash_attn_3 of july 2025": {"flash_attn_interface.py": FA3.format("") + "def flash_attn_varlen_func(): ...\n"},
    "flash_attn": {
        "flash_attn/__init__.py": f"__version__ = '2.8.3'\ndef flash_attn_func({FLASH_ARGUMENTS}, return_attn_probs=False): ...\n"
        "def flash_attn_varlen_func(): ...\n"
    },
    "flash_attn_4": {"flash_attn/__init__.py": "", "flash_attn/cute/interface.py": FA4.format(", return_lse=False")},
    "flash_attn_4_fp4": {
        "flash_attn/__init__.py": "",
        "flash_attn/cute/interface.py": FA4.format(", mSFQ=None, mSFK=None"),
        "flash_attn/cute/flash_fwd_sm100_fp4.py": "class FlashAttentionForwardSm100: ...\n",
    },
    "flashinfer": {
        "flashinfer/quantization.py": "class SfLayout: layout_128x4 = 0\n"
        "def nvfp4_quantize(a, a_global_sf, sfLayout=None, do_shuffle=False): ...\n"
    },
    "sageattention": {"sageattention/__init__.py": SAGEATTN.format("return_lse=False, ")},
    "sageattention of PyPI": {"sageattention/__init__.py": SAGEATTN.format("")},
    "an old torchao": {
        "torchao/quantization.py": "class Float8DynamicActivationFloat8WeightConfig:\n"
        "    def __init__(self, activation_dtype=None, weight_dtype=None, granularity=None): ...\n"
        "class PerRow: ...\nclass PerTensor: ...\ndef quantize_(model, config): ...\n",
        "torchao/prototype/mx_formats.py": "class MXFPInferenceConfig: ...\n",
    },
}


def pretend(case: Mapping[str, Any], folder: Path) -> Device:
    """Put the case's packages into `folder` and its GPU into torch."""
    for package in case["packages"]:
        for name, source in PACKAGES[package].items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            for parent in file.relative_to(folder).parents:
                if parent != Path():
                    (folder / parent / "__init__.py").touch()
            file.write_text(source)
    sys.path.insert(0, str(folder))
    arch: str = case["arch"]
    is_amd = arch.startswith("gfx")
    major, minor = (9, 5) if is_amd else (int(arch[2:-1]), int(arch[-1]))
    properties = SimpleNamespace(gcnArchName=f"{arch}:sramecc+:xnack-", name=arch, major=major, minor=minor)
    cuda: Any = torch.cuda
    cuda.is_available, cuda.device_count, cuda.current_device = lambda: True, lambda: 0, lambda: 0
    cuda.get_device_properties, cuda.get_device_name = lambda _index=0: properties, lambda _device=None: arch
    cuda.get_device_capability = lambda _device=None: (major, minor)
    xdit.gpu_count = lambda: 1
    torch.version.hip, torch.version.cuda = ("7.0", None) if is_amd else (None, "13.0")
    cudnn: Any = torch.backends.cudnn
    cudnn.is_available, cudnn.version = lambda: case.get("cudnn", 0) > 0, lambda: case.get("cudnn")
    return Device(arch=arch, name=arch, torch=torch.device("cuda"))


def ask(case: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What every kernel lacks, and what each name then is."""
    device = pretend(case, folder)
    # Anew: xDiT, which looks for packages when it is imported, and packages that are here in another version.
    stale = {"xfuser", *(path.name for path in folder.glob("*"))}
    for name in [name for name in sys.modules if name.split(".")[0] in stale]:
        del sys.modules[name]
    xdit.load.cache_clear()
    try:
        xdit.load()
    except BadInput as refusal:
        return {"refused": str(refusal)}
    dtype = getattr(torch, case.get("dtype", "bfloat16"))
    how = {"ring": case.get("ring", 1), "head_dim": case.get("head_dim", 128), "dtype": dtype}
    names: dict[str, Any] = {}
    for name in attention.CANDIDATES:
        try:
            kernel = attention.resolve(
                [name],
                device,
                references=None,
                probe=lambda key: xdit.check_backend(key, **how),
                smooth_k=case.get("smooth_k", False),
            )[name]
            names[name] = {"takes": kernel.backend, "passed over": kernel.passed_over}
        except BadInput as refusal:
            names[name] = {"refused": str(refusal)}
    native = attention.resolve([], device, references=None, probe=lambda key: xdit.check_backend(key, **how), cross="native")[
        "cross"
    ]
    names["native cross"] = {"takes": native.backend, "passed over": native.passed_over, "lse": native.lse, "bias": native.bias}
    formats: tuple[GemmName, ...] = ("fp8", "mxfp4")
    for one in formats:
        recipe = Gemm(high_noise=one, low_noise=one)
        try:
            table = gemm.resolve(recipe, device, allow_reference=False, probe=lambda key: missing_gemm(key, dtype=dtype))
            names[one] = {"takes": table[one]}
        except BadInput as refusal:
            names[one] = {"refused": str(refusal)}
    backends = {key: xdit.check_backend(key, **how) for key in ATTENTION}
    return {"names": names, "backends": backends, "gemms": {key: missing_gemm(key, dtype=dtype) for key in GEMM}}


def in_a_fork(case: Mapping[str, Any]) -> Any:
    """The outcome of one case, asked in a process of its own that has everything but the packages imported."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "out.json", "w+") as out:
        child = os.fork()
        if not child:
            try:
                json.dump(ask(case, Path(folder) / "packages"), out)
                out.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        out.seek(0)
        return json.loads(out.read())


if __name__ == "__main__":
    xdit.load()  # what it imports stays imported for the forks
    print(json.dumps({name: in_a_fork(case) for name, case in json.load(sys.stdin).items()}))
