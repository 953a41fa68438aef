"""NXtomo (NeXus) HDF5, found by its groups' ``NX_class``, not by fixed paths: parallel beam.

https://manual.nexusformat.org/classes/applications/NXtomo.html
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.formats.dxchange import SUFFIXES, parallel_recording, pixel_size
from napari_recon.scans.formats.hdf5_files import Hdf5Frames, degrees, opened, text
from napari_recon.scans.recording import Frames, Recording


def recognises(path: Path) -> bool:
    """Whether this is an HDF5 file with an NXdetector that has data and an image key."""
    if not (path.is_file() and path.suffix.lower() in SUFFIXES and h5py.is_hdf5(path)):
        return False
    with opened(path) as file:
        return _detector(file) is not None


def contents(path: Path) -> tuple[Frames, Frames | None, Frames | None, NDArray[np.float64] | None]:
    """Projections, flats, darks and the projections' angles (degrees)."""
    with opened(path) as file:
        detector = _detector(file)
        assert detector is not None
        data = Hdf5Frames(path, detector["data"])
        key = np.asarray(detector["image_key"][()]).ravel().astype(int)
        if "image_key_control" in detector:  # negative: a projection taken again to see movement
            control = np.asarray(detector["image_key_control"][()]).ravel().astype(int)
            key = np.where(control < 0, 3, key) if control.shape == key.shape else key
        given = _datasets(file, "rotation_angle")
        angles = next((degrees(d) for d in given if d.size == len(data)), None)
        counts = [d.size for d in given]
    if len(key) != len(data):
        raise ScanError(f"{path}: image_key has {len(key)} entries for {len(data)} frames: correct the file.")
    if angles is None and counts:
        raise ScanError(
            f"{path}: rotation_angle gives {counts[0]} angles for {len(data)} frames: "
            "correct the file, or give the angles in a scan.toml."
        )
    if not (key == 0).any():
        raise ScanError(f"{path}: image_key marks no frame as a projection (0): correct the file.")

    def those(mark: int) -> Frames | None:
        return data.select(key == mark) if (key == mark).any() else None

    return data.select(key == 0), those(1), those(2), None if angles is None else angles[key == 0]


def read(path: Path) -> Recording:
    """Read keys and angles and find the frames.

    Raises
    ------
    ScanError
        If angles or flats are missing, or the file is damaged.
    """
    frames, flats, darks, angles = contents(path)
    if angles is None:
        raise ScanError(
            f"{path} has no rotation_angle: give the angles in a scan.toml with projections = {path.name!r}."
        )
    with opened(path) as file:
        detector = _detector(file)
        assert detector is not None
        across, notes = pixel_size(file, (f"{detector.name}/x_pixel_size",), "m")
        along, _ = pixel_size(file, (f"{detector.name}/y_pixel_size", f"{detector.name}/x_pixel_size"), "m")
    return parallel_recording(path, "NXtomo", frames, flats, darks, angles, (along, across), notes)


def _detector(file: h5py.File) -> h5py.Group | None:
    """The first NXdetector that holds frames and says which are projections."""
    found: list[h5py.Group] = []

    def visit(_: str, item: h5py.Group | h5py.Dataset) -> bool | None:
        if not (isinstance(item, h5py.Group) and text(item.attrs.get("NX_class", "")) == "NXdetector"):
            return None
        if all(isinstance(item.get(name), h5py.Dataset) for name in ("data", "image_key")):
            found.append(item)
            return True
        return None

    file.visititems(visit)
    return found[0] if found else None


def _datasets(file: h5py.File, name: str) -> list[h5py.Dataset]:
    """Datasets of this name, those of an NXsample first."""
    found: list[tuple[bool, h5py.Dataset]] = []

    def visit(path: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and path.rsplit("/", 1)[-1] == name:
            found.append((text(item.parent.attrs.get("NX_class", "")) != "NXsample", item))

    file.visititems(visit)
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]
