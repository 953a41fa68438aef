"""fastMRI HDF5: ``kspace`` (slices, coils, readout, phase), or without coils, and an ISMRMRD header.

Knoll et al., "fastMRI: a publicly available raw k-space and DICOM dataset", Radiology: Artificial Intelligence 2
(2020). The readout runs along H, and is sampled twice as finely as the field of view needs. ``mask`` has an entry for
each column, or for each site.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.formats.dxchange import SUFFIXES
from napari_recon.scans.formats.hdf5_files import opened, text
from napari_recon.scans.formats.ismrmrd_files import Encoding
from napari_recon.scans.recording import KSpaceRecording


def recognises(path: Path) -> bool:
    """Whether this is an HDF5 file with /kspace."""
    if not (path.is_file() and path.suffix.lower() in SUFFIXES and h5py.is_hdf5(path)):
        return False
    with opened(path) as file:
        return isinstance(file.get("kspace"), h5py.Dataset)


def read(path: Path) -> KSpaceRecording:
    """Read the header and the shapes.

    Raises
    ------
    ScanError
        If the k-space has another shape, or is not complex.
    """
    with opened(path) as file:
        data = file["kspace"]
        if data.ndim not in (3, 4) or data.dtype.kind != "c":
            raise ScanError(
                f"{path}: kspace has the shape {data.shape} and type {data.dtype}; it must be complex and (slices, "
                "coils, height, width), or without coils."
            )
        slices, coils, h, w = data.shape if data.ndim == 4 else (data.shape[0], 1, *data.shape[1:])
        encoding = Encoding.parse(path, file["ismrmrd_header"][()]) if "ismrmrd_header" in file else None
        masked = isinstance(file.get("mask"), h5py.Dataset)
        notes = {k: text(file.attrs[k]) for k in ("acquisition", "patient_id") if k in file.attrs}
    kept, size = None, None
    if encoding is not None:
        if encoding.matrix[2] == h:
            kept = encoding.kept
        dz, dy, dx = encoding.voxel_size
        # The header counts x along the readout, which is H here.
        size = (dz, dx, encoding.field_of_view[1] / w) if min(dz, dy, dx) > 0 else None
    return KSpaceRecording(
        format="fastMRI",
        name=path.stem,
        source=path,
        shape=(coils, slices, h, w),
        read=partial(_read, path),
        voxel_size=size,
        slices=True,
        readout=1,
        kept=kept,
        read_mask=partial(_read_mask, path) if masked else partial(_find_mask, path),
        notes=notes,
    )


def _samples(path: Path, index: int | slice) -> NDArray[Any]:
    with opened(path) as file:
        try:
            return np.asarray(file["kspace"][index])
        except OSError:
            raise ScanError(
                f"{path}: kspace cannot be read: the file is damaged or truncated, so copy it again."
            ) from None


def _read(path: Path) -> NDArray[Any]:
    kspace = _samples(path, slice(None))
    return kspace[None] if kspace.ndim == 3 else kspace.transpose(1, 0, 2, 3)


def _read_mask(path: Path) -> NDArray[np.bool_]:
    with opened(path) as file:
        return np.asarray(file["mask"][()]) != 0


def _find_mask(path: Path) -> NDArray[np.bool_]:
    """What is not exactly zero in the middle slice; all of a file's slices have one pattern."""
    with opened(path) as file:
        slices = file["kspace"].shape[0]
    one = _samples(path, slices // 2)
    return np.asarray(one.reshape(-1, *one.shape[-2:]).any(axis=0), np.bool_)
