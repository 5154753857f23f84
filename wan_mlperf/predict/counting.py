"""Counts what running code does: calls, FLOPs by kernel and format, bytes read and written, messages per group, live memory.

A dispatch mode that sees every operation, on fake tensors (a rehearsal) and on real ones (tests) alike.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wan_mlperf.kernels.reference import Function
from wan_mlperf.parallel.exchange import Exchange, Received
from wan_mlperf.parallel.fake_ranks import Group, group_name

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
PACKED = torch.ops.mkldnn._linear_pointwise  # a CPU's linear layer (kernels/packed.py), which a rehearsal has in PyTorch's form
CONVOLUTIONS = (aten.convolution, aten._convolution, aten.mkldnn_convolution)
# The dtype of a product -> its name as a format.
FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
IGNORED = ""  # the stage for work that must not count


@dataclass
class Counts:
    """What one stage did: `calls` and `flops` by kernel, bytes `read` and `written`, bytes `sent` and `messages` by group.

    `peak` is the most live bytes, `shapes` an example for each kernel.
    """

    calls: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    read: float = 0.0
    written: float = 0.0
    sent: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    peak: float = 0.0
    shapes: dict[str, str] = field(default_factory=dict)

    def times(self, number: float) -> Counts:
        """Return the counts of this work done `number` times; the peak stays."""

        def scaled(counter: Counter[str]) -> Counter[str]:
            return Counter({name: value * number for name, value in counter.items()})

        return Counts(
            calls=scaled(self.calls),
            flops=scaled(self.flops),
            read=self.read * number,
            written=self.written * number,
            sent=scaled(self.sent),
            messages=scaled(self.messages),
            peak=self.peak,
            shapes=dict(self.shapes),
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            calls=self.calls + other.calls,
            flops=self.flops + other.flops,
            read=self.read + other.read,
            written=self.written + other.written,
            sent=self.sent + other.sent,
            messages=self.messages + other.messages,
            peak=max(self.peak, other.peak),
            shapes={**self.shapes, **other.shapes},
        )

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            calls=self.calls - other.calls,
            flops=self.flops - other.flops,
            read=self.read - other.read,
            written=self.written - other.written,
            sent=self.sent - other.sent,
            messages=self.messages - other.messages,
            shapes=self.shapes,
        )


class Counting(TorchDispatchMode):
    """Counts into `stages[stage]`; `with counting("decode"):` names the stage. `groups` names torch's process groups."""

    def __init__(self, groups: Mapping[str, Group]) -> None:
        super().__init__()
        self.stages: dict[str, Counts] = {}
        self._groups = groups
        self.stage = IGNORED
        self._alive: dict[int, int] = {}  # storage -> bytes
        self.live = 0
        self._inside = False  # a call that counts as one

    @contextmanager
    def active(self) -> Iterator[None]:
        """Count what the block does. A call of PyTorch's attention counts as one, whatever this machine makes of it."""
        with self, _Attention(self):
            yield

    def whole(
        self, call: Callable[[], torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Count an attention call [..., T, D] without looking into it."""
        self._inside = True
        try:
            out = call()
        finally:
            self._inside = False
        flops = 2.0 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        shapes = f"{tuple(query.shape)} x {key.shape[-2]}"
        self.record(f"attention SDPA {FORMATS[query.dtype]}", flops, (query, key, value), (out,), shapes)
        self._track(out)
        return out

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what the block does under this name."""
        before, self.stage = self.stage, stage
        try:
            yield
        finally:
            self.stage = before

    @property
    def here(self) -> Counts:
        """The counts of the current stage."""
        return self.stages.setdefault(self.stage, Counts(peak=self.live))

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        """Count tensors that exist already, such as weights, as live."""
        for tensor in tensors:
            self._track(tensor)

    def kernel(self, name: str, *, lse: bool = False) -> Function:
        """Return a stand-in for an attention kernel: it counts a call of `name` on [B, H, T, D] and returns an empty output.

        With `lse` it also returns an empty log-sum-exp [B, H, T] in fp32.
        """

        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
            batch, heads, queries, size = query.shape
            flops = 2.0 * batch * heads * queries * key.shape[2] * (size + value.shape[3])
            self.record(f"attention {name}", flops, (query, key, value), (query,), f"{tuple(query.shape)} x {key.shape[2]}")
            out = torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
            return (out, torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)) if lse else out

        return call

    def record(
        self, name: str, flops: float, read: Sequence[torch.Tensor], written: Sequence[torch.Tensor], shapes: str = ""
    ) -> None:
        """Count one call of a kernel."""
        counts = self.here
        counts.calls[name] += 1
        counts.flops[name] += flops  # type: ignore[assignment]
        counts.read += sum(one.nbytes for one in read)
        counts.written += sum(one.nbytes for one in written)
        counts.shapes.setdefault(name, shapes)

    def send(self, group: str, size: float, messages: int, call: str) -> None:
        """Count bytes that this rank sends to others of a group."""
        self.here.calls[call] += 1
        self.here.sent[group] += size  # type: ignore[assignment]
        self.here.messages[group] += messages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if self._inside:
            return func(*args, **(kwargs or {}))
        if packet is aten.mkldnn_convolution and isinstance(args[0], FakeTensor):  # which has no rule for fake tensors
            image, weight, bias, padding, stride, dilation, parts = args
            out = aten.convolution.default(image, weight, bias, stride, padding, dilation, False, [0] * len(stride), parts)
        else:
            out = func(*args, **(kwargs or {}))
        if func.namespace in ("_c10d_functional", "c10d"):
            self._communicate(packet._qualified_op_name.split("::")[1], args, kwargs or {})
        elif packet in (*PRODUCTS, *CONVOLUTIONS, PACKED):
            self._compute(packet, args, kwargs or {}, out)
        outputs = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        if func.namespace == "aten":
            inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            self._move(func, inputs, outputs)
        for one in outputs:
            self._track(one)
        return out

    def _compute(self, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        tensors = [one for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
        form = FORMATS.get(tensors[-1].dtype, str(tensors[-1].dtype))
        if packet in CONVOLUTIONS:
            image, weight = args[0], args[1]
            name, flops = f"convolution {form}", 2.0 * out.numel() * weight.numel() / weight.shape[0]
            shapes = f"{tuple(image.shape)} * {tuple(weight.shape)}"
        elif packet is PACKED:
            name, flops = f"gemm {form}", 2.0 * out.numel() * args[0].shape[-1]
            shapes = f"{tuple(args[0].shape)} x {tuple(args[1].shape)}"
        else:
            name, flops = f"gemm {form}", float(flop_registry[packet](*args, **kwargs, out_val=out))
            shapes = " x ".join(str(tuple(one.shape)) for one in tensors[-2:])
        counts = self.here
        counts.calls[name] += 1
        counts.flops[name] += flops
        counts.shapes.setdefault(name, shapes)

    def _communicate(self, name: str, args: Any, kwargs: Any) -> None:
        """Count bytes that leave this rank. Sends and receives between two ranks are counted at the exchange (`Counted`)."""
        group = self._groups.get(group_name(args, kwargs) or "")
        if group is None or name in ("wait_tensor", "send", "recv_", "barrier") or group.size == 1:
            return
        tensors = [one for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
        others, size, what = group.size - 1, group.size, group.what
        if name.startswith(("all_to_all", "alltoall_base")):
            self.send(what, tensors[0].nbytes * others / size, others, f"all_to_all {what}")
        elif name in ("_allgather_base_", "allgather_into_tensor_coalesced_", "all_gather_into_tensor"):
            self.send(what, min(one.nbytes for one in tensors) * others, others, f"all_gather {what}")
        elif name == "gather_":
            self.send(what, tensors[-1].nbytes if len(tensors) == 1 else 0, int(len(tensors) == 1), f"gather {what}")
        else:
            self.here.calls[f"{name} {what}"] += 1

    def _move(self, func: Any, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Count bytes read and written by an operation; views move none."""
        if func.is_view or func._overloadpacket in (aten.empty, aten.empty_like, aten.empty_strided, aten.detach, aten.alias):
            return
        sources = {_key(one) for one in inputs}
        fresh = [one for one in outputs if _key(one) not in sources]
        if not fresh and not func._schema.is_mutable:
            return  # a reshape that needed no copy
        written = fresh or outputs
        self.here.read += sum(_nbytes(one) for one in inputs)
        self.here.written += sum(_nbytes(one) for one in written)

    def _track(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a wrapper subclass has no storage of its own; its parts are tracked
            return
        key = storage._cdata
        if key in self._alive or not storage.nbytes():
            return
        self._alive[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._free, key)
        self.here.peak = max(self.here.peak, self.live)

    def _free(self, key: int) -> None:
        self.live -= self._alive.pop(key, 0)


class _Attention(TorchFunctionMode):
    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._counting.whole(lambda: func(*args, **(kwargs or {})), *args[:3])


class Counted:
    """An Exchange whose sends are counted: one message to each rank, with the tensor's bytes."""

    def __init__(self, exchange: Exchange, counting: Counting) -> None:
        self._exchange, self._counting = exchange, counting

    def start(self, tensors: Mapping[int, torch.Tensor]) -> Received:
        """See `Exchange.start`."""
        size = sum(one.nbytes for one in tensors.values())
        self._counting.send("replica", size, len(tensors), "exchange replica")
        return self._exchange.start(tensors)

    def close(self) -> None:
        """See `Exchange.close`."""
        self._exchange.close()


def _key(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # a wrapper subclass has no storage of its own
        return id(tensor)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
