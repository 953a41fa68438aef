"""The GPU's kernels have the numbers of the CPU's, by Triton's interpreter; and they compile for GPUs.

Triton must be told to interpret before it is first imported, which deepinv does: what is called ``check_`` here is run
by a pytest of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_xray import circle, fan, helix, laminography, noise, parallel_oblique, relative, wobble
from torch import Tensor

from napari_recon.physics import projectors, xray
from napari_recon.physics.projectors import NumbaProjector, Projector, Rays, TorchProjector, projector_for
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction import fdk
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

pytest.importorskip("triton", reason="there is none for this system")
from napari_recon.physics.projectors import triton_gpu
from napari_recon.physics.projectors.triton_gpu import TritonProjector

CPU = torch.device("cpu")


def rays_of(make: Callable[[], Geometry]) -> Rays:
    """Three views through a small grid off the centre."""
    geometry = make().select([1, 6, 11])
    return Rays(geometry, Grid((1 if geometry.is_fan else 5, 8, 7), 0.7, (0.3, -0.2, 0.0)))


def helix_down() -> Geometry:
    """A helix whose rows count downwards."""
    return Geometry(helix().vectors * ([1] * 9 + [-1] * 3), helix().detector_shape)


def measured(rays: Rays) -> tuple[int, int, int]:
    rows, columns = rays.geometry.detector_shape
    return rows, rays.geometry.views, columns


def back_projected(projector: Projector, y: Tensor, rows: slice = slice(None)) -> Tensor:
    """FDK's back projection of y where only some rows were filtered."""
    part = y[rows]
    buffer, inside = projector.filtered_buffer(y.shape[1], len(part))
    inside.copy_(part)
    out = torch.ones(projector.rays.grid.shape)
    projector.backproject(buffer, 0, rows.start or 0, out)
    return out


# -- in the interpreter -----------------------------------------------------------------------------------------------


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a large block as for a small one."""
    for tuned in (triton_gpu._adjoint_tuned, triton_gpu._backproject_tuned):
        monkeypatch.setattr(tuned, "shapes", ({"BX": 16, "BY": 16, "BZ": 16},))


def any_vectors(seed: int, kind: str) -> Rays:
    """Views from anywhere, with detectors turned at will, and a grid that is no cube and not at the centre."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(3):
        (u, v, along), _ = np.linalg.qr(random.normal(size=(3, 3)))
        center = 1.5 * random.normal(size=3) + 30 * along
        source = center - random.uniform(60, 120) * along
        first = along + 0.1 * random.normal(size=3) if kind == "parallel" else source
        u, v = (random.uniform(0.5, 1.5) * q + 0.1 * random.normal(size=3) for q in (u, v))
        rows.append(np.concatenate([first, center, u, v]))
    shape = tuple(int(n) for n in random.integers(3, 10, 3))
    center = tuple(float(q) for q in random.normal(size=3))
    return Rays(Geometry(np.array(rows), (11, 8), kind), Grid(shape, 0.8, center))  # type: ignore[arg-type]


def agree(rays: Rays) -> None:
    """All that a projector does, against numba's; and that it is adjoint."""
    ours, numba = TritonProjector(rays, CPU), NumbaProjector(rays)
    x, y = noise(*rays.grid.shape), noise(*measured(rays), seed=1)
    projections, volume = ours.forward(x), ours.adjoint(y)
    assert relative(projections, numba.forward(x)) < 1e-5
    assert relative(volume, numba.adjoint(y)) < 1e-5
    assert relative(ours.normal(x), numba.normal(x)) < 1e-5
    difference = (projections.double() * y).sum() - (x * volume.double()).sum()
    assert abs(difference) < 1e-6 * torch.linalg.vector_norm(projections) * torch.linalg.vector_norm(y)
    assert relative(back_projected(ours, y), back_projected(numba, y)) < 1e-5


GEOMETRIES = [circle, helix_down, parallel_oblique, laminography, fan]


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("make", GEOMETRIES, ids=lambda make: make.__name__)
def check_the_numbers_are_numbas(make: Callable[[], Geometry]) -> None:
    agree(rays_of(make))


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize(("seed", "kind"), [(0, "cone"), (1, "parallel")])
def check_any_vectors(seed: int, kind: str) -> None:
    agree(any_vectors(seed, kind))


@pytest.mark.usefixtures("large_blocks")
def check_patches_off_centre() -> None:
    whole = rays_of(wobble)
    rays = Rays(whole.geometry, whole.grid.crop((slice(2, 5), slice(0, 3), slice(4, 7))))
    assert not (rays.window == (0, 14, 0, 18)).any()
    agree(rays)
    y = noise(*measured(rays))
    for rows in (slice(3, 11), slice(0, 5)):
        ours, numba = TritonProjector(rays, CPU), NumbaProjector(rays)
        assert relative(back_projected(ours, y, rows), back_projected(numba, y, rows)) < 1e-5


def check_small_blocks_and_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes of several blocks, views in several batches, batches in several launches, 64-bit offsets."""
    monkeypatch.setattr(triton_gpu._forward_tuned, "shapes", ({"BR": 8, "BC": 8},))
    for tuned in (triton_gpu._adjoint_tuned, triton_gpu._backproject_tuned):
        monkeypatch.setattr(tuned, "shapes", ({"BX": 8, "BY": 2, "BZ": 4},))
    monkeypatch.setattr(triton_gpu, "WIDEST", 1)
    monkeypatch.setattr(triton_gpu, "LAUNCH", {"forward": 2000, "adjoint": 100, "backproject": 100})
    rays = rays_of(wobble)
    agree(Rays(rays.geometry.select([0, 2]), rays.grid.crop((slice(0, 5), slice(2, 7), slice(0, 7)))))


@pytest.mark.usefixtures("large_blocks")
def check_views_in_batches_add_up() -> None:
    rays = rays_of(circle)
    y = noise(*measured(rays))
    out = torch.zeros(rays.grid.shape)
    for views in ([0, 1], [2]):
        part = TritonProjector(Rays(rays.geometry.select(views), rays.grid), CPU)
        assert part.adjoint(y[:, views], out=out) is out
    assert relative(out, NumbaProjector(rays).adjoint(y)) < 1e-5


@pytest.mark.usefixtures("large_blocks")
def check_projections_on_the_host_are_copied_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rays = rays_of(wobble)
    rays = Rays(rays.geometry, rays.grid.crop((slice(0, 4), slice(2, 7), slice(2, 7))))
    x, y = noise(*rays.grid.shape), noise(*measured(rays), seed=1)
    projector = TritonProjector(rays, CPU)
    here = projector.forward(x), projector.adjoint(y)
    monkeypatch.setattr(TritonProjector, "_is_here", lambda *_: False)
    monkeypatch.setattr(triton_gpu, "LAUNCH", {**triton_gpu.LAUNCH, "adjoint": 2 * rays.grid.voxels})
    assert relative(projector.forward(x, out=torch.full(measured(rays), 7.0)), here[0]) < 1e-6
    assert relative(projector.adjoint(y), here[1]) < 1e-6


@pytest.mark.usefixtures("large_blocks")
def check_physics_and_fdk_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalisation, gradients and FDK, on the projector that GPUs get."""
    rays = rays_of(circle)
    physics = XRayTransform(rays.geometry, rays.grid, device="cpu", normalize=3.0)
    x, y = noise(1, 1, *rays.grid.shape), noise(1, 1, *measured(rays), seed=1)

    def results() -> list[Tensor]:
        volume = x.clone().requires_grad_()
        loss = 0.5 * (physics.A(volume) - y).square().sum()
        (gradient,) = torch.autograd.grad(loss, volume)
        return [loss.detach(), gradient, physics.A_adjoint_A(x), fdk.FDK()(y, physics)]

    expected = results()
    for module in (xray, fdk):
        monkeypatch.setattr(module, "projector_for", TritonProjector)
    for ours, numbas in zip(results(), expected, strict=True):
        assert relative(ours, numbas) < 1e-5


def test_the_interpreter_has_numbas_numbers() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # napari's takes seconds
    command = [sys.executable, "-m", "pytest", __file__, "-o", "python_functions=check_*", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stdout + done.stderr


# -- compiled ---------------------------------------------------------------------------------------------------------

POINTERS = {"volume", "floats", "out", "sums", "projections", "images", "matrices"}


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        ("_forward", {"ALIGNED": False, "CUT": False, "WIDE": True, "BR": 16, "BC": 32, "size_a": 1}),
        ("_adjoint", {"ALIGNED": True, "AXIS": 0, "BX": 16, "BY": 2, "BZ": 16, "nz": 1}),
        ("_adjoint", {"ALIGNED": False, "AXIS": 2, "BX": 16, "BY": 2, "BZ": 16}),
        ("_backproject", {"ALIGNED": True, "BX": 16, "BY": 2, "BZ": 16, "rows": 1}),
    ],
)
def test_kernels_compile_for_a_gpu(kernel: str, constants: dict[str, Any]) -> None:
    """The compiler is stricter than the interpreter, and needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(triton_gpu, kernel)
    types = {name: "*fp32" if name in POINTERS else "i32" for name in function.arg_names}
    types |= {"integers": "*i32", "voxel_size": "fp32"}
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, **triton_gpu._OPTIONS})
    assert "ld.global" in made.asm["ptx"]


# -- which kernels ----------------------------------------------------------------------------------------------------


def test_gpus_get_triton_where_it_works_and_torch_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rays, gpu = rays_of(circle), torch.device("cuda:0")
    monkeypatch.setattr(projectors, "_triton_works", lambda _: True)
    assert isinstance(projector_for(rays, gpu), TritonProjector)
    assert isinstance(projector_for(rays, CPU), NumbaProjector)
    monkeypatch.setenv("NAPARI_RECON_PROJECTOR", "torch")
    assert isinstance(projector_for(rays, gpu), TorchProjector)


def test_a_missing_compiler_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(triton_gpu, "try_out", broken)
    projectors._triton_works.cache_clear()
    rays, gpu = rays_of(circle), torch.device("cuda:0")
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        assert isinstance(projector_for(rays, gpu), TorchProjector)
    assert isinstance(projector_for(rays, gpu), TorchProjector)  # a second warning would be an error
    projectors._triton_works.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    from benchmarks import gpu

    with pytest.raises(ScanError, match="no CUDA GPU"):
        gpu.run()


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [*GEOMETRIES, wobble], ids=lambda make: make.__name__)
def test_every_block_shape_gives_the_same_bits(make: Callable[[], Geometry]) -> None:
    """Tuning tries one shape after the other; what it chooses must not be seen in the result."""
    rays = rays_of(make)
    gpu = torch.device("cuda", 0)
    x, y = noise(*rays.grid.shape).to(gpu), noise(*measured(rays), seed=1).to(gpu)
    projector, numba = TritonProjector(rays, gpu), NumbaProjector(rays)
    runs = [(projector.forward(x), projector.adjoint(y), projector.normal(x)) for _ in range(8)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    expected = numba.forward(x.cpu()), numba.adjoint(y.cpu()), numba.normal(x.cpu())
    for ours, numbas in zip(runs[0], expected, strict=True):
        assert relative(ours.cpu(), numbas) < 1e-5
    assert relative(projector.adjoint(y.cpu()).cpu(), expected[1]) < 1e-5
