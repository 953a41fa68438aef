"""The arithmetic of docs/scale.md: what a volume of 2000³ voxels takes on eight GPUs. Nothing is computed but numbers.

    python docs/examples/scale.py

The rates are published ones or from data sheets, none of them measured with this project: put in your own.
"""

import math
from pathlib import Path

import numpy as np

from napari_recon.jobs.job import FDKParameters, Parameters, ReconstructionJob, TVParameters, UnrolledParameters
from napari_recon.jobs.memory import plan_memory
from napari_recon.scans import Geometry, Grid, Scan
from napari_recon.scans.recording import ArrayFrames, Recording
from napari_recon.scans.slabs import Slab, held_margin, slabs_of

N, VIEWS, ROWS, COLUMNS, GPUS = 2000, 2000, 2000, 2500, 8
HALF_CONE = 10.0  # degrees

FORWARD, ADJOINT, BACK_PROJECTION = 85e9, 46e9, 150e9  # voxels x views a second of one GPU
NETWORK = 30e12  # floating-point operations a second of one GPU
DISK, PCIE, NVLINK = 2e9, 50e9, 300e9  # bytes a second

PAIRS = 40 + 3 * 3 + 8  # of A and its transpose: the shipped weights' start, their data steps, the ramp filter's norm
NETWORK_FLOPS, STAGES, OVERLAP = 95_520, 3, 8  # a voxel, of the light network at width 16; half overlap in 3D

GRID = Grid((N, N, N), 1.0)
VOLUME, PROJECTIONS, UPDATES = N**3 * 4, ROWS * COLUMNS * VIEWS * 4, N**3 * VIEWS


def cone(half_angle: float) -> Geometry:
    """Pixels of a voxel's width where the axis is seen, rows up to the ends of the axis."""
    distance = ROWS / 2 / math.tan(math.radians(half_angle))
    return Geometry.cone(np.arange(VIEWS) * 360 / VIEWS, (ROWS, COLUMNS), 2.0, distance, 2 * distance)


def slabs_on(geometry: Geometry, thickness: int) -> list[Slab]:
    """The slabs as jobs make them: the core and a margin, the rest held at its FDK."""
    return slabs_of(geometry, GRID, thickness, beyond=held_margin(geometry, GRID))


def shares(slab: Slab) -> tuple[float, float]:
    """Of all rays, and of all voxels, those that a slab takes."""
    return (slab.rows.stop - slab.rows.start) / ROWS, (slab.extended.stop - slab.extended.start) / N


def scan_of(geometry: Geometry) -> Scan:
    """A scan of which only the shape counts."""
    frames = ArrayFrames(Path("scan.h5"), np.broadcast_to(np.float32(0), (VIEWS, ROWS, COLUMNS)))
    return Scan(Path("scan.h5"), Recording("in memory", "", frames, geometry, values="line integrals"))


def planned(scan: Scan, slab: Slab, parameters: Parameters) -> float:
    """GB of a GPU that a slab takes, by the plan that is made before a job: what the host alone holds left out."""
    job = ReconstructionJob(
        scan=scan.path,
        parameters=parameters,
        shape=GRID.shape,
        voxel_size=GRID.voxel_size,
        device="cpu",
        slices=(slab.core.start, slab.core.stop),
    )
    items = plan_memory(job, scan, held=True).items
    return sum(n for name, n in items.items() if name not in ("shown volumes", "slices", "reading")) / 1e9


def main() -> None:
    print(f"volume {VOLUME / 1e9:.0f} GB, projections {PROJECTIONS / 1e9:.0f} GB, {UPDATES / 1e9:.0f} giga-updates")

    print(f"\n{GPUS} slabs of {N // GPUS} slices, half cone angle {HALF_CONE:g} degrees")
    geometry = cone(HALF_CONE)
    slabs, scan = slabs_on(geometry, N // GPUS), scan_of(geometry)
    for slab in slabs[: GPUS // 2]:  # the others are their mirror images
        rays, voxels = shares(slab)
        each = (FDKParameters(), TVParameters(patch=None), UnrolledParameters())
        plans = ", ".join(f"{parameters.method} {planned(scan, slab, parameters):.0f} GB" for parameters in each)
        print(
            f"  slices {slab.core.start}-{slab.core.stop}: {rays * ROWS:.0f} rows, {rays * PROJECTIONS / 1e9:.1f} GB; "
            f"reconstructed {voxels * N:.0f} slices, {voxels * VOLUME / 1e9:.1f} GB; {plans}"
        )

    print("\nrays and voxels of all slabs over those of the volume; of the fullest slab; TV of the fullest on a GPU")
    for angle in (0.5, 2.0, 5.0, 8.0, 10.0, 16.0, 20.0):
        geometry = cone(angle)
        parts, scan = slabs_on(geometry, N // GPUS), scan_of(geometry)
        found = np.array([shares(slab) for slab in parts])
        (rays, voxels), (most_rays, most_voxels) = found.sum(axis=0), found.max(axis=0)
        tv = max(planned(scan, slab, TVParameters(patch=None)) for slab in parts)
        print(f"  {angle:4g} degrees: {rays:.2f}, {voxels:.2f}; {most_rays:.3f}, {most_voxels:.3f}; {tv:.0f} GB")

    forward, adjoint, fdk = UPDATES / FORWARD, UPDATES / ADJOINT, UPDATES / BACK_PROJECTION
    network = N**3 * NETWORK_FLOPS * STAGES * OVERLAP / NETWORK
    found = np.array([shares(slab) for slab in slabs])
    # Seconds of each slab; a ray costs what it meets of the slab.
    pairs = np.array([forward * min(rays, voxels) + adjoint * voxels for rays, voxels in found])
    print(f"\none GPU: FDK's back projection {fdk:.0f} s; A {forward:.0f} s, its transpose {adjoint:.0f} s")
    print(f"  a pair: whole {forward + adjoint:.0f} s, slabs one after the other {pairs.sum():.0f} s")
    print(f"{GPUS} GPUs: FDK {fdk / GPUS:.0f} s")
    print(f"  a pair: by views {(forward + adjoint) / GPUS:.0f} s, by slabs {pairs.max():.0f} s")
    print(f"  the sum of the volumes of all {2 * (GPUS - 1) / GPUS * VOLUME / NVLINK:.2f} s")
    print(f"  the fullest slab's rays to the GPU {found[:, 0].max() * PROJECTIONS / PCIE:.2f} s")
    print(f"learned, {PAIRS} pairs: one GPU {(PAIRS * pairs.sum() + network * found[:, 1].sum()) / 3600:.0f} h")
    most = network * float(found[:, 1].max())
    print(f"  {GPUS} GPUs by slabs {(PAIRS * pairs.max() + most) / 3600:.1f} h, of which the networks {most:.0f} s")
    thin = slabs_on(cone(HALF_CONE), N // GPUS // 2)
    shared = [shares(slab) for slab in thin]
    hours = [(PAIRS * (forward * min(r, v) + adjoint * v) + network * v) / 3600 for r, v in shared]
    tv = max(planned(scan_of(cone(HALF_CONE)), slab, TVParameters(patch=None)) for slab in thin)
    print(
        f"{len(thin)} slabs: rays {sum(r for r, _ in shared):.1f}, voxels {sum(v for _, v in shared):.1f} of the whole,"
    )
    print(f"  {min(hours):.1f} to {max(hours):.1f} h each (of {GPUS}:", end=" ")
    hours = [(PAIRS * pair + network * v) / 3600 for pair, (_, v) in zip(pairs, found, strict=True)]
    print(f"{min(hours):.1f} to {max(hours):.1f} h), TV of the fullest {tv:.0f} GB")
    print(f"disk: reading {PROJECTIONS / DISK:.0f} s, writing with the pyramid {8 / 7 * VOLUME / DISK:.0f} s")


if __name__ == "__main__":
    main()
