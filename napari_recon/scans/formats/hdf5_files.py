"""Frames in an HDF5 dataset, and small things read from HDF5 files."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.recording import Frames

_MILLIMETRES = {"m": 1e3, "metre": 1e3, "meter": 1e3, "cm": 10.0, "mm": 1.0, "nm": 1e-6}
_MILLIMETRES |= dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometre"), 1e-3)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, with the compression filters of hdf5plugin where that is installed."""
    with contextlib.suppress(ImportError):
        importlib.import_module("hdf5plugin")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        reason = str(error).split("(")[-1].rstrip(")")
        raise ScanError(
            f"{path} cannot be read as HDF5 ({reason}): it is damaged or truncated, so copy it again."
        ) from None
    with file:
        yield file


class Hdf5Frames(Frames):
    """Frames of a (frames, rows, columns) dataset; (frames, columns) stands for one row."""

    def __init__(self, path: Path, dataset: h5py.Dataset) -> None:
        shape = dataset.shape
        if len(shape) == 2:
            shape = (shape[0], 1, shape[1])
        if len(shape) != 3:
            raise ScanError(
                f"{path}: {dataset.name} has the shape {dataset.shape}; frames need (frames, rows, columns)."
            )
        self._path, self._name = path, str(dataset.name)
        super().__init__(path, shape, dataset.dtype)
        self._together = dataset.chunks[0] if dataset.chunks else 1

    def _load(self, index: NDArray[np.intp]) -> NDArray[Any]:
        out = np.empty((len(index), *self._detector), self.dtype)
        with opened(self._path) as file:
            dataset = file[self._name]
            try:
                # h5py's fancy indexing is slow and wants sorted indices: read runs of consecutive frames.
                for start, stop in _runs(index):
                    first, last = int(index[start]), int(index[stop - 1])
                    out[start:stop] = dataset[first : last + 1].reshape(stop - start, *self._detector)
            except OSError as error:
                if "filter" in str(error) or "plugin" in str(error):
                    raise ScanError(
                        f"{self._path} is compressed with a filter that is not installed: pip install hdf5plugin."
                    ) from None
                raise ScanError(
                    f"{self._path}: {self._name} cannot be read: the file is damaged or truncated, so copy it again."
                ) from None
        return out


def _runs(index: NDArray[np.intp]) -> list[tuple[int, int]]:
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    edges = [0, *breaks.tolist(), len(index)]
    return list(itertools.pairwise(edges))


def text(value: Any) -> str:
    """An attribute or scalar dataset as text."""
    value = np.asarray(value).ravel()[0] if np.size(value) else ""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def degrees(dataset: h5py.Dataset) -> NDArray[np.float64]:
    """Angles in degrees; radians only where the units say so."""
    unit = text(dataset.attrs.get("units", "deg")).lower()
    values = np.asarray(dataset[()], dtype=np.float64).ravel()
    return np.rad2deg(values) if unit.startswith("rad") else values


def millimetres(dataset: h5py.Dataset, default: str) -> float | None:
    """A length in mm, or None where its unit is unknown or it is not a positive number."""
    unit = text(dataset.attrs.get("units", default)).strip()
    factor = _MILLIMETRES.get(unit) or _MILLIMETRES.get(unit.lower())
    try:
        value = float(np.asarray(dataset[()]).ravel()[0])
    except (TypeError, ValueError, IndexError):
        return None
    return value * factor if factor and np.isfinite(value) and value > 0 else None
