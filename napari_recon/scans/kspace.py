"""Multi-coil k-space: what was measured by an MRI scanner, and how it becomes measurements of the physics.

K-space is (coils, D, H, W), complex64, with its centre in the middle (index n // 2) of every axis. Transforms between
it and the image are centred and orthonormal, as those of deepinv's ``MultiCoilMRI``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import scipy.fft
import scipy.linalg
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from napari_recon.scans.errors import ScanError
from napari_recon.scans.grid import Grid
from napari_recon.scans.options import changed
from napari_recon.scans.recording import KSpaceRecording
from napari_recon.scans.sampling import calibration_size, sampling_mask

if TYPE_CHECKING:
    import torch

SPATIAL = (-3, -2, -1)

FAINTEST = -6.0
"""Decades below the largest sample at which k-space, as it is shown, ends; sites without a sample stand there too."""


# -- transforms and corrections, each a function of arrays --------------------------------------------------------


def to_kspace(image: NDArray[Any], axes: Sequence[int] = SPATIAL) -> NDArray[Any]:
    """Centred, orthonormal Fourier transform along ``axes``."""
    spectrum = scipy.fft.fftn(np.fft.ifftshift(image, axes), axes=axes, norm="ortho")
    return np.fft.fftshift(spectrum, axes)


def to_image(kspace: NDArray[Any], axes: Sequence[int] = SPATIAL) -> NDArray[Any]:
    """Centred, orthonormal inverse Fourier transform along ``axes``."""
    image = scipy.fft.ifftn(np.fft.ifftshift(kspace, axes), axes=axes, norm="ortho")
    return np.fft.fftshift(image, axes)


def middle(length: int, kept: int) -> slice:
    """The ``kept`` indices in the middle of ``length``, such that length // 2 becomes kept // 2."""
    start = length // 2 - kept // 2
    return slice(start, start + kept)


def remove_oversampling(kspace: NDArray[Any], axis: int, kept: int) -> NDArray[Any]:
    """K-space of the image cropped to its middle ``kept`` samples along ``axis``.

    What an axis is sampled more finely than the field of view needs shows air only; a scanner does it along the
    readout, where it costs no time. White noise stays white and keeps its variance per sample.
    """
    index = [slice(None)] * kspace.ndim
    index[axis] = middle(kspace.shape[axis], kept)
    return to_kspace(to_image(kspace, (axis,))[tuple(index)], (axis,))


def root_sum_of_squares(kspace: NDArray[Any]) -> NDArray[np.float32]:
    """Magnitude image of k-space (coils, D, H, W), missing samples taken as zero: (D, H, W), float32."""
    image = to_image(kspace)
    return np.sqrt((image.real**2 + image.imag**2).sum(axis=0)).astype(np.float32)


def decades(kspace: NDArray[Any], largest: float) -> NDArray[np.float32]:
    """K-space as it is shown: log₁₀ of its magnitude over ``largest``, not below :data:`FAINTEST`; float32."""
    with np.errstate(divide="ignore"):  # of sites without a sample
        return np.maximum(np.log10(np.abs(kspace) / (largest or 1.0)), FAINTEST).astype(np.float32)


def whitening(noise: NDArray[Any]) -> NDArray[np.complex64]:
    """The matrix that makes the coils' noise uncorrelated and of variance one.

    With N the noise (coils, samples) and N Nᴴ / samples = L Lᴴ (Cholesky), it is L⁻¹.

    Parameters
    ----------
    noise
        (coils, samples), complex: samples without signal.

    Returns
    -------
    (coils, coils), complex64, lower triangular.

    Raises
    ------
    ScanError
        If there are fewer samples than coils, or a coil shows no noise of its own.
    """
    coils, samples = noise.shape
    if samples < coils:
        raise ScanError(
            f"The noise scan has {samples} samples for {coils} coils, too few for their covariance: set prewhiten to "
            "false."
        )
    n = noise.astype(np.complex128)
    try:
        factor = np.linalg.cholesky(n @ n.conj().T / samples)
    except np.linalg.LinAlgError:
        factor = np.zeros((coils, coils))
    diagonal = np.abs(np.diag(factor))
    if not (np.isfinite(diagonal).all() and diagonal.min() > 1e-6 * diagonal.max()):
        raise ScanError(
            "The noise scan's covariance is singular (a coil that is dead, or copied): leave that coil out, or set "
            "prewhiten to false."
        )
    return scipy.linalg.solve_triangular(factor, np.eye(coils), lower=True).astype(np.complex64)


def coil_compression(kspace: NDArray[Any], coils: int) -> NDArray[np.complex64]:
    """The matrix that turns coils into fewer virtual ones that hold the most energy.

    Its rows are the leading left singular vectors of the k-space as a matrix (coils, samples), so that they are
    orthonormal, and with all coils kept nothing is lost (Buehrer et al., Magnetic Resonance in Medicine 57, 2007).

    Parameters
    ----------
    kspace
        (coils, ...), complex.
    coils
        How many virtual coils to keep.

    Returns
    -------
    (virtual coils, coils), complex64, the strongest first.
    """
    samples = kspace.reshape(len(kspace), -1)
    gram = (samples @ samples.conj().T).astype(np.complex128)
    _, vectors = np.linalg.eigh(gram)  # ascending
    return np.ascontiguousarray(vectors[:, ::-1][:, :coils].conj().T.astype(np.complex64))


def combine_coils(matrix: NDArray[Any], values: NDArray[Any]) -> NDArray[np.complex64]:
    """Linear combinations of coils: (virtual, coils) times (coils, ...)."""
    return (matrix @ values.reshape(len(values), -1)).reshape(len(matrix), *values.shape[1:]).astype(np.complex64)


# -- the scan -----------------------------------------------------------------------------------------------------


class KSpaceOptions(BaseModel):
    """How k-space is read: slices, noise, coils, and samples left out to see what fewer would have done."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slice: int | None = Field(
        default=None, ge=0, title="Slice", description="One of a stack of slices, counted from 0; none takes them all."
    )
    coils: int | None = Field(
        default=None, ge=1, title="Coils", description="Virtual coils to compress to; none keeps all."
    )
    prewhiten: bool = Field(
        default=True,
        title="Prewhiten",
        description="Make the coils' noise uncorrelated and of variance one, where the file has a noise scan.",
    )
    acceleration: float | None = Field(
        default=None,
        ge=1,
        allow_inf_nan=False,
        title="Acceleration",
        description="Leave samples out, so that one of this many is kept; none keeps all.",
    )
    pattern: Literal["poisson", "gaussian"] = Field(
        default="poisson", title="Pattern", description="Which samples are kept where some are left out."
    )
    calibration: int = Field(
        default=24, ge=1, title="Calibration", description="Edge of the centre that is kept where some are left out."
    )
    seed: int = Field(default=0, ge=0, title="Seed", description="Of the pattern.")


@dataclass(frozen=True, eq=False, repr=False)
class KSpaceScan:
    """Multi-coil Cartesian k-space in 3D. Opening it reads no samples; they are read when first asked for, and kept.

    A stack of slices that were measured each by itself is turned into 3D by an orthonormal transform across the
    slices. That is a unitary change: kz is fully sampled, and every kz has the slices' mask.

    Make one with :func:`open_scan`.

    Attributes
    ----------
    path
        What was opened.
    recording
        What the reader found, before any option.
    options
        The corrections and the undersampling.
    """

    kind: ClassVar[Literal["mri"]] = "mri"

    path: Path
    recording: KSpaceRecording
    options: KSpaceOptions = field(default_factory=KSpaceOptions)

    def __post_init__(self) -> None:
        have, asked = self.recording.shape[0], self.options.coils
        if asked is not None and asked > have:
            raise ScanError(f"{self.path} has {have} coils and {asked} were asked for: ask for {have} at most.")
        if (number := self.options.slice) is not None:
            if not self.recording.slices:
                raise ScanError(f"{self.path} is no stack of slices, of which one could be taken: leave slice out.")
            if number >= (slices := self.recording.shape[1]):
                raise ScanError(f"{self.path} has {slices} slices: ask for slice {slices - 1} at most, counted from 0.")

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
        notes = dict(self.recording.notes)
        if self.recording.voxel_size is None:
            notes["voxel size"] = "not recorded; taken as 1 mm"
        return notes

    @property
    def truth(self) -> Path | None:
        """The true volume where it is known."""
        return self.recording.truth

    @property
    def coils(self) -> int:
        """Coils, or virtual coils, of :attr:`kspace`."""
        return self.options.coils or self.recording.shape[0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(coils, D, H, W) of :attr:`kspace`."""
        matrix = list(self._sites)
        if self.recording.kept is not None and self.recording.readout is not None:
            matrix[self.recording.readout] = self.recording.kept
        d, h, w = matrix
        return self.coils, d, h, w

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        """(z, y, x) in mm; 1 mm where the file does not say, which is among the notes."""
        return self.recording.voxel_size or (1.0, 1.0, 1.0)

    @property
    def grid(self) -> Grid:
        """The grid of the image, which k-space fixes."""
        edge = min(self.voxel_size)
        dz, dy, dx = (v / edge for v in self.voxel_size)
        return Grid(self.shape[1:], edge, aspect=(dz, dy, dx))

    def default_grid(self, shape: tuple[int, int, int] | None = None, voxel_size: float | None = None) -> Grid:
        """:attr:`grid`, for callers that also have X-ray scans.

        Raises
        ------
        ScanError
            If another grid is asked for.
        """
        grid = self.grid
        if (shape or grid.shape) != grid.shape or (voxel_size or grid.voxel_size) != grid.voxel_size:
            raise ScanError(
                f"{self.path} is k-space, which fixes the image at {' x '.join(map(str, grid.shape))} voxels of "
                f"{_millimetres(self.voxel_size)}: leave shape and voxel size out."
            )
        return grid

    def with_options(self, **changes: Any) -> KSpaceScan:
        """The same scan with some options changed; nothing is read.

        Raises
        ------
        ScanError
            If an option is unknown or out of range.
        """
        return KSpaceScan(self.path, self.recording, changed(self.options, changes))

    # -- the data ------------------------------------------------------------------------------------------------

    @cached_property
    def kspace(self) -> NDArray[np.complex64]:
        """(coils, D, H, W): corrected k-space, zero where :attr:`mask` is false.

        Raises
        ------
        ScanError
            If the samples cannot be read, hold NaN, or are all zero.
        """
        kspace = self._measured[0]
        if self.options.acceleration is not None:
            kspace = kspace * self.mask
        matrix = self.coil_matrix
        return kspace if matrix is None else combine_coils(matrix, kspace)

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """(D, H, W): which sites of k-space are sampled. Reads the samples only where the file does not say."""
        measured = self._measured_mask
        if self.options.acceleration is None:
            return measured
        # What is measured slice by slice can only leave out the same for every kz.
        planes = measured[:1] if self.recording.slices else measured
        try:
            pattern = sampling_mask(
                planes.shape,  # type: ignore[arg-type]
                self.options.acceleration,
                self.options.pattern,
                self.options.calibration,
                self.options.seed,
                readout=self.readout,
                measured=planes,
            )
        except ScanError as error:
            raise ScanError(f"{self.path}: {error}") from None
        return measured & pattern

    @property
    def readout(self) -> int | None:
        """The axis of (D, H, W) along which every line is sampled wholly or not at all; None where there is none."""
        axis = self.recording.readout
        if axis is None or self.shape[1 + axis] == 1:
            return None
        mask = self._measured_mask
        return axis if (mask == mask.take([mask.shape[axis] // 2], axis)).all() else None

    @cached_property
    def acceleration(self) -> float:
        """Sites of k-space over those that are sampled."""
        return self.mask.size / max(1, int(np.count_nonzero(self.mask)))

    @cached_property
    def calibration(self) -> tuple[int, int, int]:
        """(D, H, W): the size of the centre that is fully sampled; zeros where not even the middle is."""
        return calibration_size(self.mask)

    @cached_property
    def noise(self) -> NDArray[np.complex64] | None:
        """(coils, samples): the noise scan as measured, or None."""
        if self.recording.read_noise is None:
            return None
        noise = np.asarray(self.recording.read_noise(), np.complex64)
        if noise.ndim != 2 or len(noise) != self.recording.shape[0] or not np.isfinite(noise).all():
            raise ScanError(
                f"{self.path}: the noise scan of shape {noise.shape} does not give finite samples for each of "
                f"{self.recording.shape[0]} coils: correct it, or leave it out."
            )
        return noise

    @cached_property
    def coil_maps(self) -> NDArray[np.complex64] | None:
        """(coils, D, H, W): coil sensitivities that came with the scan, of the same (virtual) coils, or None."""
        if self.recording.read_coil_maps is None:
            return None
        maps = np.asarray(self.recording.read_coil_maps(), np.complex64)
        wanted = (self.recording.shape[0], self.recording.shape[1], *self.shape[2:])
        if maps.shape != wanted or not np.isfinite(maps).all():
            raise ScanError(
                f"{self.path}: its coil maps have the shape {maps.shape}, or hold NaN; they must be finite and of "
                f"{wanted} (coils, D, H, W)."
            )
        maps = maps[:, self._planes]
        matrix = self.coil_matrix
        return maps if matrix is None else combine_coils(matrix, maps)

    @cached_property
    def coil_matrix(self) -> NDArray[np.complex64] | None:
        """(virtual coils, coils): what whitening and compression do to the coils; None where there is neither."""
        matrix = None
        if self.options.prewhiten and self.noise is not None:
            try:
                matrix = whitening(self.noise)
            except ScanError as error:
                raise ScanError(f"{self.path}: {error}") from None
        if self.options.coils is not None:
            kspace = self._measured[0]
            whitened = kspace if matrix is None else combine_coils(matrix, kspace)
            compression = coil_compression(whitened, self.options.coils)
            matrix = compression if matrix is None else compression @ matrix
        return matrix

    def measurements(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """The k-space as the measurements y of deepinv's ``MultiCoilMRI``: (1, 2, coils, D, H, W), float32."""
        import torch

        parts = np.stack([self.kspace.real, self.kspace.imag])
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.from_numpy(parts)[None].to(device)

    @cached_property
    def _measured(self) -> tuple[NDArray[np.complex64], NDArray[np.bool_]]:
        """K-space of all coils without oversampling, in 3D, and its mask, before any option."""
        recording = self.recording
        kspace = np.asarray(recording.read()[:, self._planes], np.complex64)
        if not np.isfinite(kspace).all():
            coil = int(np.argwhere(~np.isfinite(kspace))[0, 0])
            raise ScanError(f"{self.path}: coil {coil} holds NaN or infinite samples: repair the file.")
        if not kspace.any():
            raise ScanError(f"{self.path} holds zeros only: it was never filled, so export it again.")
        sampled = self._declared_mask
        if sampled is None:
            sampled = self._same_for_all_slices((kspace != 0).any(axis=0))
        kspace = kspace * sampled
        if recording.slices and len(kspace[0]) > 1:
            kspace = to_kspace(kspace, (1,))
        if recording.kept is not None and recording.readout is not None:
            kspace = remove_oversampling(kspace, 1 + recording.readout, recording.kept)
        mask = self._without_oversampling(sampled)
        # A partial echo leaks a little into what it left out when the image is cropped.
        return (kspace * mask).astype(np.complex64), mask

    @cached_property
    def _measured_mask(self) -> NDArray[np.bool_]:
        declared = self._declared_mask
        return self._measured[1] if declared is None else self._without_oversampling(declared)

    @cached_property
    def _declared_mask(self) -> NDArray[np.bool_] | None:
        """The mask that the file gives, with oversampling; None where it has to be found from the samples."""
        if self.recording.read_mask is None:
            return None
        given = np.asarray(self.recording.read_mask()) != 0
        shape = self.recording.shape[1:]
        try:
            mask = np.broadcast_to(given, shape)
        except ValueError:
            raise ScanError(
                f"{self.path}: its mask has the shape {given.shape}, which does not fit k-space of {shape} (D, H, W): "
                "correct the mask, or leave it out so that it is found from the samples."
            ) from None
        mask = self._same_for_all_slices(mask[self._planes])
        if not mask.any():
            raise ScanError(f"{self.path}: its mask is false everywhere: correct it, or leave it out.")
        return mask

    @property
    def _planes(self) -> slice:
        """Which slices of the recording are taken."""
        number = self.options.slice
        return slice(None) if number is None else slice(number, number + 1)

    @property
    def _sites(self) -> tuple[int, int, int]:
        """(D, H, W) of what is taken of the recording, with oversampling."""
        slices, h, w = self.recording.shape[1:]
        return slices if self.options.slice is None else 1, h, w

    def _same_for_all_slices(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        if not self.recording.slices:
            return mask
        seen = np.flatnonzero(mask.any(axis=(1, 2)))  # an empty slice is one that shows nothing
        if not len(seen):
            return mask
        for number in seen:
            if (mask[number] != mask[seen[0]]).any():
                raise ScanError(
                    f"{self.path}: slice {number} is sampled at other places than slice {seen[0]}: open one of them, "
                    f"with slice = {number}."
                )
        return np.broadcast_to(mask[seen[0]], mask.shape)

    def _without_oversampling(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The mask at the frequencies that are left: every second one, where half of the readout is kept."""
        axis, kept = self.recording.readout, self.recording.kept
        if kept is None or axis is None:
            return np.array(mask)
        n = mask.shape[axis]
        index = n // 2 + np.floor((np.arange(kept) - kept // 2) * (n / kept) + 0.5).astype(int)
        return mask.take(np.clip(index, 0, n - 1), axis)

    # -- for people ----------------------------------------------------------------------------------------------

    def checks(self) -> list[str]:
        """What looks wrong with the data, a sentence each; reads the samples."""
        try:
            kspace, mask = self._measured
            kept = self.mask
            _ = self.coil_matrix
        except ScanError as error:
            return [str(error)]
        said = []
        energy = np.abs(kspace).max(axis=0)
        peak = np.unravel_index(int(np.argmax(energy)), energy.shape)
        away = [abs(int(p) - n // 2) for p, n in zip(peak, energy.shape, strict=True)]
        if any(a > max(2, n / 8) for a, n in zip(away, energy.shape, strict=True)):
            said.append(
                f"The strongest sample lies at {tuple(map(int, peak))}, not near the middle of {energy.shape}: k-space "
                "may be stored with its centre at the corner (shift it), or its axes in another order."
            )
        size = self.calibration
        if self.coil_maps is None and any(c < min(n, 12) for c, n in zip(size, kept.shape, strict=True)):
            said.append(
                f"The fully sampled centre is {_times(size)}: coil maps want 12 or more along every axis, so give "
                "maps with the scan if there are any."
            )
        strength = np.sqrt((np.abs(kspace) ** 2).sum(axis=(1, 2, 3)))
        dead = np.flatnonzero(strength < 1e-3 * np.median(strength)).tolist()
        if dead:
            said.append(f"No signal in coil {', '.join(map(str, dead))}: it takes no part.")
        if not mask.all() and self.options.acceleration is None and self.acceleration > 2 * len(kspace):
            said.append(
                f"{self.acceleration:.3g}-fold undersampling is far for {len(kspace)} coils: expect a result that the "
                "prior decides."
            )
        return said

    def summary(self) -> dict[str, str]:
        """What a person wants to know about the scan, in words and units; reads samples only to find a mask."""
        recording, have = self.recording, self.recording.shape[0]
        matrix = self.shape[1:]
        encoding = "one slice" if matrix[0] == 1 else f"{matrix[0]} slices" if recording.slices else "3D"
        if self.options.slice is not None:
            encoding = f"slice {self.options.slice} of {recording.shape[1]}"
        sampled, sites = int(np.count_nonzero(self.mask)), self.mask.size
        lines = {
            "Format": self.format,
            "Encoding": f"Cartesian, {encoding}",
            "Coils": f"{have}" if self.coils == have else f"{self.coils} virtual of {have}",
            "Matrix": _times(matrix),
            "Acceleration": "none (fully sampled)"
            if sampled == sites
            else f"{self.acceleration:.3g} ({sampled} of {sites} sites)",
            "Calibration": f"{_times(self.calibration)} fully sampled" if any(self.calibration) else "none",
            "Voxel size": _millimetres(self.voxel_size)
            + ("" if recording.voxel_size is not None else " (not recorded; assumed)"),
            "Field of view": _millimetres(self.grid.extent),
            "Corrections": self._corrections(),
            "Coil maps": "not in the file" if recording.read_coil_maps is None else "with the scan",
        }
        return lines

    def _corrections(self) -> str:
        recording, done = self.recording, []
        if recording.kept is not None and recording.readout is not None:
            n = recording.shape[1 + recording.readout]
            if n != recording.kept:
                done.append(f"readout oversampling removed ({n} to {recording.kept} samples)")
        if recording.slices and self._sites[0] > 1:
            done.append("transformed across the slices")
        if recording.read_noise is not None:
            done.append("prewhitened" if self.options.prewhiten else "not prewhitened")
        if self.options.acceleration is not None:
            done.append(f"undersampled ({self.options.pattern})")
        return ", ".join(done) or "none"

    def __repr__(self) -> str:
        coils, d, h, w = self.shape
        return f"KSpaceScan({self.name!r}, {self.format}, {coils} coils of {d} x {h} x {w})"


def _times(numbers: Sequence[int]) -> str:
    return " x ".join(map(str, numbers))


def _millimetres(lengths: Sequence[float]) -> str:
    if math.isclose(min(lengths), max(lengths), rel_tol=1e-4):
        return f"{lengths[0]:.4g} mm"
    return " x ".join(f"{v:.4g}" for v in lengths) + " mm"
