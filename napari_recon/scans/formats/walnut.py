"""The Walnut-CBCT layout (Zenodo 2686726): also what :func:`napari_recon.learning.simulate` writes.

A folder ``tubeV1``, ``tubeV2`` or ``tubeV3`` (or any parent that holds only one of them) with ``scan_000000.tif`` ...,
darks ``di*.tif``, flats ``io*.tif``, and ``scan_geom_corrected.geom`` or ``scan_geom_original.geom``: a row of 12
numbers in mm for each image, as ASTRA's ``cone_vec``. As in the authors' own scripts, images stand in reverse
order, so that image k belongs to the last row less k; each is turned by ``transpose(flipud(image))``; and the last row
of a full circle, which repeats the first, is left out.

Der Sarkissian et al., "A cone-beam X-ray computed tomography data collection designed for machine learning", Scientific
Data 6, 215 (2019).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.formats.tiff_files import natural, open_tiff, tiff_frames
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid
from napari_recon.scans.recording import Recording

GEOMETRIES = ("scan_geom_corrected.geom", "scan_geom_original.geom")


def from_stored(image: NDArray[Any]) -> NDArray[Any]:
    """An image as the file has it, to (rows, columns)."""
    return np.transpose(np.flipud(image))


def to_stored(image: NDArray[Any]) -> NDArray[Any]:
    """(rows, columns) to an image as the file has it."""
    return np.flipud(np.transpose(image))


def stored_numbers(rows: int) -> NDArray[np.intp]:
    """Which image belongs to each row of a geometry of ``rows`` rows."""
    return np.arange(rows)[::-1]


def recognises(path: Path) -> bool:
    """Whether this is a folder with a geometry, or with such a folder one or two levels down."""
    return path.is_dir() and bool(_tubes(path))


def read(path: Path) -> Recording:
    """Read the geometry and find the images.

    Raises
    ------
    ScanError
        If images or flats are missing, or the geometry is wrong.
    """
    tubes = _tubes(path)
    if len(tubes) > 1:
        names = ", ".join(str(t.relative_to(path)) for t in tubes[:6])
        raise ScanError(f"{path} holds {len(tubes)} scans ({names}): open one of them.")
    folder = tubes[0]
    file = next(folder / name for name in GEOMETRIES if (folder / name).exists())
    vectors = _vectors(file)
    # The last row of a full circle repeats the first view, moved by less than half a step.
    probe = Geometry(vectors, (1, 1))
    angles = probe.angles
    step = abs(angles[-1] - angles[0]) / max(1, len(angles) - 1)
    repeats = len(vectors) > 2 and abs(abs(angles[-1] - angles[0]) - 360) < step / 2
    numbers = stored_numbers(len(vectors))[: len(vectors) - repeats]

    there = {p.name for p in folder.iterdir()}
    images = [f"scan_{k:06d}.tif" for k in numbers]
    missing = [name for name in images if name not in there]
    if missing:
        raise ScanError(
            f"{folder} lacks {len(missing)} of the {len(images)} images that {file.name} describes (the first is "
            f"{sorted(missing)[0]}): copy the scan again."
        )
    flats = sorted(folder.glob("io*.tif"), key=natural)
    darks = sorted(folder.glob("di*.tif"), key=natural)
    if not flats:
        raise ScanError(f"{folder} holds no flats (io000000.tif, ...), which raw counts need for -log: add them.")

    frames = tiff_frames([folder / name for name in images], from_stored)
    geometry = Geometry(vectors[: len(numbers)], frames.shape[1:], "cone")
    truth = _truth(folder)
    notes = {"geometry": file.name, "flats": f"mean of {len(flats)}"}
    if not darks:
        notes["darks"] = "none"
    return Recording(
        format="Walnut-CBCT",
        name=_name(folder),
        frames=frames,
        geometry=geometry,
        flats=tiff_frames(flats, from_stored),
        darks=tiff_frames(darks, from_stored) if darks else None,
        grid=_grid(truth, geometry),
        truth=truth,
        notes=notes,
    )


def _tubes(path: Path) -> list[Path]:
    def here(folder: Path) -> bool:
        return any((folder / name).is_file() for name in GEOMETRIES)

    if not path.is_dir():
        return []
    if here(path):
        return [path]
    projections = path / "Projections"
    parent = projections if projections.is_dir() else path
    return sorted(p for p in parent.iterdir() if p.is_dir() and here(p))


def _vectors(file: Path) -> NDArray[np.float64]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an empty file, which is told below
            vectors = np.loadtxt(file, ndmin=2)
    except (ValueError, OSError) as error:
        reason = str(error).split(";")[0].splitlines()[0]
        raise ScanError(f"{file} is not a table of numbers ({reason}): restore the original file.") from None
    if vectors.size == 0 or vectors.shape[1] != 12:
        columns = vectors.shape[1] if vectors.size else 0
        raise ScanError(
            f"{file} has {columns} columns; it needs 12 a view (source, detector centre, u and v, each x y z in mm): "
            "restore the original file."
        )
    if not np.isfinite(vectors).all():
        row = int(np.argwhere(~np.isfinite(vectors))[0, 0])
        raise ScanError(f"{file} holds NaN or infinity in row {row + 1}: restore the original file.")
    return vectors


def _name(folder: Path) -> str:
    if folder.parent.name == "Projections":
        return f"{folder.parent.parent.name} {folder.name}"
    return folder.name


def _truth(folder: Path) -> Path | None:
    """truth.tif of a simulated scan, or the data set's own reconstruction from all three tubes."""
    if (folder / "truth.tif").is_file():
        return folder / "truth.tif"
    slices = folder.parent.parent / "Reconstructions"
    if folder.parent.name == "Projections" and slices.is_dir() and any(slices.glob("full_AGD_50_*.tif*")):
        return slices
    return None


def _grid(truth: Path | None, geometry: Geometry) -> Grid | None:
    """The truth's grid, so that volumes can be compared voxel by voxel; the data set's own for its scans."""
    if truth is not None and truth.is_file():
        with open_tiff(truth) as tif:
            spacing = (tif.imagej_metadata or {}).get("spacing")
            shape = tif.series[0].shape
        if spacing and len(shape) == 3:
            return Grid(shape, float(spacing))
    elif geometry.detector_shape == (972, 768):
        return Grid((501, 501, 501), 0.1)
    return None


def write_geometry(file: Path, vectors: ArrayLike) -> None:
    """Write the 12 numbers a view as the data set does."""
    np.savetxt(file, np.asarray(vectors, dtype=np.float64), fmt="%.10g")
