"""Published and own runs as rows: one JSON file of measurements -> what each row ran, and what the model predicts for it.

A row has `hardware`, `gpus` (of one video), `attention`, `gemm`, `mesh`, `steps`, `size` and `seconds`, in the words of whoever
published it ("fa3_bf16", "cfg2ul4", "720p81"). Optional keys are `only` ("denoise"), `cfg` (false: no guidance), `compile`,
`decode_ranks`, `decode_float32`, `own_decoder`, `served`, `framework` (a name under "frameworks", whose habits the row then has),
`submitter`, `fit` (the constants are fitted to it) and `exception` (why it does not fit). MLPerf rows name their entry in
published/.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan_mlperf.errors import BadInput, choose
from wan_mlperf.parallel.mesh import Shape
from wan_mlperf.predict import hardware, measurements, rates
from wan_mlperf.predict.measurements import FILE
from wan_mlperf.predict.prices import Prices, Seconds, Ways
from wan_mlperf.predict.rates import Constants
from wan_mlperf.predict.work import WAN22, ExpertSize
from wan_mlperf.published import published
from wan_mlperf.recipe import replace_workload
from wan_mlperf.workload import MLPERF, Workload

# What publications call a kernel -> its name in rates.json.
KERNELS = {
    "fa2_bf16": "FLASH",
    "fa3_bf16": "FLASH_3",
    "fa3_fp8": "FLASH_3_FP8",
    "fa4_bf16": "FLASH_4",
    "dense_bf16": "FLASH_4",
    "dense_bf16?": "SDPA",
    "te_fp8": "NVTE_FP8",
    "sage2": "SAGE",
    "sage3": "SAGE_3",
    "trtllm_sage_int8": "TRTLLM_SAGE",
    "aiter_bf16": "AITER",
    "aiter_mxfp4": "AITER_ASM_MXFP4",
    "aiter_fp8": "AITER_FP8_V3",
    "sage_fp4_triton": "AITER_SAGE_V2",
    "sage_fp8_triton": "AITER_SAGE",
    "bf16": "AITER",
}
GEMMS = {"bf16": "bf16", "fp8": "fp8", "mxfp4": "mxfp4", "nvfp4": "mxfp4"}
MESH_PART = re.compile(r"(cfg|ulysses|ul|sp|ring)\s*([0-9]{1,4})(?![0-9])")
MESH_WORDS = {"ul": "ulysses", "sp": "ulysses"}
SIZES = {"720p": (720, 1280), "480p": (480, 832)}
# HunyuanVideo's 20 double and 40 single blocks: 24 T C^2 of linear layers each, no cross-attention.
HUNYUAN = ExpertSize(layers=60, heads=24, head_dim=128, ffn=9216, text_tokens=0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. `attention`: kernel -> share of the forwards; the constants fit the `fitted` rows; `exception`: why it is off."""

    id: str
    submitter: str
    prices: Prices
    attention: dict[str, float]
    gemm: str
    steps: int
    guided: bool
    denoise_only: bool
    seconds: float
    is_mlperf: bool
    fitted: bool
    exception: str
    source: str

    def predict(self, values: Constants) -> Seconds:
        """Seconds by part that the model predicts with these constants."""
        prices = replace(self.prices, constants=values)
        total = Seconds() if self.denoise_only else prices.text_encode() + prices.decode() + prices.host()
        branches = 2 / self.prices.shape.cfg if self.guided else 1
        for kernel, share in self.attention.items():
            total += prices.forward(attention=kernel, gemm=self.gemm) * (share * self.steps * branches)
        return total

    def total(self, values: Constants) -> float:
        """Predicted seconds of what was measured."""
        return self.predict(values).total


@dataclass(frozen=True, kw_only=True)
class Decode:
    """One VAE decode that was measured alone."""

    id: str
    submitter: str
    prices: Prices
    seconds: float
    fitted: bool
    exception: str
    source: str
    is_mlperf: bool = False

    def total(self, values: Constants) -> float:
        """Predicted seconds."""
        return replace(self.prices, constants=values).decode().total


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A row that cannot be priced, and why."""

    id: str
    reason: str


def read(file: Path = FILE) -> tuple[list[Row | Decode], list[Skipped]]:
    """Return the rows of a measurements file, and those that cannot be priced. Raises BadInput for another file."""
    what = f"measurements {str(file)!r}"
    values = measurements.load(file, what)
    shipped = {} if file == FILE else measurements.load(FILE, f"measurements {str(FILE)!r}")["frameworks"]
    frameworks = {**shipped, **values["frameworks"]}
    rows: list[Row | Decode] = []
    skipped: list[Skipped] = []
    for number, entry in enumerate(values["end_to_end"]):
        name = measurements.name_of(entry, number)
        measurements.check(entry, f"{what}: {name}", measurements.NEEDED)
        try:
            rows.append(row_of(entry, frameworks))
        except BadInput as error:
            skipped.append(Skipped(id=name, reason=str(entry.get("exception") or error)))
    for number, entry in enumerate(values["decode"]):
        name = measurements.name_of(entry, number)
        measurements.check(entry, f"{what}: decode {name}", measurements.DECODE_NEEDED)
        try:
            rows.append(_decode_of(entry))
        except BadInput as error:
            skipped.append(Skipped(id=name, reason=str(entry.get("exception") or error)))
    return rows, skipped


def _decode_of(entry: Mapping[str, Any]) -> Decode:
    shape = Shape(replicas=1, cfg=1, ulysses=entry["ranks"], ring=1)
    ways = Ways(decode_float32=entry.get("decode_float32", False), own_decoder=entry.get("own_decoder", False))
    workload, _ = size_of(entry.get("size", "720p81"))
    return Decode(
        id=entry["id"],
        submitter=entry["submitter"],
        prices=Prices(gpu=hardware.find(entry["hardware"]), shape=shape, workload=workload, ways=ways, kernels={}),
        seconds=float(entry["seconds"]),
        fitted=entry.get("fit", False),
        exception=entry.get("exception", ""),
        source=entry["source"],
    )


def row_of(entry: Mapping[str, Any], frameworks: Mapping[str, Mapping[str, Any]]) -> Row:
    """Return one row. Raises BadInput for hardware, a kernel or a mesh that is not named or has no rate."""
    entry = {**frameworks.get(entry.get("framework", ""), {}), **entry}
    gpu = hardware.find(entry["hardware"])
    gpus, attention = entry["gpus"], attention_of(entry["attention"])
    workload, size = size_of(entry["size"])
    shape, attn2d, qkv_bytes = mesh_of(entry["mesh"], gpus, size.heads)
    gemm = re.sub(r"\s*\(.*\)", "", entry["gemm"])
    if gemm not in GEMMS:
        raise BadInput(f"gemm {entry['gemm']!r}: is not one format; allowed: {', '.join(GEMMS)}")
    for kernel in attention:
        rates.attention(kernel, gpu)
    rates.gemm(GEMMS[gemm], gpu)
    ways = Ways(
        compiled=bool(entry.get("compile", True)),
        qkv_bytes=qkv_bytes,
        decode_float32=bool(entry.get("decode_float32", False)),
        decode_ranks=entry.get("decode_ranks"),
        attn2d=attn2d,
        served=bool(entry.get("served", False)),
        own_decoder=bool(entry.get("own_decoder", False)),
    )
    seconds = float(entry["seconds"]) if "seconds" in entry else _published(entry["published"], gpus)
    return Row(
        id=str(entry["id"]),
        submitter=str(entry.get("submitter", entry.get("framework", entry.get("source", "")))),
        prices=Prices(gpu=gpu, shape=shape, workload=workload, size=size, ways=ways, kernels={}),
        attention=attention,
        gemm=GEMMS[gemm],
        steps=int(entry["steps"]),
        guided=bool(entry.get("cfg", size is not HUNYUAN)),
        denoise_only=entry.get("only") == "denoise",
        seconds=seconds,
        is_mlperf="published" in entry or "mlcommons" in str(entry.get("source", "")).lower(),
        fitted=bool(entry.get("fit", False)),
        exception=str(entry.get("exception", "")),
        source=str(entry.get("source", "MLCommons Inference")),
    )


def attention_of(text: str | Mapping[str, float]) -> dict[str, float]:
    """Kernel -> share of the forwards. "a x32 calls, b x8 calls" and "a+b" (half each) are understood. Raises BadInput."""
    shares: defaultdict[str, float] = defaultdict(float)  # two words may mean the same kernel
    if isinstance(text, Mapping):
        whole = sum(text.values())
        for name, share in text.items():
            shares[KERNELS.get(name, name)] += share / whole
        return dict(shares)
    plain = re.sub(r"\s*\(.*?\)", "", text)
    found = [(name, int(number)) for name, number in re.findall(r"([\w?]+) x([0-9]{1,6}) calls", plain)]
    if not all(number for _, number in found) or (found and len(found) < plain.count(",") + 1):
        raise BadInput(f"attention {text!r}: is not understood; allowed: such as a, a+b, 'a x32 calls, b x8 calls'")
    found = found or [(one.strip(), 1) for one in plain.split("+")]
    total = sum(number for _, number in found)
    for name, number in found:
        shares[KERNELS.get(name, name.upper())] += number / total
    known = rates.attention_kernels()
    for name in shares:
        if name not in known:
            raise BadInput(f"attention {plain!r}: is not a kernel with a rate; known: {', '.join([*KERNELS, *known])}")
    return dict(shares)


def mesh_of(text: str, gpus: int, heads: int) -> tuple[Shape, tuple[int, int], float]:
    """(shape of one video, rows and columns of 2-D attention, bytes per number of Q, K and V). Raises BadInput."""
    grid = re.search(r"attn2d\s*([0-9]{1,4})x([0-9]{1,4})\b", text)
    attn2d = (int(grid[1]), int(grid[2])) if grid else (1, 1)
    rest = text.replace(grid[0], " ") if grid else text
    pairs = MESH_PART.findall(rest)
    found = {MESH_WORDS.get(name, name): int(size) for name, size in pairs}
    alone = not pairs and not grid
    # Beside known parts, other words are notes, but not the degree of another kind, such as tp2. FSDP takes no other time.
    others = [word for word in MESH_PART.sub(" ", rest).split() if re.fullmatch(r"(?!fsdp)[a-z]+[0-9]+", word)]
    if len(found) < len(pairs) or others or (alone and text.strip() not in ("1", "dp", "?")):
        raise BadInput(f"mesh {text!r}: is not known; allowed: such as 1, dp, ulysses8, cfg2ul4, cfg2ring4, each part once")
    ulysses = gpus if text.strip() == "?" else found.get("ulysses", 1)  # the usual mesh where nothing else is said
    shape = Shape(replicas=1, cfg=found.get("cfg", 1), ulysses=ulysses, ring=found.get("ring", 1))
    if shape.cfg not in (1, 2):
        raise BadInput(f"mesh {text!r}: CFG {shape.cfg} is not allowed; allowed: 1 or 2, for the branches of guidance")
    if shape.per_replica * attn2d[0] * attn2d[1] != gpus:
        raise BadInput(f"mesh {text!r}: needs {shape.per_replica * attn2d[0] * attn2d[1]} GPUs; the row has {gpus}")
    if heads % ulysses:
        degrees = ", ".join(str(one) for one in range(1, heads + 1) if heads % one == 0)
        raise BadInput(f"mesh {text!r}: {heads} heads are not divisible by the Ulysses degree {ulysses}; allowed: {degrees}")
    return shape, attn2d, 1.0 if "fp8comm" in text else 2.0


def size_of(text: str) -> tuple[Workload, ExpertSize]:
    """("720p81", "1104x832x81", "hunyuan720p129") -> workload and model. Raises BadInput."""
    plain = text.removeprefix("hunyuan")
    if found := re.fullmatch(r"(\d+p)(\d+)", plain):
        if found[1] not in SIZES:
            raise BadInput(f"size {text!r}: allowed: {', '.join(SIZES)}, or WIDTHxHEIGHTxFRAMES")
        (height, width), frames = SIZES[found[1]], int(found[2])
    elif found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", plain):
        width, height, frames = int(found[1]), int(found[2]), int(found[3])
    else:
        raise BadInput(f"size {text!r}: is not known; allowed: such as 720p81, 1104x832x81")
    whole = (frames - 1) // 4 * 4 + 1  # the VAE makes 4 n + 1 frames: 80 frames have the latents of 77
    workload = replace_workload(MLPERF, height=height, width=width, frames=whole)
    return workload, HUNYUAN if text.startswith("hunyuan") else WAN22


def _published(reference: Mapping[str, Any], gpus: int) -> float:
    """Seconds of one video on `gpus` GPUs, from MLCommons' figures: the mean, or where there is none the 90th percentile."""
    names = ("round", "division", "submitter", "accelerator", "accelerators")
    scenario = choose("published: scenario", str(reference.get("scenario", "singlestream"))[:80], ("singlestream", "offline"))
    for entry in published():
        if all(getattr(entry, name) == reference.get(name) for name in names):
            if scenario == "singlestream":
                return entry.mean_s or entry.p90_s or entry.score_s
            if entry.samples_per_second is not None:
                return entry.accelerators / gpus / entry.samples_per_second
    named = ", ".join(str(reference.get(name))[:80] for name in names)
    raise BadInput(f"published: no {scenario} result of {named!r}; allowed: those of wan_mlperf/published/")
