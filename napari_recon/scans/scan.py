"""A scan: what was measured, where, and how it becomes line integrals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from napari_recon.scans.corrections import FlatField, air_level, bin_line_integrals
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid
from napari_recon.scans.kspace import KSpaceOptions, KSpaceScan
from napari_recon.scans.options import changed
from napari_recon.scans.recording import Frames, KSpaceRecording, Recording

if TYPE_CHECKING:
    import torch


class ScanOptions(BaseModel):
    """How a scan is read: the corrections and the subsampling. None leaves what the file or sidecar says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    views: int | None = Field(
        default=None, ge=1, title="Views", description="Evenly spaced views to keep; none keeps all."
    )
    half: Literal["even", "odd"] | None = Field(
        default=None,
        title="Half",
        description="Every second of those views, from the first ('even') or the second one on ('odd'): what comes out "
        "alike of both halves is resolved.",
    )
    binning: int = Field(default=1, ge=1, le=64, title="Binning", description="n x n detector pixels become one.")
    axis_offset: float | None = Field(
        default=None,
        allow_inf_nan=False,
        title="Axis offset",
        description="Where the rotation axis is seen: pixels of the unbinned detector, to the right of its centre.",
    )
    air_normalisation: bool | None = Field(
        default=None,
        title="Air normalisation",
        description="Scale every view so that the air beside the object has line integral zero.",
    )


@dataclass(frozen=True, eq=False, repr=False)
class Scan:
    """Projections with their geometry and corrections. Opening one reads no frames.

    Make one with :func:`open_scan`.

    Attributes
    ----------
    path
        What was opened.
    recording
        What the reader found, before any option.
    options
        The corrections and the subsampling.
    """

    kind: ClassVar[Literal["x-ray"]] = "x-ray"

    path: Path
    recording: Recording
    options: ScanOptions = field(default_factory=ScanOptions)

    def __post_init__(self) -> None:
        have, asked = len(self.recording.frames), self.options.views
        if asked is not None and asked > have:
            raise ScanError(f"{self.path} has {have} views and {asked} were asked for: ask for {have} at most.")
        if self.options.half is not None and (asked or have) < 2:
            raise ScanError(f"A single view of {self.path} has no halves: ask for more views, or leave the half out.")
        _ = self.geometry  # refuses a binning that leaves nothing, before anyone computes

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The scan's name."""
        return self.recording.name

    @property
    def format(self) -> str:
        """The format's name."""
        return self.recording.format

    @property
    def notes(self) -> dict[str, str]:
        """What the file says, and what had to be assumed."""
        return dict(self.recording.notes)

    @property
    def truth(self) -> Path | None:
        """The true volume where it is known: a TIFF, or a folder of slices."""
        return self.recording.truth

    @cached_property
    def view_indices(self) -> NDArray[np.intp]:
        """(views,): which of the recorded views are kept, evenly spaced; or every second of those."""
        have = len(self.recording.frames)
        keep = self.options.views or have
        # Whole steps from the first view on, endpoint excluded: an even part of a full circle stays even.
        indices = np.arange(keep) * have // keep
        return indices if self.options.half is None else indices[int(self.options.half == "odd") :: 2]

    @cached_property
    def frames(self) -> Frames:
        """Raw frames of the kept views, (views, rows, columns) of the unbinned detector, read on demand."""
        return self.recording.frames.select(self.view_indices)

    @property
    def flat(self) -> NDArray[np.float32] | None:
        """(rows, columns): mean flat of the unbinned detector, or None."""
        return self.recording.flat

    @property
    def dark(self) -> NDArray[np.float32] | None:
        """(rows, columns): mean dark of the unbinned detector, or None."""
        return self.recording.dark

    @cached_property
    def geometry(self) -> Geometry:
        """The geometry of the kept views with axis offset and binning applied."""
        geometry = self.recording.geometry
        if self.options.axis_offset is not None:
            # Only the mean moves: a wobble that the file describes stays.
            geometry = geometry.with_axis_offset(self.options.axis_offset - float(np.mean(geometry.axis_offset)))
        if self.options.views is not None or self.options.half is not None:
            geometry = geometry.select(self.view_indices)
        return geometry if self.options.binning == 1 else geometry.binned(self.options.binning)

    @property
    def air_normalisation(self) -> bool:
        """Whether the air beside the object is brought to zero in every view."""
        asked = self.options.air_normalisation
        return self.recording.air_normalisation if asked is None else asked

    @property
    def shape(self) -> tuple[int, int, int]:
        """(views, rows, columns) of :meth:`projections`."""
        return self.geometry.views, *self.geometry.detector_shape

    def with_options(self, **changes: Any) -> Scan:
        """The same scan with some options changed; nothing is read.

        Raises
        ------
        ScanError
            If an option is unknown or out of range.
        """
        return Scan(self.path, self.recording, changed(self.options, changes))

    def default_grid(self, shape: tuple[int, int, int] | None = None, voxel_size: float | None = None) -> Grid:
        """A grid for the volume: what the file suggests, else what the scan sees with voxels of its resolution.

        Parameters
        ----------
        shape
            (D, H, W); the voxel size then follows, unless it is given too.
        voxel_size
            mm; the shape then follows.
        """
        if self.recording.grid is None:
            return self.geometry.default_grid(shape, voxel_size)
        grid = self.recording.grid
        if self.options.binning > 1:
            grid = grid.resampled(voxel_size=grid.voxel_size * self.options.binning)
        return grid.resampled(shape, voxel_size)

    # -- the data ------------------------------------------------------------------------------------------------

    def projections(self) -> NDArray[np.float32]:
        """Corrected line integrals of the kept views.

        Returns
        -------
        (views, rows, columns), float32, dimensionless.

        Raises
        ------
        ScanError
            If a frame cannot be read, holds NaN, or is empty.
        """
        out = np.empty(self.shape, np.float32)
        for views, values in self.corrected_chunks():
            out[views] = values
        return out

    def measurements(self, device: str | torch.device = "cpu", rows: slice | None = None) -> torch.Tensor:
        """The line integrals as the measurements y of the physics: (1, 1, rows, views, columns), float32.

        Parameters
        ----------
        device
            Where they are.
        rows
            Which of the detector's rows (after binning), with a start and a stop; None takes all.
        """
        import torch

        views, height, columns = self.shape
        rows = slice(0, height) if rows is None else rows
        out = np.empty((rows.stop - rows.start, views, columns), np.float32)
        for piece, values in self.corrected_chunks():  # straight into place: no second copy of the projections
            out[:, piece] = values[:, rows].transpose(1, 0, 2)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.from_numpy(out)[None, None].to(device)

    def corrected_chunks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Read and correct a piece of the views at a time, so that memory stays bounded.

        Yields
        ------
        Which of the kept views, and their line integrals (piece, rows, columns).
        """
        correct = self.correction()
        for views, raw in self.frames.chunks():
            self._refuse_bad_frames(views, raw)
            yield views, self.correct(raw, correct)

    def correction(self) -> FlatField | None:
        """The dark and flat correction at this binning; None for data whose -log was taken already."""
        if self.recording.values == "line integrals":
            return None
        try:
            return FlatField(self.flat, self.dark, self.recording.geometry.detector_shape, self.options.binning)
        except ScanError as error:
            raise ScanError(f"{self.path}: {error}") from None

    def correct(self, raw: NDArray[Any], correction: FlatField | None) -> NDArray[np.float32]:
        """(views, rows, columns) raw frames to line integrals, with air normalisation where it is on."""
        values = correction.line_integrals(raw) if correction else bin_line_integrals(raw, self.options.binning)
        if self.air_normalisation:
            values -= air_level(values)[:, None, None]
        return values

    def checks(self) -> list[str]:
        """What looks wrong with the data, a sentence each; reads at most 64 of the views."""
        from napari_recon.scans.checks import look

        return look(self)

    def _refuse_bad_frames(self, views: slice, raw: NDArray[Any]) -> None:
        if (fault := self.frame_fault(raw)) is not None:
            number, sentence = fault
            number = int(self.view_indices[views][number])
            raise ScanError(f"Frame {number} of {self.path} {sentence}")

    def frame_fault(self, raw: NDArray[Any]) -> tuple[int, str] | None:
        """The first of these frames that cannot be used, and what is wrong with it; None if all can."""
        if raw.dtype.kind == "f" and not np.isfinite(raw).all():
            frame = int(np.argwhere(~np.isfinite(raw))[0, 0])
            count = int(np.count_nonzero(~np.isfinite(raw[frame])))
            return frame, f"holds {count} NaN or infinite pixels: repair the frame, or leave it and its angle out."
        if self.recording.values != "line integrals" and not (lit := raw.any(axis=(1, 2))).all():
            return int(np.argmin(lit)), (
                "is zero everywhere, as if the detector had not been read: leave the frame and its angle out."
            )
        return None

    # -- for people ----------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, str]:
        """What a person wants to know about the scan, in words and units; reads no frames."""
        geometry, grid = self.geometry, self.default_grid()
        rows, columns = geometry.detector_shape
        pitch_v, pitch_u = geometry.pixel_size
        angles = geometry.angles
        arc = abs(angles[-1] - angles[0])
        step = arc / max(1, geometry.views - 1)
        known = "pixel size" not in self.notes
        beam = "fan" if geometry.is_fan else geometry.kind
        have = len(self.recording.frames)
        lines = {
            "Format": self.format,
            "Beam": f"{beam} beam",
            "Views": f"{geometry.views}" + (f" of {have}" if geometry.views != have else ""),
            "Arc": ("full circle" if abs(arc + step - 360) < step / 2 else f"{arc:.5g}°") + f" in steps of {step:.4g}°",
            "Detector": f"{rows} x {columns} pixels"
            + (f", {self.options.binning} x {self.options.binning} binned" * (self.options.binning > 1)),
            "Pixel size": (f"{pitch_v:.4g} mm" if np.isclose(pitch_v, pitch_u) else f"{pitch_v:.4g} x {pitch_u:.4g} mm")
            + ("" if known else " (not recorded; assumed)"),
        }
        if geometry.kind == "cone":
            lines["Source to axis"] = f"{np.mean(geometry.source_object):.5g} mm"
            lines["Source to detector"] = f"{np.mean(geometry.source_detector):.5g} mm"
            lines["Magnification"] = f"{geometry.magnification:.4g}"
        offset = self.options.axis_offset
        offset = float(np.mean(self.recording.geometry.axis_offset)) if offset is None else offset
        lines["Axis offset"] = f"{round(offset, 3):.4g} pixels"
        lines["Field of view"] = f"{2 * geometry.field_of_view_radius:.4g} mm across"
        lines["Volume"] = f"{' x '.join(map(str, grid.shape))} voxels of {grid.voxel_size:.4g} mm"
        lines["Corrections"] = self._corrections()
        return lines

    def _corrections(self) -> str:
        done = {
            "counts": "dark and flat, -log" if self.recording.darks is not None else "flat (no darks), -log",
            "transmission": "flat-fielded in the file, -log",
            "line integrals": "flat-fielded and -log in the file",
        }[self.recording.values]
        return done + (", air normalisation" if self.air_normalisation else "")

    def __repr__(self) -> str:
        views, rows, columns = self.shape
        return f"Scan({self.name!r}, {self.format}, {views} views of {rows} x {columns}, {self.geometry!r})"


@overload
def open_scan(path: str | Path, options: ScanOptions, **changes: Any) -> Scan: ...
@overload
def open_scan(path: str | Path, options: KSpaceOptions, **changes: Any) -> KSpaceScan: ...
@overload
def open_scan(path: str | Path, options: None = None, **changes: Any) -> Scan | KSpaceScan: ...
def open_scan(
    path: str | Path, options: ScanOptions | KSpaceOptions | None = None, **changes: Any
) -> Scan | KSpaceScan:
    """Open a scan of any format that is understood; no frames or samples are read.

    The file says whether it holds projections or k-space; ``kind`` of what comes back is "x-ray" or "mri".

    Parameters
    ----------
    path
        Projections: a Walnut folder, a folder with ``scan.toml`` (or that file), a DXchange or NXtomo HDF5 file, or a
        Helsinki ``.mat`` file. K-space: a fastMRI or ISMRMRD HDF5 file, a BART ``.cfl``, or a ``.npy`` with a sidecar.
    options
        Corrections and subsampling. Given ones also say what kind of scan is expected.
    **changes
        Single options, as ``views=30`` or ``acceleration=5``.

    Raises
    ------
    ScanError
        If the path is missing, its format is unknown, something in it is wrong, or it is not of the options' kind.
    """
    from napari_recon.scans.formats import read

    path = Path(path).expanduser()
    recording = read(path)
    if isinstance(recording, KSpaceRecording):
        if isinstance(options, ScanOptions):
            raise ScanError(f"{path} holds k-space (MRI), not X-ray projections, which are asked for here.")
        return KSpaceScan(path, recording, changed(options or KSpaceOptions(), changes))
    if isinstance(options, KSpaceOptions):
        raise ScanError(f"{path} holds X-ray projections, not k-space (MRI), which is asked for here.")
    return Scan(path, recording, changed(options or ScanOptions(), changes))
