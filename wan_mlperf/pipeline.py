"""The path of a query, top to bottom: prompt -> embeddings -> high-noise expert -> low-noise expert -> VAE -> uint8 frames.

Below it, how a pipeline is loaded from a Setup.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from wan_mlperf.checkpoint import Checkpoint
from wan_mlperf.denoise import Prompt, Start, denoise, warm_lengths
from wan_mlperf.errors import BadInput
from wan_mlperf.experts import Expert
from wan_mlperf.kernels import attention, device, gemm, packed
from wan_mlperf.kernels import vae as kernels_vae
from wan_mlperf.parallel import mesh as meshes
from wan_mlperf.parallel import split_experts, split_vae, xdit
from wan_mlperf.parallel.mesh import Mesh
from wan_mlperf.preflight import Setup, prepare, read_fixed_latent, resolve_kernels
from wan_mlperf.recipe import Recipe, replace_workload
from wan_mlperf.spans import Spans
from wan_mlperf.step_plan import Step, any_unguided, layers_of, make_plan, make_scheduler
from wan_mlperf.text_encoder import TextEncoder, check_prompt
from wan_mlperf.vae_decode import VaeDecoder, compile_decoder, to_host
from wan_mlperf.workload import Workload

PARTS = 5  # loaded one after another: groups, two experts, decoder, text encoder
OnStep = Callable[[Step, torch.Tensor], None]
OnPart = Callable[[], object]


@dataclass(frozen=True)
class Query:
    """A prompt with its own seed, negative prompt and file of initial noise. None: what the recipe and its workload say."""

    prompt: str
    seed: int | None = None
    negative_prompt: str | None = None
    latent: str | None = None


@dataclass
class Pipeline:
    """This rank's share of one replica. Every rank calls `load`, and then the same methods in the same order."""

    recipe: Recipe
    workload: Workload
    checkpoint: Checkpoint
    mesh: Mesh
    plan: tuple[Step, ...]
    text_encoder: TextEncoder
    experts: dict[str, Expert]
    decoder: VaeDecoder
    spans: Spans
    kernels: dict[str, attention.Kernel]
    gemms: gemm.Backends
    load_summary: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, setup: Setup | Recipe, *, timeout_s: float = 600.0, on_part: OnPart = lambda: None) -> Pipeline:
        """Start the groups and load the weights of this rank. A collective that waits longer than `timeout_s` fails.

        With a recipe instead of a Setup everything is checked first. `on_part` is called after each of `PARTS` parts. Raises
        BadInput before weights are read.
        """
        with device.alone():
            if not isinstance(setup, Setup | Recipe):
                raise BadInput(
                    f"Pipeline.load: {setup!r} is a {type(setup).__name__}; allowed: a recipe, as load_recipe gives it"
                )
            return load(setup if isinstance(setup, Setup) else prepare(setup), timeout_s, on_part)

    def generate(self, prompt: str, *, seed: int | None = None, negative_prompt: str | None = None) -> np.ndarray | None:
        """Return the video of `prompt`: uint8 [frames, height, width, 3] on the replica's first rank, None elsewhere.

        Raises BadInput for what the command line refuses, too: an empty prompt, one that would be cut, a seed out of range.
        """
        workload, done = self.workload, 0
        frames: np.ndarray | None = None
        for chunk in self.stream(prompt, seed=seed, negative_prompt=negative_prompt):
            if frames is None:
                frames = np.empty((workload.frames, workload.height, workload.width, 3), np.uint8)
            frames[done : done + len(chunk)] = chunk
            done += len(chunk)
        return frames

    def stream(self, prompt: str, *, seed: int | None = None, negative_prompt: str | None = None) -> Iterator[np.ndarray]:
        """Yield the frames of `generate` as they are decoded, uint8 [n, height, width, 3] in host memory.

        Only the replica's first rank gets chunks, but every rank must exhaust the iterator.
        """
        return (batch[0] for batch in self.stream_batch([Query(prompt, seed, negative_prompt)]))

    def stream_batch(self, prompts: Sequence[str | Query], *, on_step: OnStep | None = None) -> Iterator[np.ndarray]:
        """Like `stream`, for several prompts at once: chunks [prompts, n, height, width, 3].

        An exception that `on_step` raises at the same step on every rank ends the query. The next one is not affected.
        """
        return device.each_alone(self._frames(self._checked(prompts), on_step))

    def _checked(self, prompts: Sequence[str | Query]) -> list[Query]:
        """Return the queries. Raises BadInput for what the command line refuses, on every rank alike."""
        if isinstance(prompts, str) or not prompts:
            raise BadInput(f"prompts: {prompts!r} is not allowed; allowed: a list of at least one")
        queries = [one if isinstance(one, Query) else Query(one) for one in prompts]
        for one in queries:
            check_prompt(self.text_encoder.tokenizer, one.prompt)
            if one.negative_prompt is not None:
                check_prompt(self.text_encoder.tokenizer, one.negative_prompt, what="negative prompt", may_be_empty=True)
            if one.seed is not None:
                replace_workload(self.workload, seed=one.seed)
        return queries

    def _frames(self, queries: Sequence[Query], on_step: OnStep | None) -> Iterator[np.ndarray]:
        yield from self.decode(self._latents(queries, on_step))

    def latents(
        self, prompts: Sequence[str | Query], *, on_step: OnStep | None = None, start: Start | None = None
    ) -> torch.Tensor:
        """Return the clean latents [prompts, channels, F, h, w] in fp32, on every rank.

        Denoising begins with the initial noise, or at a `start` within the plan, whose scheduler the remaining steps then use.
        """
        with device.alone():
            return self._latents(self._checked(prompts), on_step, start)

    def start(self, prompts: Sequence[str | Query]) -> Start:
        """Return the start of the plan: the noise of the prompts, and a scheduler that no step has used yet."""
        noise = torch.cat([self.noise(one.seed, one.latent) for one in self._checked(prompts)])
        scheduler = make_scheduler(self.checkpoint.config("scheduler"), self.workload.steps)
        return Start(0, noise.to(self.mesh.device.torch), scheduler)

    @torch.inference_mode()
    def _latents(self, queries: Sequence[Query], on_step: OnStep | None, start: Start | None = None) -> torch.Tensor:
        with self.spans("text_encode"):
            text = self._encode(queries)
        first, latents, scheduler = start or self.start(queries)
        plan = self.plan[first:]
        return denoise(latents, text, plan, self.experts, scheduler, self.mesh, spans=self.spans, on_step=on_step)

    def _encode(self, queries: Sequence[Query]) -> Prompt:
        default = self.workload.negative_prompt
        positive = [one.prompt for one in queries]
        negative = [default if one.negative_prompt is None else one.negative_prompt for one in queries]
        branches = [self.text_encoder.encode(one) for one in self.mesh.own_branches((positive, negative))]
        if self.mesh.branch == 1 and any_unguided(self.plan):  # else this rank's first branch is the positive one
            return Prompt(branches, self.text_encoder.encode(positive))
        return Prompt(branches, branches[0])

    def noise(self, seed: int | None = None, latent: str | None = None) -> torch.Tensor:
        """Return the initial noise [1, channels, F, h, w]: from the file `latent`, from `seed`, or what the recipe says.

        The recipe's is its fixed latent, or else drawn from the workload's seed. Noise from a seed is drawn on the CPU.
        """
        shape = self.workload.latent_shape(self.checkpoint.config("transformer")["in_channels"])
        fixed = self.recipe.model.fixed_latent if latent is None and seed is None else latent
        if fixed is not None:
            return read_fixed_latent(fixed, shape)
        generator = torch.Generator("cpu").manual_seed(self.workload.seed if seed is None else seed)
        return torch.randn((1, *shape), generator=generator, dtype=torch.float32, device="cpu")

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> Iterator[np.ndarray]:
        """Clean latents [prompts, channels, F, h, w] -> chunks of frames as in `stream_batch`."""
        yield from to_host(self._timed(self.decoder.decode(latents)), self.mesh.device.torch, self.spans)

    def _timed(self, frames: Iterator[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
        while True:
            with self.spans("vae_decode"):
                chunk = next(frames, "end")
            if isinstance(chunk, str):
                return
            yield chunk

    def with_workload(self, workload: Workload) -> Pipeline:
        """Return this pipeline for another workload that `preflight.change` has checked, with the same weights and groups."""
        return replace(self, workload=workload, plan=make_plan(self.recipe, workload, self.checkpoint.config("scheduler")))

    def warm_up(self, queries: int, *, batch: int = 1) -> float | None:
        """Run whole queries before the timing, so that every kernel, both experts, the decoder and all text lengths have run.

        With a `batch` above 1, as many queries with that many samples follow, because they have another shape. Returns the
        seconds per sample of the last query, or None without one. Every rank calls it.
        """
        seconds = None
        for size in dict.fromkeys((1, batch)):
            if queries:
                self._warm_lengths(size)
            for _ in range(queries):
                start = time.perf_counter()
                for _ in self.stream_batch(["warm-up"] * size):
                    pass
                seconds = (time.perf_counter() - start) / size
        self.spans.take()
        return seconds

    @torch.inference_mode()
    def _warm_lengths(self, batch: int) -> None:
        """Run `denoise.warm_lengths` for a batch. Every rank calls it: attention exchanges tokens."""
        with device.alone():
            embeds = self.text_encoder.encode(["warm-up"] * batch)
            latents = torch.cat([self.noise(0)] * batch).to(self.mesh.device.torch, embeds.hidden.dtype)
            warm_lengths(self.plan, self.experts, latents, embeds.hidden, 2 // self.mesh.shape.cfg)


def load(setup: Setup, timeout_s: float, on_part: OnPart) -> Pipeline:
    """Start the groups and load every part: see `Pipeline.load`."""
    here, recipe, found = device.probe(), setup.recipe, setup.checkpoint
    mesh = meshes.start(setup.shape, here, timeout_s=timeout_s, unguided=any_unguided(setup.plan))
    on_part()
    kernels, gemms = resolve_kernels(setup, here)
    bitwise = recipe.is_bitwise(setup.shape.per_replica)
    experts, summary = _load_experts(setup, mesh, kernels, gemms, bitwise=bitwise, on_part=on_part)
    decoder = _load_decoder(setup, mesh, bitwise=bitwise)
    on_part()
    text_model = found.load_text_encoder(recipe.model.dtype, device=here.torch)
    dtype = experts["high_noise"].transformer.dtype  # the dtype in which diffusers' pipeline passes the embeddings on
    text_encoder = TextEncoder(found.load_tokenizer(), text_model if recipe.exact else gemm.widen(text_model), dtype)
    on_part()
    return Pipeline(
        recipe=recipe,
        workload=setup.workload,
        checkpoint=found,
        mesh=mesh,
        plan=setup.plan,
        text_encoder=text_encoder,
        experts=experts,
        decoder=decoder,
        spans=Spans(here.torch),
        kernels=kernels,
        gemms=gemms,
        load_summary=summary,
    )


def _load_experts(
    setup: Setup,
    mesh: Mesh,
    kernels: dict[str, attention.Kernel],
    gemms: gemm.Backends,
    *,
    bitwise: bool,
    on_part: OnPart,
) -> tuple[dict[str, Expert], list[str]]:
    """Load both experts, one after the other, and convert their linear layers. Also returns a line about each."""
    recipe, found, here = setup.recipe, setup.checkpoint, mesh.device
    split, unguided_split = split_experts.split(mesh), split_experts.unguided_split(mesh)
    self_attend, cross_attend = split_experts.attends(kernels, exchange=recipe.exchange, rehearsed_ranks=setup.rehearsed_ranks)
    together = split_experts.together(kernels, recipe, setup.shape, here, rehearsed_ranks=setup.rehearsed_ranks)
    experts: dict[str, Expert] = {}
    summary: list[str] = []
    for name, part in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
        conversion = gemm.Conversion(
            getattr(recipe.gemm, name), recipe.gemm, gemms, here, xdit.mxfp4_linear, layers_of(setup.plan, name)
        )
        transformer = found.load_transformer(part, recipe.model.dtype, convert=conversion, device=here.torch)
        summary.append(f"{name}: {conversion.summary()}")
        experts[name] = Expert(
            transformer if recipe.exact else gemm.widen(transformer),
            split=split,
            unguided_split=unguided_split,
            self_attend=self_attend,
            cross_attend=cross_attend,
            together=together,
            trim_text=recipe.trim_text and not bitwise,
            merge_padding=kernels["cross"].lse,
            round_text=here.is_gpu or recipe.attention.cross == "native",
        )
        if recipe.compile.experts:
            experts[name].compile()
        elif not recipe.exact:
            packed.pack(transformer.blocks)
        on_part()
    if together is not None:
        summary.append(f"branches of guidance: {together.summary}")
    return experts, summary


def _load_decoder(setup: Setup, mesh: Mesh, *, bitwise: bool) -> VaeDecoder:
    """Load the VAE and shard its decoder over the ranks of the replica."""
    recipe, found, here = setup.recipe, setup.checkpoint, mesh.device
    if not bitwise:
        kernels_vae.set_up(here.torch, tf32=recipe.vae.tf32)
    vae = found.load_vae(recipe.model.vae_dtype).to(here.torch)
    _, _, rows, columns = setup.workload.latent_shape(0)
    gather = split_vae.shard_decoder(vae, mesh, latent_height=rows, latent_width=columns)
    decoder = VaeDecoder(vae, chunk=1 if bitwise else recipe.vae.chunk, gather=gather, bitwise=bitwise)
    if recipe.compile.decoder:
        compile_decoder(decoder)
    return decoder
