"""Scans of synthetic objects, written as a scanner would have written them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from napari_recon.learning.phantoms import Phantom, make_phantom
from napari_recon.scans.errors import ScanError
from napari_recon.scans.formats import walnut
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

SOURCE_OBJECT, SOURCE_DETECTOR = 66.0, 199.0
"""mm, of the Walnut data set's scanner."""

RADIUS, EXTENT = 16.0, 34.0
"""mm: how far the objects reach from the centre, and the edge of the volume that holds them."""

_DARK = 120.0
_FLAT_FRAMES = 20  # a scanner averages its flats; one flat would print its own noise as rings
_FULL_WELL = 60_000


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
    pitch = grid.voxel_size * SOURCE_DETECTOR / SOURCE_OBJECT
    points = phantom.surface_points()
    radius = np.hypot(points[:, 0], points[:, 1])
    reach = max(radius.max(), EXTENT / 2)
    across = SOURCE_DETECTOR * reach / np.sqrt(SOURCE_OBJECT**2 - reach**2)  # where the tangent ray lands
    along = (SOURCE_DETECTOR * np.abs(points[:, 2]) / (SOURCE_OBJECT - radius)).max()
    rows, columns = (2 * int(np.ceil(half / pitch * 1.05 + 1)) for half in (along, across))
    angles = np.arange(views) * 360 / views
    return Geometry.cone(angles, (rows, columns), pitch, SOURCE_OBJECT, SOURCE_DETECTOR), grid


def simulate(
    kind: str,
    folder: str | Path,
    size: int = 64,
    views: int = 90,
    seed: int = 0,
    photons: float | None = 30_000,
) -> Path:
    """Simulate a cone-beam scan and write it in the Walnut layout, with the true volume beside it.

    Line integrals are exact (none go through a voxel grid); photons are Poisson distributed behind a beam profile that
    only the flat correction removes; the detector adds an offset and read-out noise and counts in uint16.

    Parameters
    ----------
    kind
        ``"walnut"``, ``"shepp-logan"``, ``"ellipsoids"`` or ``"blobs"``.
    folder
        Where the scan goes: ``scan_*.tif``, ``di000000.tif``, ``io00000*.tif``, ``scan_geom_corrected.geom`` and
        ``truth.tif`` ((size, size, size), float32, 1/mm, with its voxel size). It must not exist, or be empty.
    size
        Voxels along an edge of the true volume.
    views
        Views on the full circle.
    seed
        Of the object and of the noise.
    photons
        Photons in a pixel at the middle of the flat; None leaves the noise out.

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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ScanError(f"{folder} exists and is not an empty folder: choose another one.")
    phantom = make_phantom(kind, seed, RADIUS)
    geometry, grid = circular_cone(phantom, size, views)

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise ScanError(f"{folder} cannot be made ({error.strerror}): choose another folder.") from None
    try:
        _write(partial, phantom, geometry, grid, np.random.default_rng(seed), photons)
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
    return folder


def _write(
    folder: Path, phantom: Phantom, geometry: Geometry, grid: Grid, rng: np.random.Generator, photons: float | None
) -> None:
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
            image = caught * counts_per_photon + _DARK + rng.normal(0, 2 / np.sqrt(frames), expected.shape)
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
        integrals = phantom.project(geometry.select([view]))[0].astype(np.float64)
        save(f"scan_{number:06d}.tif", read_out(flat * np.exp(-integrals)))
    save("di000000.tif", read_out(np.zeros_like(flat), _FLAT_FRAMES))
    for k in range(2):
        save(f"io{k:06d}.tif", read_out(flat, _FLAT_FRAMES))
    tifffile.imwrite(
        folder / "truth.tif",
        phantom.volume(grid),
        imagej=True,
        compression="zlib",
        resolution=(1 / grid.voxel_size, 1 / grid.voxel_size),
        metadata={"axes": "ZYX", "spacing": grid.voxel_size, "unit": "mm"},
    )
