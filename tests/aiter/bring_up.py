"""AITER's own Triton kernels on a CPU, in Triton's interpreter, behind xDiT's dispatch. `install` comes before torch's users.

The source is a checkout of AITER (github.com/ROCm/aiter, AITER_SRC); nothing of it is in this repository. What stands in for what
cannot exist here, and the limits of that:
- The packages' __init__.py files load HIP libraries and are not executed, so a name that AITER no longer exports goes unnoticed
  where it is put in by hand below.
- The device says gfx950 and lies on torch's CPU: nothing is learnt of tiles, local memory or speed.
- Triton's interpreter computes each program in numpy. It cannot multiply bf16, so rotations are in fp16; its cast from fp32 to
  E4M3 drops a carry, so torch's takes its place.
- `flash_attn_func` and its siblings are ASM and CK kernels: they are there for their signatures, which xDiT inspects.
- Its `tl.dot_scaled` (missing in triton 3.7) is written below from the definition of the formats.
- `gemm_a4w4` is AITER's Triton kernel of the same product; the ASM kernel wants its operands shuffled: they are put back first.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAD_DIM = 32  # of the small models: Sage V2 rotates blocks of this many


def install(source: Path) -> None:
    """Make the checkout's Triton kernels importable as `aiter`, and have xDiT find them. Call it before xfuser is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["XFUSER_AITER_SAGE_V2_BLOCK_R"] = str(HEAD_DIM)
    for name in ("aiter", "aiter.jit", "aiter.ops", "aiter.ops.triton", "aiter.ops.triton.quant", "aiter.ops.triton.utils"):
        package = _module(name)
        package.__path__ = [str(source / name.replace(".", "/"))]
    _architecture()
    _casts()
    _scaled_products()
    _exports(source)
    _tell_xdit()


def _tell_xdit() -> None:
    """Have xDiT's package check find AITER, and give the rotation of Sage V2 a matrix on the CPU."""
    spec = importlib.util.find_spec("xfuser")
    assert spec is not None
    sys.modules["xfuser"] = importlib.util.module_from_spec(spec)  # not executed: it asks its envs at once
    envs: Any = importlib.import_module("xfuser.envs")
    envs.PACKAGES_CHECKER.packages_info["has_aiter"] = True
    del sys.modules["xfuser"]
    wrappers: Any = importlib.import_module("aiter.ops.triton.quant.sage_attention_quant_wrappers")
    wrappers.create_hadamard_matrix = functools.partial(wrappers.create_hadamard_matrix, device="cpu")
    importlib.import_module("wan_mlperf.parallel.xdit").load()
    import torch

    backends: Any = importlib.import_module("xfuser.core.distributed.attention_backend")
    backends.HADAMARD_MATRIX = {torch.device("cpu"): backends._build_hadamard_matrix(HEAD_DIM, dtype=torch.float16)}


def _module(name: str, **names: Any) -> Any:
    """Make a module, known under its name and in its parent."""
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, module)
    return module


def _architecture() -> None:
    def yes() -> bool:
        return True

    def gfx() -> str:
        return "gfx950"

    _module(
        "aiter.ops.triton.utils._triton.arch_info",
        get_arch=gfx,
        is_gluon_avail=lambda: False,
        is_fp4_avail=yes,
        is_fp8_avail=yes,
        is_mx_scale_preshuffling_avail=yes,
        is_tdm_avail=lambda: False,
    )
    _module("aiter.jit.utils.chip_info", get_gfx=gfx, get_gfx_runtime=gfx, get_cu_num=lambda: 256)
    # Functions that would be compiled for HIP: they keep their empty bodies.
    _module("aiter.jit.core", compile_ops=lambda *_arguments, **_keys: lambda function: function)


def _casts() -> None:
    """Round fp32 to E4M3 as torch does."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    convert = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if dst_type.scalar != tl.float8e4nv or src.dtype.scalar not in (tl.float32, tl.float16):
            return convert(self, src, dst_type, rounding_mode)
        rounded = torch.from_numpy(src.data.astype("float32")).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), dst_type.scalar)

    builder.create_fp_to_fp = create_fp_to_fp


def _scaled_products() -> None:
    """Give the interpreter tl.dot_scaled of E2M1 operands with E8M0 scales, which it learnt after triton 3.7."""
    import numpy as np
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

    def decoded(codes: Any, scales: Any) -> Any:
        """[rows, K / 2] bytes, the even element in the low nibble, and [rows, K / 32] powers of two -> fp32 [rows, K]."""
        values = np.stack([numbers[codes & 15], numbers[codes >> 4]], axis=-1).reshape(len(codes), -1)
        return values * np.repeat(np.exp2(scales.astype(np.float32) - 127), 32, axis=1)

    def dot_scaled(_self: Any, lhs: Any, lhs_scale: Any, lhs_format: Any, rhs: Any, rhs_scale: Any, rhs_format: Any,
                   acc: Any, _fast: Any, lhs_k_pack: Any, rhs_k_pack: Any, out_dtype: Any) -> Any:  # fmt: skip
        formats = {getattr(one, "value", one) for one in (lhs_format, rhs_format)}
        assert formats == {"e2m1"} and lhs_k_pack and rhs_k_pack
        left = decoded(lhs.handle.data, lhs_scale.handle.data)
        right = decoded(rhs.handle.data.T, rhs_scale.handle.data)
        product = left @ right.T
        total = product if acc is None else product + acc.handle.data
        shape = tl.block_type(out_dtype, list(total.shape))
        return tl.tensor(interpreter.TensorHandle(total.astype(np.float32), out_dtype.scalar), shape)

    semantic: Any = TritonSemantic
    semantic.dot_scaled = dot_scaled


def _exports(source: Path) -> None:
    """What AITER's own __init__.py would export and xDiT uses."""
    aiter: Any = sys.modules["aiter"]
    aiter.dtypes = importlib.import_module("aiter.utility.dtypes")
    for name in ("flash_attn_func", "flash_attn_varlen_func"):  # the FP8 one is ASM: without it Sage is next in the table
        setattr(aiter, name, _signature_of(source / "aiter/ops/mha.py", name))
    quantise = importlib.import_module("aiter.ops.quant").per_1x32_f4_quant
    shuffle_scale = importlib.import_module("aiter.ops.shuffle").shuffle_scale

    def get_hip_quant(kind: str) -> Callable[..., Any]:
        assert kind == "per_1x32"
        return quantise

    aiter.QuantType = types.SimpleNamespace(per_1x32="per_1x32")
    aiter.get_hip_quant = get_hip_quant
    aiter.gemm_a4w4 = _gemm(shuffle_scale)


def _signature_of(file: Path, name: str) -> Callable[..., Any]:
    """A function with the parameters that the source gives `name`, which cannot be called."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            node.returns, node.decorator_list = None, []
            node.body = ast.parse("raise AssertionError('an ASM or CK kernel, which cannot run here')").body
            scope: dict[str, Any] = {}
            exec(compile(ast.Module([node], []), str(file), "exec"), scope)
            function: Callable[..., Any] = scope[name]
            return function
    raise AssertionError(f"{file} has no function {name}")


def _gemm(shuffle_scale: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    multiply = importlib.import_module("aiter.ops.triton.gemm.basic.gemm_afp4wfp4").gemm_afp4wfp4

    def inverse(shuffle: Callable[[Any], Any], shuffled: Any) -> Any:
        """Undo a shuffle of bytes by shuffling the places, a byte of them at a time."""
        numbers = torch.arange(shuffled.numel()).view(shuffled.shape)
        places = sum(shuffle(((numbers >> bits) & 255).to(torch.uint8)).long() << bits for bits in (0, 8, 16)).view(-1)
        back = torch.empty_like(shuffled).view(-1)
        back[places] = shuffled.reshape(-1)
        return back.view(shuffled.shape)

    def weight_shuffle(codes: Any) -> Any:
        return importlib.import_module("aiter.ops.shuffle").shuffle_weight(codes, layout=(16, 16))

    def gemm_a4w4(a: Any, b: Any, a_scale: Any, b_scale: Any, *, bpreshuffle: bool = True, bias: Any = None) -> Any:
        assert bpreshuffle and bias is None
        weight = inverse(weight_shuffle, b.view(torch.uint8))
        blocks = weight.shape[1] // 16
        scales = [
            inverse(shuffle_scale, scale.view(torch.uint8))[:rows, :blocks].contiguous()
            for scale, rows in ((a_scale, len(a)), (b_scale, len(weight)))
        ]
        return multiply(a.view(torch.uint8), weight, *scales, dtype=torch.bfloat16)

    return gemm_a4w4
