"""Frames in TIFF files: one a file, or many in one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.recording import Frames

Turn = Callable[[NDArray[Any]], NDArray[Any]]


def natural(path: Path) -> list[int | str]:
    """Sort key that puts img_2 before img_10."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", path.name)]


def tiff_frames(paths: Sequence[Path], turn: Turn | None = None) -> Frames:
    """Frames of a list of TIFFs with one frame each, or of a single TIFF with one or more.

    Only the first file's header is read, and the files' sizes.

    Parameters
    ----------
    paths
        In the order of the views.
    turn
        Applied to every image as it is stored, to bring it to (rows, columns).
    """
    first = paths[0]
    with open_tiff(first) as tif:
        series = tif.series[0]
        shape, dtype = tuple(n for n in series.shape if n != 1) or (1, 1), series.dtype
        if len(series.shape) >= 2 and len(shape) < 2:
            shape = series.shape[-2:]
        if len(shape) not in (2, 3) or int(tif.pages[0].samplesperpixel) > 1:  # type: ignore[union-attr]
            raise ScanError(f"{first} has the shape {series.shape}; frames must be grey-scale images of one channel.")
        many = len(series.shape) >= 3 and series.shape[-3] > 1
        if many:
            shape = series.shape[-3:]
        stored = int(sum(tif.pages[0].databytecounts)) + int(min(tif.pages[0].dataoffsets))  # type: ignore[union-attr]
        plain = int(tif.pages[0].compression) == 1  # type: ignore[union-attr]
    if many:
        if len(paths) > 1:
            raise ScanError(
                f"{first} holds {shape[0]} frames and is one of {len(paths)} files: give one file, or one frame a file."
            )
        return TiffPages(first, shape, dtype, turn)  # type: ignore[arg-type]
    if plain:
        for path in paths:
            if path.stat().st_size < min(stored, first.stat().st_size) * 0.98:
                raise ScanError(f"{path} is shorter than the other frames, so it is truncated: copy it again.")
    return TiffFiles(paths, (shape[-2], shape[-1]), dtype, turn)


class TiffFiles(Frames):
    """One frame a file."""

    def __init__(self, paths: Sequence[Path], detector: tuple[int, int], dtype: Any, turn: Turn | None) -> None:
        self._paths, self._turn, self._stored = tuple(paths), turn, detector
        rows, columns = detector if turn is None else turn(np.empty(detector, bool)).shape
        super().__init__(paths[0].parent, (len(paths), rows, columns), dtype)

    def _load(self, index: NDArray[np.intp]) -> NDArray[Any]:
        out = np.empty((len(index), *self._detector), self.dtype)
        for k, i in enumerate(index):
            path = self._paths[i]
            with open_tiff(path) as tif:
                image = _pixels(path, tif.pages[0])
            image = image.reshape(image.shape[-2:]) if image.size == image.shape[-1] * image.shape[-2] else image
            if image.shape != self._stored:
                raise ScanError(
                    f"{path} is {' x '.join(map(str, image.shape))} pixels where the other frames are "
                    f"{self._stored[0]} x {self._stored[1]}: take the frames of one scan."
                )
            out[k] = image if self._turn is None else self._turn(image)
        return out


class TiffPages(Frames):
    """Many frames in one file."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: Any, turn: Turn | None) -> None:
        self._path, self._turn, self._stored = path, turn, shape
        rows, columns = shape[1:] if turn is None else turn(np.empty(shape[1:], bool)).shape
        super().__init__(path, (shape[0], rows, columns), dtype)

    def _load(self, index: NDArray[np.intp]) -> NDArray[Any]:
        out = np.empty((len(index), *self._detector), self.dtype)
        with open_tiff(self._path) as tif:
            series = tif.series[0]
            offset, (_, rows, columns) = series.dataoffset, self._stored
            for k, i in enumerate(index):
                if offset is not None:  # contiguous: straight to the frame's bytes, whatever the number of pages
                    tif.filehandle.seek(offset + int(i) * rows * columns * self.dtype.itemsize)
                    raw = tif.filehandle.read(rows * columns * self.dtype.itemsize)
                    if len(raw) < rows * columns * self.dtype.itemsize:
                        raise ScanError(f"{self._path} ends within frame {int(i)}, so it is truncated: copy it again.")
                    image = np.frombuffer(raw, self.dtype.newbyteorder(tif.byteorder)).reshape(rows, columns)
                else:
                    image = _pixels(self._path, series.pages[int(i)]).reshape(rows, columns)
                out[k] = image if self._turn is None else self._turn(image)
        return out


def open_tiff(path: Path) -> tifffile.TiffFile:
    """Open a TIFF; a ScanError says what is wrong where that fails."""
    try:
        tif = tifffile.TiffFile(path)
    except FileNotFoundError:
        raise ScanError(f"{path} is missing: copy the scan again, or correct the names of its frames.") from None
    except Exception as error:  # damaged bytes lead to whatever they lead to
        raise ScanError(
            f"{path} cannot be read as TIFF ({_short(error)}): it is damaged or truncated, so copy it again."
        ) from None
    if not len(tif.pages):
        tif.close()
        raise ScanError(f"{path} holds no image: it is damaged or truncated, so copy it again.")
    return tif


def _pixels(path: Path, page: Any) -> NDArray[Any]:
    try:
        needed = int(sum(page.databytecounts))
        end = max(o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)) if needed else 0
        if needed == 0 or end > path.stat().st_size:
            raise ScanError(f"{path} is truncated: copy it again.")
        return page.asarray()
    except ScanError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        if "imagecodecs" in str(error):
            raise ScanError(
                f"{path} is compressed in a way that needs one more package: pip install imagecodecs."
            ) from None
        raise ScanError(
            f"{path} cannot be read ({_short(error)}): it is damaged or truncated, so copy it again."
        ) from None


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
