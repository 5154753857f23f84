"""Loads an expert module by module: each is read, cast to its dtype, converted to the recipe's format, its 16-bit copy freed.

So a process holds the packed weights and a few layers, not the 28.6 GB of an expert in bf16. The files are read, not mapped:
mapped pages would count as this process's memory, and a page fault reads less at a time than a read does.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from wan_mlperf.errors import BadInput
from wan_mlperf.model_folder.parts import MOST_THREADS, PIECE, find_weights, where

Convert = Callable[[str, nn.Module], nn.Module]  # (full name, module) -> what replaces it
Item = TypeVar("Item")
Result = TypeVar("Result")

CPU = torch.device("cpu")
LINE = 64  # bytes of a cache line
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def unchanged(_name: str, module: nn.Module) -> nn.Module:
    """Return the module as it is."""
    return module


class _Stored(NamedTuple):
    """Where a tensor is: file (by number), first byte, and what it is."""

    file: int
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightFiles:
    """Open safetensors files of one part, verified before. Safe to read from several threads. `title` names it in messages."""

    def __init__(self, files: Sequence[Path], title: str) -> None:
        self._title = title
        self._names = [file.name for file in files]
        self._open = [file.open("rb", buffering=0) for file in files]
        self.stored: dict[str, _Stored] = {}
        for number, file in enumerate(self._open):
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, one in header.items():
                start = 8 + length + one["data_offsets"][0]
                self.stored[name] = _Stored(number, start, _TORCH[one["dtype"]], tuple(one["shape"]))

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open:
            file.close()

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in `dtype`. Only a piece of it is held in the dtype that it is stored in.

        Raises BadInput for NaN and infinity, of which low-precision formats would make ordinary numbers.
        """
        stored = self.stored[name]
        if dtype == stored.dtype:
            tensor = _placed(stored.start, stored.shape, dtype)
            self._fill(tensor.view(-1), stored, stored.start)
            for piece in tensor.view(-1).split(PIECE):
                refuse_not_finite(piece, f"{self._title}: {name}")
            return tensor
        tensor = torch.empty(stored.shape, dtype=dtype)
        flat = tensor.view(-1)
        buffer = torch.empty(min(PIECE, len(flat)), dtype=stored.dtype)
        for first in range(0, len(flat), PIECE):
            piece = buffer[: len(flat) - first]
            self._fill(piece, stored, stored.start + first * stored.dtype.itemsize)
            refuse_not_finite(piece, f"{self._title}: {name}")
            flat[first : first + len(piece)] = piece
        return tensor

    def _fill(self, flat: torch.Tensor, stored: _Stored, start: int) -> None:
        wanted = flat.view(torch.uint8).numpy().data
        done = 0
        while done < len(wanted):  # one call reads 2 GiB at most
            count = os.preadv(self._open[stored.file].fileno(), [wanted[done:]], start + done)
            if not count:
                raise OSError(f"{self._names[stored.file]} became shorter while it was read")
            done += count


def refuse_not_finite(values: torch.Tensor, what: str) -> None:
    """Raise BadInput if a weight, or a piece of one, holds NaN or infinity."""
    values = values.detach()
    # The sum of all is quicker than a look at each. One that is too large for fp16 does not mean that a value is.
    if not math.isfinite(values.sum()) and not torch.isfinite(values).all():
        raise BadInput(f"{what} holds NaN or infinity; allowed: finite weights")


def _placed(start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor aligned to cache lines as in a mapped file, where diffusers leaves weights that need no cast.

    MKL sums in another order for another alignment, and `exact` must be diffusers' result bit for bit.
    """
    items, line = math.prod(shape), LINE // dtype.itemsize
    room = torch.empty(items + line, dtype=dtype)
    skipped, odd = divmod((start - room.data_ptr()) % LINE, dtype.itemsize)
    return room[0 if odd else skipped :][:items].view(shape)


def load_expert(
    folder: Path,
    part: str,
    dtype: torch.dtype | None,
    *,
    convert: Convert = unchanged,
    device: torch.device = CPU,
    threads: int = 1,
) -> WanTransformer3DModel:
    """Return one expert on `device`, each module as `convert` makes it.

    Values and dtypes are those of diffusers' from_pretrained: norms and modulation stay in fp32, and without a `dtype`
    everything does. `threads` threads read and cast; for a CPU they convert, too. A GPU converts its layers one at a time.
    """
    model = _empty(folder, part, dtype)
    on_gpu = device.type != "cpu"
    fp32 = set(model._keep_in_fp32_modules or [])

    def fill(name: str) -> tuple[str, nn.Module]:
        module = model.get_submodule(name)
        for leaf, _ in list(module.named_parameters(recurse=False)):
            full = f"{name}.{leaf}" if name else leaf
            wanted = torch.float32 if dtype is None or fp32 & set(full.split(".")) else dtype
            setattr(module, leaf, nn.Parameter(weights.read(full, wanted), requires_grad=False))
        return name, module if on_gpu else convert(name, module)

    with WeightFiles(find_weights(folder, part).files, where(folder, part)) as weights, _freed_at_once():
        for name, module in _map(fill, _in_file_order(model, weights), threads):
            if on_gpu:
                for leaf, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, leaf, nn.Parameter(parameter.to(device), requires_grad=False))
                module = convert(name, module)
            if module is not model:
                model.set_submodule(name, module)
    return (model.to(device) if on_gpu else model).eval()  # moves the rest: the buffers of the rotary tables


def _empty(folder: Path, part: str, dtype: torch.dtype | None) -> WanTransformer3DModel:
    """The expert with weights on the meta device and real rotary tables."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder, subfolder=part))
        model.rope = type(model.rope)(model.rope.attention_head_dim, model.rope.patch_size, model.rope.max_seq_len)
        return model
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _freed_at_once() -> Iterator[None]:
    """Give memory back as soon as it is freed. Between layers that stay, glibc would keep what was freed: 0.9 GB and more.

    Allocations of 1 MB and more get separate mappings. Afterwards the limit is 32 MB, to which glibc itself raises it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, 32 << 20)
            mallopt(_TRIM_THRESHOLD, 64 << 20)


def _in_file_order(model: nn.Module, weights: WeightFiles) -> list[str]:
    """Names of the modules that hold weights, in the order of the files. A list of the modules would keep them alive."""
    found = []
    for name, module in model.named_modules():
        leaves = [leaf for leaf, _ in module.named_parameters(recurse=False)]
        if leaves:
            found.append((min(weights.stored[f"{name}.{leaf}" if name else leaf][:2] for leaf in leaves), name))
    return [name for _, name in sorted(found)]


def _map(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Iterator[Result]:
    """Like map, on `threads` threads, MOST_THREADS at most. At most `threads` results wait while the caller uses one."""
    if threads == 1:
        yield from map(function, items)
        return
    threads, before = min(threads, MOST_THREADS), torch.get_num_threads()
    torch.set_num_threads(1)  # in the threads of the pool, too: each computes alone
    with ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[Future[Result]] = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()
            torch.set_num_threads(before)
