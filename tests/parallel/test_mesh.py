"""Fits the recipe's mesh to the ranks."""

from __future__ import annotations

import pytest
import torch

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels.device import Device
from wan_mlperf.parallel import split_vae
from wan_mlperf.parallel.mesh import Shape, plan_shape
from wan_mlperf.recipe import MeshRecipe


@pytest.mark.parametrize(
    ("mesh", "world", "expected"),
    [
        (MeshRecipe(), 1, (1, 1, 1, 1)),
        (MeshRecipe(), 2, (1, 2, 1, 1)),
        (MeshRecipe(), 4, (1, 2, 2, 1)),
        (MeshRecipe(), 8, (1, 2, 4, 1)),
        (MeshRecipe(cfg=1), 8, (1, 1, 8, 1)),
        (MeshRecipe(cfg=1, ring=2), 4, (1, 1, 2, 2)),
        (MeshRecipe(ring=2), 8, (1, 2, 2, 2)),
        (MeshRecipe(replicas="auto", cfg=1, ulysses=1), 8, (8, 1, 1, 1)),
        (MeshRecipe(replicas="auto", cfg=2, ulysses=2), 8, (2, 2, 2, 1)),
        (MeshRecipe(replicas=2), 4, (2, 2, 1, 1)),
    ],
)
def test_shapes(mesh: MeshRecipe, world: int, expected: tuple[int, ...]) -> None:
    shape = plan_shape(mesh, world=world, heads=8, latent_rows=8)
    assert (shape.replicas, shape.cfg, shape.ulysses, shape.ring) == expected
    assert shape == Shape(replicas=expected[0], cfg=expected[1], ulysses=expected[2], ring=expected[3])


@pytest.mark.parametrize(
    ("mesh", "world", "links", "switch"),
    [
        (MeshRecipe(), 8, (1, 8), (2, 4)),
        (MeshRecipe(), 4, (1, 4), (2, 2)),
        (MeshRecipe(), 16, (2, 8), (2, 8)),  # 40 heads are not divisible by 16
        (MeshRecipe(cfg=2), 8, (2, 4), (2, 4)),
        (MeshRecipe(ulysses=4), 8, (2, 4), (2, 4)),
        (MeshRecipe(ring=2), 8, (1, 4), (2, 2)),
    ],
)
def test_the_fabric_decides_what_is_left_to_choose(
    mesh: MeshRecipe, world: int, links: tuple[int, int], switch: tuple[int, int]
) -> None:
    for fabric, expected in (("links", links), ("switch", switch)):
        shape = plan_shape(mesh, world=world, heads=40, latent_rows=160, fabric=fabric)  # type: ignore[arg-type]
        assert (shape.cfg, shape.ulysses) == expected


def test_the_fabric_of_a_device() -> None:
    fabrics = {arch: Device(arch=arch, name="", torch=torch.device("cpu")).fabric for arch in ("gfx950", "gfx942", "sm90", "cpu")}
    assert fabrics == {"gfx950": "links", "gfx942": "links", "sm90": "switch", "cpu": "switch"}


@pytest.mark.parametrize(
    ("mesh", "world", "rows", "message"),
    [
        (MeshRecipe(), 3, 8, "8 heads are not divisible by the Ulysses degree 3"),
        (MeshRecipe(), 6, 8, "8 heads are not divisible by the Ulysses degree 3"),
        (MeshRecipe(cfg=2), 1, 8, "world size 1: the mesh .* needs 2 ranks|needs .* ranks"),
        (MeshRecipe(ulysses=4), 2, 8, "world size 2"),
        (MeshRecipe(replicas=3), 4, 8, "not divisible by mesh.replicas 3"),
        (MeshRecipe(replicas="auto", cfg=1, ulysses=2), 3, 8, "world size 3"),
        (MeshRecipe(), 8, 4, "8 ranks per replica cannot share the VAE's 4 latent rows"),
    ],
)
def test_what_does_not_fit_is_refused(mesh: MeshRecipe, world: int, rows: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        plan_shape(mesh, world=world, heads=8, latent_rows=rows)


@pytest.mark.parametrize(
    ("height", "width", "ranks", "side"),
    [
        (8, 8, 2, (split_vae.HEIGHT, 8)),
        (24, 40, 2, (split_vae.HEIGHT, 24)),
        (90, 160, 8, (split_vae.WIDTH, 160)),  # 720p on eight ranks
        (160, 90, 8, (split_vae.HEIGHT, 160)),
        (2, 5, 4, (split_vae.WIDTH, 5)),  # fewer rows than ranks
    ],
)
def test_decode_is_split_along_the_side_with_the_evenest_bands(
    height: int, width: int, ranks: int, side: tuple[int, int]
) -> None:
    assert split_vae.most_even_side(height, width, ranks) == side
