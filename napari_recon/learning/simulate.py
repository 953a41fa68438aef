"""Scans of synthetic objects, written as a scanner would have written them.

Phantoms are integrated in closed form. Anatomies are sampled on a grid of twice the resolution and projected by
marching along four rays a pixel, whose intensities are averaged: neither the grid, nor the interpolation, nor the
detector is the one that a reconstruction works with, so nothing here commits the "inverse crime".
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numba as nb
import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from napari_recon.learning import anatomy, phantoms
from napari_recon.learning.phantoms import Phantom, make_phantom
from napari_recon.scans.errors import ScanError
from napari_recon.scans.formats import walnut
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

SOURCE_OBJECT, SOURCE_DETECTOR = 66.0, 199.0
"""mm, of the Walnut data set's scanner."""

RADIUS, EXTENT = 16.0, 34.0
"""mm: how far the objects reach from the centre, and the edge of the volume that holds them."""

KINDS = (*phantoms.KINDS, *anatomy.KINDS)
"""What can be scanned: phantoms (for judging) and anatomies (for training and trying)."""

SPECTRUM = {40.0: 0.25, 60.0: 0.45, 80.0: 0.30}
"""keV -> share of the photons, of a polychromatic beam."""

_DARK = 120.0
_FLAT_FRAMES = 20  # a scanner averages its flats; one flat would print its own noise as rings
_FULL_WELL = 60_000
_LARGEST_ANATOMY = 512  # its fine grid then takes 4 GB, three times that with a polychromatic beam


def circular_cone(phantom: Phantom, size: int, views: int) -> tuple[Geometry, Grid]:
    """A full circle whose detector covers the object and the volume's inscribed cylinder, with air at both sides.

    Parameters
    ----------
    phantom
        What has to fit, with room for air.
    size
        Voxels along an edge of the volume; the detector resolves a voxel at the axis.
    views
        Evenly spaced, the first at 0 degrees.
    """
    grid = Grid((size, size, size), EXTENT / size)
    return _covering(phantom.surface_points(), grid, views), grid


def _covering(points: NDArray[np.float64], grid: Grid, views: int) -> Geometry:
    """The Walnut scanner, as much larger as the grid is than its volume, with a detector that covers the points."""
    scale = grid.extent[2] / EXTENT
    source_object, source_detector = SOURCE_OBJECT * scale, SOURCE_DETECTOR * scale
    pitch = grid.voxel_size * source_detector / source_object
    radius = np.hypot(points[:, 0], points[:, 1])
    reach = max(radius.max(), grid.extent[2] / 2)
    across = source_detector * reach / np.sqrt(source_object**2 - reach**2)  # where the tangent ray lands
    along = (source_detector * np.abs(points[:, 2]) / (source_object - radius)).max()
    rows, columns = (2 * int(np.ceil(half / pitch * 1.05 + 1)) for half in (along, across))
    angles = np.arange(views) * 360 / views
    return Geometry.cone(angles, (rows, columns), pitch, source_object, source_detector)


@dataclass(frozen=True, eq=False)
class _Subject:
    """What lies in the scanner: the share of the photons that passes it in every pixel, and what is true of it."""

    transmission: Callable[[Geometry], NDArray[np.float64]]
    geometry: Geometry
    grid: Grid
    truth: NDArray[np.float32]
    labels: NDArray[np.uint8] | None = None
    names: dict[int, str] | None = None


def _phantom(kind: str, seed: int, size: int, views: int) -> _Subject:
    phantom = make_phantom(kind, seed, RADIUS)
    geometry, grid = circular_cone(phantom, size, views)

    def transmission(view: Geometry) -> NDArray[np.float64]:
        return np.exp(-phantom.project(view)[0].astype(np.float64))

    return _Subject(transmission, geometry, grid, phantom.volume(grid))


def _anatomy(kind: str, seed: int, size: int, views: int, polychromatic: bool, metal: bool) -> _Subject:
    grid = anatomy.anatomy_grid(kind, size)
    fine = anatomy.anatomy_grid(kind, 2 * size)
    coarse = anatomy.make_anatomy(kind, seed, grid=grid, metal=metal)
    at_60 = anatomy.make_anatomy(kind, seed, grid=fine, metal=metal).volume
    truth = at_60.reshape(size, 2, size, 2, size, 2).mean(axis=(1, 3, 5), dtype=np.float64).astype(np.float32)
    beam = SPECTRUM if polychromatic else {60.0: 1.0}
    volumes = [
        at_60 if energy == 60 else anatomy.make_anatomy(kind, seed, grid=fine, energy_kev=energy, metal=metal).volume
        for energy in beam
    ]

    # The detector covers whatever is denser than air (an eighth of water), slice by slice up to its largest radius.
    z, y, x = (t + np.arange(n) * grid.voxel_size for t, n in zip(grid.translate, grid.shape, strict=True))
    away = np.hypot(y[:, None], x)
    reach = np.array([away[part > 0.0025].max(initial=0.0) for part in truth])
    geometry = _covering(np.stack([reach, np.zeros_like(reach), np.where(reach > 0, z, 0)], 1), grid, views)

    def transmission(view: Geometry) -> NDArray[np.float64]:
        passed = np.zeros(view.detector_shape)
        for share, volume in zip(beam.values(), volumes, strict=True):
            out = np.empty(view.detector_shape)
            _march(out, volume, np.array(fine.translate), fine.voxel_size, view.vectors[0])
            passed += share * out
        return passed

    return _Subject(transmission, geometry, grid, truth, coarse.labels, coarse.names)


def jittered(geometry: Geometry, rng: np.random.Generator, mm: float, degrees: float) -> Geometry:
    """A geometry as a loose scanner would realise it, view by view.

    Parameters
    ----------
    geometry
        Where source and detector should be.
    rng
        Of the displacements.
    mm
        Standard deviation of every coordinate of the source and of the detector's centre.
    degrees
        Standard deviation of the view's angle, and of the detector's turn in its plane.
    """
    vectors = geometry.vectors.copy()
    vectors[:, :6] += rng.normal(scale=mm, size=(len(vectors), 6)) if mm else 0
    for row, (about, roll) in zip(vectors, np.deg2rad(rng.normal(size=(len(vectors), 2)) * degrees), strict=True):
        u, v = row[6:9].copy(), row[9:12].copy()
        ratio = np.linalg.norm(u) / np.linalg.norm(v)
        row[6:9] = math.cos(roll) * u + math.sin(roll) * v * ratio
        row[9:12] = math.cos(roll) * v - math.sin(roll) * u / ratio
        c, s = math.cos(about), math.sin(about)
        row[:] = (row.reshape(4, 3) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])).ravel()
    return Geometry(vectors, geometry.detector_shape, geometry.kind)


def scattered(transmission: NDArray[np.float64], fraction: float) -> NDArray[np.float64]:
    """What scatter adds to a view: smooth, brightest behind thick parts, ``fraction`` of the light behind the object.

    A pixel scatters as much as it takes from the beam and lets through again, -t log t (B. Ohnesorge, T. Flohr and
    K. Klingenbeck-Regn, Efficient object scatter correction algorithm, Eur. Radiol. 9, 1999), over a sixth of the
    detector.

    Parameters
    ----------
    transmission
        (rows, columns), share of the photons that passed.
    fraction
        Scattered over primary photons, summed over the object's shadow.
    """
    shadow = transmission < 0.95
    if not fraction or not shadow.any():
        return np.zeros_like(transmission)
    t = np.clip(transmission, 1e-9, 1)
    haze = gaussian_filter(-t * np.log(t), transmission.shape[1] / 6)
    return haze * (fraction * transmission[shadow].sum() / haze[shadow].sum())


def simulate(
    kind: str,
    folder: str | Path,
    size: int = 64,
    views: int = 90,
    seed: int = 0,
    photons: float | None = 30_000,
    *,
    read_noise: float = 2.0,
    jitter_mm: float = 0.0,
    jitter_degrees: float = 0.0,
    scatter: float = 0.0,
    polychromatic: bool = False,
    metal: bool = False,
) -> Path:
    """Simulate a cone-beam scan and write it in the Walnut layout, with the true volume beside it.

    Photons are Poisson distributed behind a beam profile that only the flat correction removes; the detector adds an
    offset and read-out noise and counts in uint16. The scanner is the Walnut data set's, as much larger as the object.

    Parameters
    ----------
    kind
        A phantom: ``"walnut"``, ``"shepp-logan"``, ``"ellipsoids"``, ``"blobs"``; or an anatomy: ``"head"``,
        ``"thorax"``, ``"limb"``, ``"vessels"``, ``"shell"``, ``"foam"``.
    folder
        Where the scan goes: ``scan_*.tif``, ``di000000.tif``, ``io00000*.tif``, ``scan_geom_corrected.geom`` and
        ``truth.tif`` ((size, size, size), float32, 1/mm, with its voxel size); of an anatomy also ``labels.tif``
        (uint8, the labels' names in its Info). It must not exist, or be empty.
    size
        Voxels along an edge of the true volume.
    views
        Views on the full circle.
    seed
        Of the object and of the noise.
    photons
        Photons in a pixel at the middle of the flat; None leaves the noise out.
    read_noise
        Standard deviation of the detector's own noise, in counts.
    jitter_mm, jitter_degrees
        How loose the scanner is (see :func:`jittered`). The written geometry is the intended one.
    scatter
        Scattered over primary photons behind the object (see :func:`scattered`).
    polychromatic
        The beam holds :data:`SPECTRUM` rather than 60 keV, and hardens; only for anatomies. The truth is at 60 keV.
    metal
        Add titanium implants, to anatomies that have any.

    Returns
    -------
    The folder.

    Raises
    ------
    ScanError
        If the kind is unknown, a number is out of range, or the folder holds something. Nothing is left half-written.
    """
    folder = Path(folder).expanduser()
    if size < 8 or size > 2048:
        raise ScanError(f"A size of {size} voxels will not do; choose 8 to 2048.")
    if views < 2 or views > 100_000:
        raise ScanError(f"{views} views will not do; choose 2 to 100000.")
    if photons is not None and not 10 <= photons < float("inf"):
        raise ScanError(f"{photons} photons will not do; choose at least 10, or none for no noise.")
    amounts = {"read noise": read_noise, "jitter in mm": jitter_mm, "jitter in degrees": jitter_degrees}
    for what, amount in {**amounts, "scatter": scatter}.items():
        if not 0 <= amount < float("inf"):
            raise ScanError(f"A {what} of {amount} will not do; choose 0 or more.")
    if kind not in KINDS:
        raise ScanError(f"There is nothing called {kind!r} to scan; there are {', '.join(KINDS)}.")
    if kind in anatomy.KINDS and size > _LARGEST_ANATOMY:
        raise ScanError(
            f"An anatomy of {size} voxels an edge is projected from twice as many: choose at most {_LARGEST_ANATOMY}."
        )
    if kind not in anatomy.KINDS and (polychromatic or metal):
        raise ScanError(
            f"A {kind} phantom knows neither energies nor implants; scan one of {', '.join(anatomy.KINDS)} instead."
        )
    expect_new(folder)
    if kind in anatomy.KINDS:
        subject = _anatomy(kind, seed, size, views, polychromatic, metal)
    else:
        subject = _phantom(kind, seed, size, views)
    rng = np.random.default_rng(seed)
    real = subject.geometry
    if jitter_mm or jitter_degrees:
        real = jittered(real, np.random.default_rng([seed, 1]), jitter_mm, jitter_degrees)

    with new_folder(folder) as partial:
        _write(partial, subject, real, rng, photons, read_noise, scatter)
    return folder


def expect_new(folder: Path) -> None:
    """Raise a ScanError if something is in the way of a folder that is to be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ScanError(f"{folder} exists and is not an empty folder: choose another one.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all went well and is gone when anything went wrong.

    Raises
    ------
    ScanError
        If it cannot be made or written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise ScanError(f"{folder} cannot be made ({error.strerror}): choose another folder.") from None
    try:
        yield partial
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except OSError as error:
        raise ScanError(
            f"{folder} cannot be written ({error.strerror}): make room, or choose another folder."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    folder: Path,
    subject: _Subject,
    real: Geometry,
    rng: np.random.Generator,
    photons: float | None,
    read_noise: float,
    scatter: float,
) -> None:
    geometry, grid = subject.geometry, subject.grid
    rows, columns = geometry.detector_shape
    y, x = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    profile = 1 - 0.06 * (x**2 + y**2) + 0.03 * x  # heel effect and distance: brighter towards one side of the middle
    flat = (photons or _FULL_WELL) * profile
    counts_per_photon = min(1.0, _FULL_WELL / flat.max())

    def read_out(expected: NDArray[np.float64], frames: int = 1) -> NDArray[np.uint16]:
        """An image as the detector hands it over: the mean of some exposures."""
        if photons is None:
            image = expected * counts_per_photon + _DARK
        else:
            caught = rng.poisson(expected * frames) / frames
            image = caught * counts_per_photon + _DARK + rng.normal(0, read_noise / np.sqrt(frames), expected.shape)
        return np.clip(np.rint(image), 0, 65535).astype(np.uint16)

    def save(name: str, image: NDArray[np.uint16]) -> None:
        stored = np.ascontiguousarray(walnut.to_stored(image))
        tifffile.imwrite(folder / name, stored, compression="zlib", photometric="minisblack", metadata=None)

    # As the data set: one row more than views, the last of which repeats the first.
    vectors = np.vstack([geometry.vectors, geometry.vectors[:1]])
    walnut.write_geometry(folder / walnut.GEOMETRIES[0], vectors)
    numbers = walnut.stored_numbers(len(vectors))
    for row, number in enumerate(numbers):
        view = row % geometry.views
        passed = subject.transmission(real.select([view]))
        save(f"scan_{number:06d}.tif", read_out(flat * (passed + scattered(passed, scatter))))
    save("di000000.tif", read_out(np.zeros_like(flat), _FLAT_FRAMES))
    for k in range(2):
        save(f"io{k:06d}.tif", read_out(flat, _FLAT_FRAMES))

    def keep(name: str, volume: NDArray[np.float32] | NDArray[np.uint8], **metadata: str) -> None:
        tifffile.imwrite(
            folder / name,
            volume,
            imagej=True,
            compression="zlib",
            resolution=(1 / grid.voxel_size, 1 / grid.voxel_size),
            metadata={"axes": "ZYX", "spacing": grid.voxel_size, "unit": "mm", **metadata},
        )

    keep("truth.tif", subject.truth)
    if subject.labels is not None:
        keep("labels.tif", subject.labels, Info=json.dumps(subject.names))


@nb.njit(parallel=True, cache=True, nogil=True, fastmath=True, error_model="numpy")
def _march(out, volume, origin, voxel, vector):  # type: ignore[no-untyped-def]
    """The share that passes a volume in each pixel: mean over 2 x 2 rays, each in steps of a voxel, trilinear."""
    rows, columns = out.shape
    depth, height, width = volume.shape
    for row in nb.prange(rows):
        for column in range(columns):
            passed = 0.0
            for sub in range(4):
                a = column - (columns - 1) / 2 + (0.25 if sub & 1 else -0.25)
                b = row - (rows - 1) / 2 + (0.25 if sub & 2 else -0.25)
                sx, sy, sz = vector[0], vector[1], vector[2]
                dx = vector[3] + a * vector[6] + b * vector[9] - sx
                dy = vector[4] + a * vector[7] + b * vector[10] - sy
                dz = vector[5] + a * vector[8] + b * vector[11] - sz
                length = math.sqrt(dx * dx + dy * dy + dz * dz)
                # In voxels from voxel (0, 0, 0); a step along the ray is one voxel.
                px, py, pz = (sx - origin[2]) / voxel, (sy - origin[1]) / voxel, (sz - origin[0]) / voxel
                dx, dy, dz = dx / length, dy / length, dz / length
                t0, t1 = 0.0, length / voxel
                for p, d, n in ((px, dx, width), (py, dy, height), (pz, dz, depth)):
                    if abs(d) > 1e-12:
                        near, far = (-1.0 - p) / d, (n - p) / d
                        t0, t1 = max(t0, min(near, far)), min(t1, max(near, far))
                    elif not -1.0 < p < n:
                        t1 = -1.0
                total = 0.0
                steps = int(t1 - t0) + 1 if t1 > t0 else 0
                for n in range(steps):
                    t = t0 + (n + 0.5) * (t1 - t0) / steps
                    x, y, z = px + t * dx, py + t * dy, pz + t * dz
                    i, j, k = math.floor(x), math.floor(y), math.floor(z)
                    fx, fy, fz = x - i, y - j, z - k
                    if 0 <= i < width - 1 and 0 <= j < height - 1 and 0 <= k < depth - 1:
                        low = (volume[k, j, i] * (1 - fx) + volume[k, j, i + 1] * fx) * (1 - fy)
                        low += (volume[k, j + 1, i] * (1 - fx) + volume[k, j + 1, i + 1] * fx) * fy
                        high = (volume[k + 1, j, i] * (1 - fx) + volume[k + 1, j, i + 1] * fx) * (1 - fy)
                        high += (volume[k + 1, j + 1, i] * (1 - fx) + volume[k + 1, j + 1, i + 1] * fx) * fy
                        total += low * (1 - fz) + high * fz
                    else:  # beyond the outermost centres a volume ends where its voxels do
                        i, j, k = math.floor(x + 0.5), math.floor(y + 0.5), math.floor(z + 0.5)
                        if 0 <= i < width and 0 <= j < height and 0 <= k < depth:
                            total += volume[k, j, i]
                if steps:
                    passed += math.exp(-total * voxel * (t1 - t0) / steps)
                else:
                    passed += 1.0
            out[row, column] = passed / 4
