"""What a reader hands over: frames that are read on demand, and what the file says about them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid


class Frames:
    """Detector images that stay in their file until they are asked for.

    Readers subclass this with :meth:`_load`. Nothing is kept open between calls, so that frames may be pickled into
    another process and a file may be moved once nobody reads it.

    Parameters
    ----------
    source
        The file or folder, for messages.
    shape
        (frames, rows, columns) in the file.
    dtype
        As stored.

    Attributes
    ----------
    shape
        (frames, rows, columns) of what is selected.
    """

    def __init__(self, source: Path, shape: tuple[int, int, int], dtype: Any) -> None:
        self.source = source
        self.dtype = np.dtype(dtype)
        self._together = 1  # frames that the file stores as one block, cheapest read at once
        self._detector = (int(shape[1]), int(shape[2]))
        self._index: NDArray[np.intp] = np.arange(shape[0])
        if self.dtype.kind not in "uif":
            raise ScanError(f"{source} holds {self.dtype} values; frames must be whole or floating point numbers.")
        if min(shape) < 1:
            raise ScanError(f"{source} holds no frames (its shape is {tuple(shape)}).")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, rows, columns)."""
        return len(self._index), *self._detector

    @property
    def ndim(self) -> int:
        """Always 3."""
        return 3

    def __len__(self) -> int:
        return len(self._index)

    def select(self, index: Sequence[int] | NDArray[np.integer] | NDArray[np.bool_] | slice) -> Frames:
        """The same file, fewer frames; nothing is read."""
        chosen = copy.copy(self)
        chosen._index = np.atleast_1d(self._index[index])
        return chosen

    def __getitem__(self, index: int | slice | Sequence[int] | NDArray[np.integer]) -> NDArray[Any]:
        """Read frames: (rows, columns) for an int, else (frames, rows, columns), in the stored dtype."""
        chosen = self._index[index]
        frames = self._load(np.atleast_1d(chosen))
        return frames[0] if np.ndim(chosen) == 0 else frames

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        frames = self[:]
        return frames if dtype is None else frames.astype(dtype, copy=False)

    def chunks(self, megabytes: float = 16) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Read everything in pieces of about ``megabytes`` (as float32): pairs of which frames, and their values.

        16 MB stay in a processor's cache through the steps of a correction: four times faster than 64 MB.
        """
        frame = 4e-6 * self._detector[0] * self._detector[1]
        count = max(1, int(megabytes / frame), min(self._together, int(256 / frame)))
        for start in range(0, len(self), count):
            piece = slice(start, min(start + count, len(self)))
            yield piece, self[piece]

    def _load(self, index: NDArray[np.intp]) -> NDArray[Any]:
        """Read frames by their number in the file: (len(index), rows, columns)."""
        raise NotImplementedError


class ArrayFrames(Frames):
    """Frames that a small file gave all at once."""

    def __init__(self, source: Path, array: NDArray[Any]) -> None:
        super().__init__(source, array.shape, array.dtype)  # type: ignore[arg-type]
        self._array = array

    def _load(self, index: NDArray[np.intp]) -> NDArray[Any]:
        return self._array[index]


@dataclass(frozen=True, eq=False)
class Recording:
    """A scan as its file describes it, before any correction.

    Attributes
    ----------
    format
        The format's name, for people.
    name
        The scan's name.
    frames
        Raw projections, (views, rows, columns).
    geometry
        Of all views, for the unbinned detector.
    flats, darks
        Frames without object, and without beam; None where there are none.
    values
        What the frames hold: detector ``"counts"``, ``"transmission"`` (flat-fielded, not logged) or
        ``"line integrals"`` (-log taken).
    air_normalisation
        Whether the file asks for it.
    grid
        The grid that the file suggests, or None.
    truth
        The true volume, where it is known: a TIFF, or a folder of slices.
    notes
        What the file says, and what had to be assumed, for people.
    """

    format: str
    name: str
    frames: Frames
    geometry: Geometry
    flats: Frames | None = None
    darks: Frames | None = None
    values: Literal["counts", "transmission", "line integrals"] = "counts"
    air_normalisation: bool = False
    grid: Grid | None = None
    truth: Path | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        views, rows, columns = self.frames.shape
        source = self.frames.source
        if self.geometry.views != views:
            raise ScanError(
                f"{source} holds {views} projections but its geometry describes {self.geometry.views} views: "
                "leave out what is not a projection (flats, darks), or give the angles of these projections."
            )
        if self.geometry.detector_shape != (rows, columns):
            raise ScanError(
                f"{source} holds projections of {rows} x {columns} pixels but its geometry describes a detector of "
                f"{self.geometry.detector_shape[0]} x {self.geometry.detector_shape[1]}: correct the geometry."
            )
        if self.values == "counts" and self.flats is None:
            raise ScanError(
                f"{source} holds raw counts but no flats (frames without object), which -log needs: add the flats, or "
                "say already_flat or already_log = true in a scan.toml if that was done before."
            )
        for what, others in (("flats", self.flats), ("darks", self.darks)):
            if others is not None and others.shape[1:] != (rows, columns):
                raise ScanError(
                    f"{others.source} holds {what} of {others.shape[1]} x {others.shape[2]} pixels for projections of "
                    f"{rows} x {columns}: take the {what} of this scan."
                )

    @cached_property
    def flat(self) -> NDArray[np.float32] | None:
        """(rows, columns): the mean of the flats."""
        return None if self.flats is None else _mean(self.flats)

    @cached_property
    def dark(self) -> NDArray[np.float32] | None:
        """(rows, columns): the mean of the darks."""
        return None if self.darks is None else _mean(self.darks)


def _mean(frames: Frames) -> NDArray[np.float32]:
    total = np.zeros(frames.shape[1:])
    for _, piece in frames.chunks():
        total += piece.sum(axis=0, dtype=np.float64)
    return (total / len(frames)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class KSpaceRecording:
    """Multi-coil k-space as its file describes it, before any correction. What is read is read by functions.

    Attributes
    ----------
    format
        The format's name, for people.
    name
        The scan's name.
    source
        The file, for messages.
    shape
        (coils, D, H, W) of the samples in the file: z, y, x, or slices for z.
    read
        Gives the samples: (coils, D, H, W), complex, the centre of k-space in the middle (index n // 2), zero where
        nothing was measured.
    voxel_size
        (z, y, x) in mm; None where the file does not say.
    slices
        Whether D counts slices that were measured each by itself, rather than an encoded direction.
    readout
        The axis of (D, H, W) along which every line is measured in one go, or None.
    kept
        Readout samples that are left when the oversampling is removed; None for no oversampling.
    read_mask
        Gives which sites were measured, (D, H, W) or what broadcasts to it, without reading all the samples; None
        where it has to be found from them.
    read_noise
        Gives a noise scan, (coils, samples), complex.
    read_coil_maps
        Gives coil sensitivity maps, (coils, D, H, W), complex, of the image without oversampling.
    truth
        The true volume, where it is known.
    notes
        What the file says, and what had to be assumed, for people.
    """

    format: str
    name: str
    source: Path
    shape: tuple[int, int, int, int]
    read: Callable[[], NDArray[Any]]
    voxel_size: tuple[float, float, float] | None = None
    slices: bool = False
    readout: int | None = 2
    kept: int | None = None
    read_mask: Callable[[], NDArray[np.bool_]] | None = None
    read_noise: Callable[[], NDArray[Any]] | None = None
    read_coil_maps: Callable[[], NDArray[Any]] | None = None
    truth: Path | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ScanError(f"{self.source} holds no samples (its shape is {self.shape}).")
        if self.voxel_size is not None and not all(np.isfinite(v) and v > 0 for v in self.voxel_size):
            raise ScanError(f"{self.source}: the voxel size {self.voxel_size} must be positive numbers of millimetres.")
        if self.kept is not None and (self.readout is None or not 0 < self.kept <= self.shape[1 + self.readout]):
            raise ScanError(
                f"{self.source}: {self.kept} readout samples cannot be kept of {self.shape[1:]}: correct the "
                "oversampling."
            )
