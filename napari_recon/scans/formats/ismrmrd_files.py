"""ISMRMRD (MRD) HDF5: an XML header, and acquisitions that each carry one readout line.

Inati et al., "ISMRM Raw data format", Magnetic Resonance in Medicine 77 (2017); https://ismrmrd.github.io.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from napari_recon.scans.errors import ScanError
from napari_recon.scans.formats.dxchange import SUFFIXES
from napari_recon.scans.formats.hdf5_files import opened, text
from napari_recon.scans.recording import KSpaceRecording

#: Lines looked at for samples that are exactly zero, before the headers' word is taken.
LOOKED_AT = 64

# Flags are counted from one.
NOISE, REVERSE = 1 << 18, 1 << 21
CALIBRATION = 1 << 19
# What is no line of the image: navigators, phase correction, feedback, dummies, coil correction, phase stabilisation.
OTHER = sum(1 << (flag - 1) for flag in (23, 24, 26, 27, 28, 29, 30, 31))


@dataclass(frozen=True)
class Encoding:
    """The first encoding of an ISMRMRD header. All triples are (z, y, x), lengths in mm.

    Attributes
    ----------
    matrix, field_of_view
        As encoded, with oversampling.
    kept
        Readout samples that the reconstructed field of view needs; None for all.
    centre
        (z, y): the encoding step that is the middle of k-space.
    trajectory
        "cartesian", or something else.
    embedded
        Whether calibration lines belong to the image's k-space, having been measured with it.
    """

    matrix: tuple[int, int, int]
    field_of_view: tuple[float, float, float]
    kept: int | None
    centre: tuple[int, int]
    trajectory: str
    embedded: bool

    @classmethod
    def parse(cls, path: Path, xml: bytes | str) -> Encoding:
        """Read the header's XML."""
        from ismrmrd.xsd import CreateFromDocument

        try:
            first = CreateFromDocument(xml).encoding[0]
            encoded, recon = first.encodedSpace, first.reconSpace
            size, fov = encoded.matrixSize, encoded.fieldOfView_mm
            nz, ny, nx = int(size.z), int(size.y), int(size.x)
            limits = first.encodingLimits
            steps = (
                (limits.kspace_encoding_step_2, limits.kspace_encoding_step_1) if limits is not None else (None, None)
            )
            cz, cy = (n // 2 if s is None else int(s.center) for s, n in zip(steps, (nz, ny), strict=True))
            kept = None
            if recon is not None and 0 < recon.fieldOfView_mm.x < fov.x:
                kept = round(nx * recon.fieldOfView_mm.x / fov.x)
            trajectory = str(getattr(first.trajectory, "value", first.trajectory)).lower()
            mode = getattr(first.parallelImaging, "calibrationMode", None)
            embedded = str(getattr(mode, "value", mode)).lower() == "embedded"
            return cls((nz, ny, nx), (float(fov.z), float(fov.y), float(fov.x)), kept, (cz, cy), trajectory, embedded)
        except Exception as error:  # the parser raises whatever the text leads to
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ScanError(
                f"{path}: its ISMRMRD header does not describe an encoding ({reason}): convert the raw data again."
            ) from None

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        """(z, y, x) in mm; z is the slice thickness where slices were measured one by one."""
        z, y, x = (f / max(1, n) for f, n in zip(self.field_of_view, self.matrix, strict=True))
        return z, y, x


def recognises(path: Path) -> bool:
    """Whether this is an HDF5 file with a group that holds an XML header and acquisitions."""
    if not (path.is_file() and path.suffix.lower() in (*SUFFIXES, ".mrd") and h5py.is_hdf5(path)):
        return False
    with opened(path) as file:
        return _group(file) is not None


def _group(file: h5py.File) -> str | None:
    for name, item in file.items():
        data = item.get("data") if isinstance(item, h5py.Group) else None
        if isinstance(data, h5py.Dataset) and "xml" in item and {"head", "data"} <= set(data.dtype.names or ()):
            return str(name)
    return None


@dataclass(frozen=True, eq=False)
class _Lines:
    """The lines of the image, in a file: where they are, and where they go. Reads no samples.

    ``number`` are acquisitions of the file; ``plane`` and ``row`` are where a line goes in (D, H), ``first`` and
    ``last`` between which columns, from which ``skipped`` sample of the line on.
    """

    path: Path
    group: str
    shape: tuple[int, int, int, int]
    number: NDArray[np.intp]
    plane: NDArray[np.intp]
    row: NDArray[np.intp]
    first: NDArray[np.intp]
    last: NDArray[np.intp]
    skipped: NDArray[np.intp]
    reverse: NDArray[np.bool_]

    def samples(self, which: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.complex64]]]:
        """Which line, and its samples (coils, columns from first to last)."""
        for line, values in zip(which, _acquisitions(self.path, self.group, self.number[which]), strict=True):
            coils = self.shape[0]
            if values.size % coils:
                raise ScanError(f"{self.path}: acquisition {self.number[line]} is incomplete: convert the data again.")
            values = values.reshape(coils, -1)
            values = values[:, ::-1] if self.reverse[line] else values
            start = self.skipped[line]
            values = values[:, start : start + self.last[line] - self.first[line]]
            if values.shape[1] != self.last[line] - self.first[line]:
                raise ScanError(f"{self.path}: acquisition {self.number[line]} is incomplete: convert the data again.")
            yield int(line), values

    def read(self) -> NDArray[np.complex64]:
        """(coils, D, H, W); lines that were measured several times are averaged."""
        kspace = np.zeros(self.shape, np.complex64)
        times = np.zeros(self.shape[1:3], int)
        for line, values in self.samples(np.arange(len(self.number))):
            plane, row = self.plane[line], self.row[line]
            kspace[:, plane, row, self.first[line] : self.last[line]] += values
            times[plane, row] += 1
        if times.max() > 1:
            kspace /= np.maximum(times, 1)[None, :, :, None]
        return kspace

    def mask(self) -> NDArray[np.bool_]:
        """(D, H, W): what the headers say was measured, unless lines hold samples that are exactly zero."""
        which = np.unique(np.linspace(0, len(self.number) - 1, LOOKED_AT).astype(int))
        if any((~values.any(axis=0)).any() for _, values in self.samples(which)):
            return np.asarray(self.read().any(axis=0), np.bool_)
        mask = np.zeros(self.shape[1:], bool)
        for plane, row, first, last in zip(self.plane, self.row, self.first, self.last, strict=True):
            mask[plane, row, first:last] = True
        return mask


def read(path: Path) -> KSpaceRecording:
    """Read the XML and the acquisitions' headers.

    Raises
    ------
    ScanError
        If the trajectory is not Cartesian, or headers are missing or contradict each other.
    """
    with opened(path) as file:
        group = _group(file)
        assert group is not None
        xml = file[group]["xml"]
        encoding = Encoding.parse(path, text(xml[()]))
        heads = file[group]["data"].fields("head")[:]
    if encoding.trajectory != "cartesian":
        raise ScanError(
            f"{path} has a {encoding.trajectory} trajectory; only Cartesian k-space is understood: grid it first."
        )
    flags = heads["flags"]
    unwanted = NOISE | OTHER | (0 if encoding.embedded else CALIBRATION)
    imaging = (flags & unwanted == 0) & (heads["encoding_space_ref"] == 0)
    notes: dict[str, str] = {}
    if not encoding.embedded and (flags & CALIBRATION).any():
        notes["calibration lines"] = "measured apart from the image; not used"
    for name in ("contrast", "phase", "repetition", "set"):
        values = np.unique(heads["idx"][name][imaging])
        if len(values) > 1:
            notes[name] = f"first of {len(values)}"
            imaging &= heads["idx"][name] == values[0]
    number = np.flatnonzero(imaging)
    if not len(number):
        raise ScanError(f"{path} holds no lines of an image, only noise or calibration: choose the measurement's file.")
    lines, thickness = _lines(path, group, encoding, heads, number)
    slices = encoding.matrix[0] == 1
    dz, dy, dx = encoding.voxel_size
    size = (thickness or dz, dy, dx)
    return KSpaceRecording(
        format="ISMRMRD",
        name=path.stem,
        source=path,
        shape=lines.shape,
        read=lines.read,
        voxel_size=size if min(size) > 0 else None,
        slices=slices,
        readout=2,
        kept=encoding.kept,
        read_mask=lines.mask,
        read_noise=partial(_noise, path, group, float(np.median(heads["sample_time_us"][number])))
        if (flags & NOISE).any()
        else None,
        notes=notes,
    )


def _lines(
    path: Path, group: str, encoding: Encoding, heads: NDArray[Any], number: NDArray[np.intp]
) -> tuple[_Lines, float | None]:
    """Where the lines go; and the distance of slices in mm, where the headers tell."""
    heads = heads[number]
    nz, ny, nx = encoding.matrix
    channels = np.unique(heads["active_channels"])
    if len(channels) != 1 or channels[0] < 1:
        raise ScanError(
            f"{path}: its lines have {', '.join(map(str, channels))} coils; they must have the same number."
        )
    slices = np.unique(heads["idx"]["slice"])
    spacing = None
    if nz > 1:
        if len(slices) > 1:
            raise ScanError(f"{path} holds {len(slices)} slabs of 3D k-space: convert one of them.")
        planes, plane = nz, nz // 2 + heads["idx"]["kspace_encode_step_2"].astype(int) - encoding.centre[0]
    else:
        order, spacing = _slice_order(heads, slices)
        planes, plane = len(slices), order[np.searchsorted(slices, heads["idx"]["slice"])]
    row = ny // 2 + heads["idx"]["kspace_encode_step_1"].astype(int) - encoding.centre[1]
    if min(plane.min(), row.min()) < 0 or plane.max() >= planes or row.max() >= ny:
        raise ScanError(
            f"{path}: its encoding steps do not fit the encoded matrix {nz} x {ny} x {nx} (z, y, x) about its centre: "
            "correct encodedSpace or encodingLimits in its header."
        )
    count = heads["number_of_samples"].astype(int)
    centre = heads["center_sample"].astype(int)
    reverse = heads["flags"] & REVERSE != 0
    pre, post = heads["discard_pre"].astype(int), heads["discard_post"].astype(int)
    # Some writers leave the centre out; no Cartesian line begins there.
    centre = np.where(centre == 0, count // 2, centre)
    pre, post = np.where(reverse, post, pre), np.where(reverse, pre, post)
    begin = nx // 2 - centre
    first, last = np.maximum(0, begin + pre), np.minimum(nx, begin + count - post)
    if (first >= last).any():
        raise ScanError(f"{path}: lines of {int(count.max())} samples do not fit the encoded matrix of {nx} columns.")
    shape = (int(channels[0]), int(planes), ny, nx)
    return _Lines(path, group, shape, number, plane, row, first, last, first - begin, reverse), spacing


def _slice_order(heads: NDArray[Any], slices: NDArray[Any]) -> tuple[NDArray[np.intp], float | None]:
    """Where each slice goes, by its position along the slice direction (slices are measured interleaved)."""
    as_counted = np.arange(len(slices))
    if len(slices) < 2:
        return as_counted, None
    one = np.array([np.argmax(heads["idx"]["slice"] == s) for s in slices])
    along = (heads["position"][one] * heads["slice_dir"][one]).sum(axis=1)
    apart = np.diff(np.sort(along))
    if not apart.min() > 0:
        return as_counted, None
    return np.argsort(np.argsort(along)), float(apart.mean())


def _noise(path: Path, group: str, dwell: float) -> NDArray[np.complex64]:
    """(coils, samples); its variance is proportional to the bandwidth, so it is brought to that of the image."""
    with opened(path) as file:
        heads = file[group]["data"].fields("head")[:]
    number = np.flatnonzero(heads["flags"] & NOISE)
    parts = []
    for head, values in zip(heads[number], _acquisitions(path, group, number), strict=True):
        coils, own = int(head["active_channels"]), float(head["sample_time_us"])
        if coils < 1 or values.size % coils:
            raise ScanError(f"{path}: a noise acquisition is incomplete: convert the data again.")
        scale = np.sqrt(own / dwell) if own > 0 and dwell > 0 else 1.0
        parts.append(values.reshape(coils, -1) * np.float32(scale))
    if len({len(p) for p in parts}) != 1:
        raise ScanError(f"{path}: its noise acquisitions have different numbers of coils: convert the data again.")
    return np.concatenate(parts, axis=1)


def _acquisitions(path: Path, group: str, number: NDArray[np.intp], together: int = 256) -> Iterator[NDArray[Any]]:
    """The samples of acquisitions as they are stored, complex64, some of them read at a time."""
    with opened(path) as file:
        data = file[group]["data"].fields("data")
        for start in range(0, len(number), together):
            wanted = number[start : start + together]
            low, high = int(wanted.min()), int(wanted.max()) + 1
            try:
                # Neighbours are read at once; what lies far apart (a look at some lines), one by one.
                near = high - low <= 2 * len(wanted)
                piece = data[low:high] if near else None
                for k in wanted:
                    values = piece[k - low] if piece is not None else data[int(k)]
                    yield np.ascontiguousarray(values, np.float32).view(np.complex64)
            except OSError:
                raise ScanError(
                    f"{path}: its acquisitions cannot be read: the file is damaged or truncated, so copy it again."
                ) from None
            except ValueError:
                raise ScanError(f"{path}: an acquisition is incomplete: convert the data again.") from None
