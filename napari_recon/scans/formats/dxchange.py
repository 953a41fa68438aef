"""DXchange (Data Exchange) HDF5, as synchrotrons and tomopy write it: parallel beam, ``/exchange``.

De Carlo et al., "Scientific data exchange: a schema for HDF5-based storage of raw and analyzed data", Journal of
Synchrotron Radiation 21, 1224 (2014).
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.formats.hdf5_files import Hdf5Frames, degrees, millimetres, opened
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.recording import Frames, Recording

SUFFIXES = (".h5", ".hdf5", ".hdf", ".nxs", ".nx")


def recognises(path: Path) -> bool:
    """Whether this is an HDF5 file with /exchange/data."""
    if not (path.is_file() and path.suffix.lower() in SUFFIXES):
        return False
    if not h5py.is_hdf5(path):
        return True  # so that a damaged file is told about, instead of called unknown
    with opened(path) as file:
        return "exchange/data" in file


def contents(path: Path) -> tuple[Frames, Frames | None, Frames | None, NDArray[np.float64] | None]:
    """Projections, flats, darks and angles (degrees), for a sidecar or for :func:`read`."""
    with opened(path) as file:
        exchange = file["exchange"]
        frames = Hdf5Frames(path, exchange["data"])
        flats, darks = (
            Hdf5Frames(path, exchange[k]) if k in exchange and exchange[k].size else None
            for k in ("data_white", "data_dark")
        )
        angles = degrees(exchange["theta"]) if "theta" in exchange else None
    if angles is not None and len(angles) != len(frames):
        raise ScanError(
            f"{path}: exchange/theta gives {len(angles)} angles for {len(frames)} projections; correct the file, or "
            "give the angles in a scan.toml."
        )
    return frames, flats, darks, angles


def read(path: Path) -> Recording:
    """Read the angles and find the frames.

    Raises
    ------
    ScanError
        If angles or flats are missing, or the file is damaged.
    """
    frames, flats, darks, angles = contents(path)
    if angles is None:
        raise ScanError(
            f"{path} has no exchange/theta: give the angles in a scan.toml with projections = {path.name!r}."
        )
    with opened(path) as file:
        pixel, notes = pixel_size(file, ("measurement/instrument/detection_system/objective/resolution",), "um")
    return parallel_recording(path, "DXchange", frames, flats, darks, angles, (pixel, pixel), notes)


def pixel_size(file: h5py.File, names: tuple[str, ...], unit: str) -> tuple[float, dict[str, str]]:
    """The pixel size in mm from the first of these datasets; 1 mm, with a note that says so, where there is none."""
    for name in names:
        if isinstance(file.get(name), h5py.Dataset) and (found := millimetres(file[name], unit)) is not None:
            return found, {}
    return 1.0, {"pixel size": "not recorded; taken as 1 mm, so attenuation is per pixel"}


def parallel_recording(
    path: Path,
    format: str,
    frames: Frames,
    flats: Frames | None,
    darks: Frames | None,
    angles: NDArray[np.float64],
    pixel: tuple[float, float],
    notes: dict[str, str],
) -> Recording:
    """A parallel-beam recording whose frames are stored from the top row down, as both HDF5 formats do."""
    from napari_recon.scans.formats.tiff_stack import top_down

    if not np.isfinite(angles).all():
        raise ScanError(f"{path}: its angles hold NaN; correct the file, or give the angles in a scan.toml.")
    return Recording(
        format=format,
        name=path.stem,
        frames=frames,
        geometry=top_down(Geometry.parallel(angles, frames.shape[1:], pixel)),
        flats=flats,
        darks=darks,
        notes={"beam": "taken as parallel", **notes},
    )
