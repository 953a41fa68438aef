"""The run that suggests how much to regularise: a sweep over τ on a part of the scan, from the strongest down.

The stream is: ``Stage("reading")``, ``Stage("fdk")`` of X-rays, ``Stage("comparing")``, a ``Progress`` a value of τ; no
volumes. The figures at the end are ``regularization``, the suggestion; ``residual``, the rms with it, and ``noise``, in
the unit of what was measured; of X-rays ``binning``, of k-space ``held_out``, as below. The provenance holds the
``suggestion``: its ``sentence`` for a person, and the ``sweep``, a row a value with τ, residual and the total
variation, relative to the first row's, and ``held_out``.

Of projections the part is a slab in the middle, where the beam lets it be had without the rest, binned until a sweep
takes seconds. The sweep is one run of PADMM, whose τ is changed as it goes, so that every value begins at the last
one's result. The discrepancy principle (Morozov 1966) takes the largest τ whose residual is down at the data's error.
That is the noise, or where more than that remains whatever τ is, as of structure finer than a voxel, 1.5 times what
remains. In trials on eleven parts of simulated scans, with 10 to 60 views, of which no command is kept, that was within
1 dB of the best τ, and but for one within 0.3 dB; the bend of the L-curve came out several times too small.

Of k-space the part are slices in the middle, along an axis that is sampled throughout, such as the readout: there
slices are problems of their own. A tenth of the samples outside the centre is held out, and the τ is taken whose volume
predicts those best (cross-validation): noise adds the same for every τ, and need not be known. The discrepancy
principle makes volumes too smooth where coils see every voxel more than once, since the best volume's residual is below
the noise: in trials on heads and blobs of 48³, 2 to 10 times undersampled, with a signal 10 to 100 times the noise, of
which no command is kept, it was 0.4 to 2.5 dB behind the best τ though it was told the true noise, cross-validation
0.05 dB, and once 0.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.job import RegularizationJob
from napari_recon.jobs.memory import peak_memory
from napari_recon.jobs.messages import Finished, Message, Progress, Stage
from napari_recon.jobs.quality import kspace_noise, noise_level
from napari_recon.jobs.stages import Prepared, Run, advance
from napari_recon.scans import Geometry, Grid
from napari_recon.scans.errors import ScanError
from napari_recon.scans.kspace import middle, remove_oversampling

if TYPE_CHECKING:  # torch is imported where a job runs, not where jobs are made
    import torch

    from napari_recon.physics.mri import MultiCoilMRI

VALUES = tuple(10.0 ** (-2 - 0.25 * k) for k in range(11))
"""The values of τ that are compared."""

MRI_VALUES = tuple(10.0 ** (-1.5 - 0.25 * k) for k in range(11))
"""The same of k-space."""

ITERATIONS = 12
"""Of PADMM for each of them."""

LARGEST = 48**3 * 120
"""Voxels times views that are compared on, at most: a pair of A and Aᵀ takes about a tenth of a second on a CPU."""

LARGEST_MRI = 2**21
"""Voxels times coils that are compared on, at most, where slices of k-space can be had alone."""

FEWEST = 4
"""Slices of k-space that are taken at least: total variation sees neighbours."""

HELD_OUT = 0.1
"""The share of the samples of k-space that is held out."""

UNEXPLAINED = 1.5
"""How many times what no τ explains the residual may be."""

SLAB = 12
"""Slices that are enough, where the beam lets some be had without the others."""


@dataclass(frozen=True)
class HeldOut:
    """Samples of k-space that are held out.

    Attributes
    ----------
    physics
        What makes them of a volume.
    y
        (1, 2, coils, D, H, W), zero elsewhere.
    count
        How many complex samples they are.
    """

    physics: MultiCoilMRI
    y: torch.Tensor
    count: int


@dataclass(frozen=True)
class Row:
    """A value of the sweep.

    Attributes
    ----------
    regularization
        τ.
    residual
        Its rms.
    variation
        The total variation, in any unit.
    held_out
        The rms of what differs in the samples that were held out; NaN where there are none.
    """

    regularization: float
    residual: float
    variation: float
    held_out: float = math.nan


class RegularizationRun(Run[RegularizationJob]):
    """The run of a sweep over τ."""

    binning = 1
    """By how much detector and voxels are coarser than those of the reconstruction."""
    held_out: HeldOut | None = None
    """Of k-space, what the sweep does not see."""
    seen = 0
    """How many complex samples it does see there."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        rows: list[Row] = []
        mri = self.job.open_scan().kind == "mri"
        if mri:
            yield from self._read_slices()
            assert self.scan.kind == "mri"
            noise = float(np.sqrt(np.mean(kspace_noise(self.scan) ** 2)))
        else:
            yield from self._read_part()
            noise = noise_level(self.y[0, 0].permute(1, 0, 2).cpu().numpy())
            yield from self.fdk(shown=None, to_the_end=True)
        yield Stage("comparing", f"on {' × '.join(map(str, self.grid.shape))} voxels")
        for message in self._sweep(rows, noise):
            yield message
            if self.control.finishing:
                self.complete = False
                break
        if len(rows) < 3:
            raise ScanError("The sweep over τ ended before it could tell anything: let it go on a little longer.")
        chosen, sentence = choose_by_samples(rows) if mri else choose(rows, noise)
        self.figures |= {"regularization": chosen, "residual": _at(rows, chosen, "residual"), "noise": noise}
        self.figures |= {"held_out": _at(rows, chosen, "held_out")} if mri else {"binning": float(self.binning)}
        sweep = [
            {
                "regularization": row.regularization,
                "residual": row.residual,
                "variation": row.variation / rows[0].variation,
                **({"held_out": row.held_out} if mri else {}),
            }
            for row in rows
        ]
        self.used["suggestion"] = {"sentence": sentence, "sweep": sweep}
        made_by, seconds = self.made_by()
        yield Finished(self.figures, seconds, peak_memory(), None, self.complete, made_by)

    def _read_part(self) -> Iterator[Message]:
        """Read so much of the scan, and so coarsely, that the sweep takes seconds.

        What is kept for the reconstruction's own grid stays as it is.
        """
        import torch

        from napari_recon.physics import XRayTransform
        from napari_recon.physics.devices import resolve_device

        job = self.job
        yield Stage("reading", job.scan.name)
        self.prepared = Prepared()
        device = resolve_device(job.device)
        self.scan = job.open_scan()
        scan = self.projections()
        asked = scan.options.binning
        whole = scan.default_grid(job.shape, job.voxel_size)
        self.binning = 1
        while True:
            grid = whole
            if self.binning > 1:
                d, h, w = (max(1, math.ceil(n / self.binning)) for n in whole.shape)
                grid = Grid((d, h, w), whole.voxel_size * self.binning, whole.center)
                scan = scan.with_options(binning=asked * self.binning)
            rows, geometry = slice(0, scan.geometry.detector_shape[0]), scan.geometry
            slab = middle_slab(geometry, grid)
            if slab is not None:
                rows, geometry, grid = slab
            if grid.voxels * geometry.views <= LARGEST or max(grid.shape) < 32:
                break
            self.binning += 1
        self.scan, self.grid = scan, grid
        self.physics = XRayTransform(geometry, grid, device)
        y = np.empty((rows.stop - rows.start, geometry.views, geometry.detector_shape[1]), np.float32)
        for views, values in scan.corrected_chunks():
            self.control.checkpoint()
            y[:, views] = values[:, rows].transpose(1, 0, 2)
        self.y = torch.from_numpy(y)[None, None].to(device)

    def _read_slices(self) -> Iterator[Message]:
        """Read k-space of some slices, if they can be had alone, and hold some of it out.

        What is kept for the reconstruction, coil maps too, is used and left for it.
        """
        import torch

        from napari_recon.physics.mri import MultiCoilMRI
        from napari_recon.reconstruction.sense import ZeroFilled

        yield from self.read()
        scan, physics, device = self.scan, self.physics, self.y.device
        assert scan.kind == "mri"
        kspace, mask = scan.kspace, scan.mask
        throughout = [axis for axis, n in enumerate(mask.shape) if n > 1 and (mask == mask.take([0], axis)).all()]
        z, y, x = box = list(self.grid.full_box)
        if throughout:
            axis = throughout[0]
            length = mask.shape[axis]
            slices = min(length, max(FEWEST, LARGEST_MRI * length // kspace.size))
            box[axis] = middle(length, slices)
            z, y, x = box
            kspace = remove_oversampling(kspace, 1 + axis, slices)
            mask = mask.take(range(slices), axis)
        held = held_out_sites(mask, scan.calibration, throughout, self.job.seed)
        self.control.checkpoint()
        maps = physics.coil_maps[0, :, z, y, x]
        self.grid = self.grid.crop((z, y, x))
        self.physics = MultiCoilMRI(mask & ~held, maps, self.grid, device)
        samples = torch.from_numpy(np.stack([kspace.real, kspace.imag]))[None].to(device)
        others = torch.from_numpy(held).to(device)
        self.held_out = HeldOut(
            MultiCoilMRI(held, maps, self.grid, device), samples * others, len(kspace) * int(held.sum())
        )
        self.y, self.seen = samples * ~others, len(kspace) * int((mask & ~held).sum())
        self.start = ZeroFilled()(self.y, self.physics)

    def _sweep(self, rows: list[Row], noise: float) -> Iterator[Message]:
        """Lengthen ``rows``, a value of τ after the other, until the rule has found its own."""
        from napari_recon.reconstruction.padmm import PADMM

        control, begin = self.control, self.control.clock()
        values = VALUES if self.held_out is None else MRI_VALUES
        method = PADMM(iterations=ITERATIONS * len(values), regularization=values[0])
        done = 0

        def settings() -> dict[str, float]:
            return {"regularization": values[min(done // ITERATIONS, len(values) - 1)]}

        size, count = float(self.y.norm()), self.seen or self.y.numel()
        updates = method.stream(self.y, self.physics, init=self.start, settings=settings)
        while (update := advance(updates)) is not None:
            control.checkpoint()
            done = update.step
            if done == 0 or done % ITERATIONS:
                continue
            regularization = values[done // ITERATIONS - 1]
            residual = update.figures["residual"] * size
            variation = (update.figures["objective"] - 0.5 * residual**2) / regularization
            error = self._error_held_out(update.values)
            rows.append(Row(regularization, residual / math.sqrt(count), max(variation, 1e-30), error))
            step, total, seconds = done // ITERATIONS, len(values), control.clock() - begin
            figures = {"regularization": regularization, "residual": rows[-1].residual}
            yield Progress("sweep", step, total, (), None, seconds, seconds / step * (total - step), figures)
            if self.held_out is None and UNEXPLAINED * rows[-1].residual < noise:  # which decides, then
                return
            if len(rows) > 2 and rows[-1].held_out > rows[-2].held_out > rows[-3].held_out:
                return

    def _error_held_out(self, x: torch.Tensor) -> float:
        """The rms of what a volume says other of the samples that were held out; NaN where there are none."""
        held = self.held_out
        return math.nan if held is None else float((held.physics.A(x) - held.y).norm()) / math.sqrt(held.count)


def held_out_sites(
    mask: NDArray[np.bool_], calibration: Sequence[int], throughout: Sequence[int], seed: int
) -> NDArray[np.bool_]:
    """Which of the sampled sites of k-space are held out: those that the scan could as well have left out.

    Parameters
    ----------
    mask
        (D, H, W), the sampled ones.
    calibration
        Extent (z, y, x) of the centre in which all were: it stays. Where there is nothing beside it, its middle half.
    throughout
        Axes along which all sites are sampled, or none: whole lines are held out.
    seed
        Of the choice.

    Returns
    -------
    (D, H, W), a tenth of the others, or one line at least.

    Raises
    ------
    ScanError
        If there is none that could be held out.
    """
    lengths = mask.shape
    lines = throughout if len(throughout) < sum(n > 1 for n in lengths) else throughout[:1]
    across: NDArray[np.bool_] = np.asarray(mask.all(axis=tuple(lines), keepdims=True))
    for centre in (calibration, [n // 2 for n in lengths]):
        free = across.copy()
        free[tuple(middle(n, min(c, n)) for n, c in zip(across.shape, centre, strict=True))] = False
        places = np.flatnonzero(free)
        if len(places):
            break
    else:
        raise ScanError("Too few samples of k-space for some to be held out, so τ cannot be suggested: choose one.")
    few = np.random.default_rng(seed).choice(places, max(1, round(HELD_OUT * len(places))), replace=False)
    held = np.zeros(across.shape, bool)
    held.flat[few] = True
    return mask & held


def middle_slab(geometry: Geometry, grid: Grid, slices: int = SLAB) -> tuple[slice, Geometry, Grid] | None:
    """Detector rows that see nothing but a slab in the middle of a volume, with their geometry and the slab's grid.

    Parameters
    ----------
    geometry, grid
        Of the scan and of the volume.
    slices
        About so many slices.

    Returns
    -------
    None where rays of a row leave its plane by more than they do in a circular scan: on a helix, tilted, or where
    there are no fewer slices to be had.
    """
    rows, columns = geometry.detector_shape
    height = float(np.median(geometry.v[:, 2]))  # mm along z that a row is from the next
    voxel, (depth, _, _) = grid.voxel_size, grid.shape
    if rows < 2 or depth <= 2 * slices or height == 0:
        return None
    if geometry.kind == "cone":
        middle = geometry.source[:, 2]
        reach = 1 + geometry.field_of_view_radius / float(np.min(geometry.source_object))
        shrink = reach / geometry.magnification
        level = bool(np.ptp(middle) <= voxel)
    else:
        middle = np.full(geometry.views, grid.center[2])
        shrink = 1.0
        level = bool(np.abs(geometry.source[:, 2]).max() < 1e-3 * np.linalg.norm(geometry.source[0]))
    row = (middle - geometry.detector_center[:, 2]) / height + (rows - 1) / 2  # the one in the plane of the middle
    level &= bool(np.ptp(row) <= 2 and np.abs(geometry.u[:, 2]).max() * columns <= 4 * abs(height))
    count = math.floor((slices - 2) * voxel / (abs(height) * shrink))  # two slices are for what is not quite level
    first = round(float(np.median(row)) - (count - 1) / 2)
    if not level or count < 3 or first < 0 or first + count > rows:
        return None
    vectors = geometry.vectors.copy()
    vectors[:, 3:6] += geometry.v * (first + (count - 1) / 2 - (rows - 1) / 2)
    x, y, _ = grid.center
    slab = Grid((slices, *grid.shape[1:]), voxel, (x, y, float(np.median(middle))))
    return slice(first, first + count), Geometry(vectors, (count, columns), geometry.kind), slab


def choose(rows: Sequence[Row], noise: float) -> tuple[float, str]:
    """The τ that a sweep suggests, to two digits, and why in a sentence.

    Parameters
    ----------
    rows
        From the largest τ to the smallest.
    noise
        Its standard deviation; 0 or NaN where it is not known.
    """
    least = rows[-1].residual
    by_noise = noise >= UNEXPLAINED * least
    tau = _largest(rows, noise if by_noise else UNEXPLAINED * least)
    tau = float(f"{tau:.2g}")
    if by_noise:
        return tau, (
            f"τ = {tau:g} is the largest with which the residual of a part of the scan is down at the noise "
            "(discrepancy principle): with less, the volume would fit the noise too."
        )
    times = f", here {_at(rows, tau, 'residual') / noise:.1f} times the noise" if noise > 0 else ""
    return tau, (
        f"τ = {tau:g} is the largest with which the residual of a part of the scan is down at {UNEXPLAINED} times what "
        f"no τ explains (discrepancy principle{times}): with less, the volume becomes rougher for little."
    )


def _largest(rows: Sequence[Row], residual: float) -> float:
    """The largest τ with no more than a residual, between those of the rows."""
    if rows[0].residual <= residual:
        return rows[0].regularization
    for before, after in pairwise(rows):
        if before.residual > residual >= after.residual:
            share = math.log(before.residual / residual) / math.log(before.residual / after.residual)
            return before.regularization * (after.regularization / before.regularization) ** share
    return rows[-1].regularization


def choose_by_samples(rows: Sequence[Row]) -> tuple[float, str]:
    """The τ that says best what samples are that were held out, to two digits, and why in a sentence.

    Parameters
    ----------
    rows
        From the largest τ to the smallest.
    """
    errors = [row.held_out for row in rows]
    best = int(np.argmin(errors))
    place = float(best)
    if 0 < best < len(rows) - 1:  # the vertex of the parabola through the three lowest
        before, least, after = errors[best - 1 : best + 2]
        bend = before - 2 * least + after
        place += 0.5 * (before - after) / bend if bend > 0 else 0.0
    logarithms = [math.log(row.regularization) for row in rows]
    tau = float(f"{math.exp(np.interp(place, range(len(rows)), logarithms)):.2g}")
    end = " of those compared" if best in (0, len(rows) - 1) else ""
    return tau, (
        f"τ = {tau:g} predicts best{end} the samples of k-space that were held out (cross-validation): with more, "
        "detail is lost, with less, noise stays."
    )


def _at(rows: Sequence[Row], regularization: float, figure: Literal["residual", "held_out"]) -> float:
    """A figure with any τ between those of the rows."""
    places = [-math.log(row.regularization) for row in rows]
    return float(np.interp(-math.log(regularization), places, [getattr(row, figure) for row in rows]))
