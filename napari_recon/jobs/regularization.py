"""The run that suggests how much to regularise: a sweep over τ on a part of the scan, from the strongest down.

The stream is: ``Stage("reading")``, ``Stage("fdk")``, ``Stage("comparing")``, a ``Progress`` a value of τ; no volumes.
The figures at the end are ``regularization``, the suggestion; ``residual``, the rms with it, and ``noise``, in the
projections' unit; and ``binning``. The provenance holds the ``suggestion``: its ``sentence`` for a person, and the
``sweep``, a row a value with τ, residual and the total variation, relative to the first row's.

The part is a slab in the middle, where the beam lets it be had without the rest, binned until a sweep takes seconds.
The sweep is one run of PADMM, whose τ is changed as it goes, so that every value begins at the last one's result. The
discrepancy principle (Morozov 1966) takes the largest τ whose residual is down at the data's error. That is the noise,
or where more than that remains whatever τ is, as of structure finer than a voxel, 1.5 times what remains. In trials on
eleven parts of simulated scans, with 10 to 60 views, of which no command is kept, that was within 1 dB of the best τ,
and but for one within 0.3 dB; the bend of the L-curve came out several times too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from napari_recon.jobs.job import RegularizationJob
from napari_recon.jobs.memory import peak_memory
from napari_recon.jobs.messages import Finished, Message, Progress, Stage
from napari_recon.jobs.quality import noise_level
from napari_recon.jobs.stages import Prepared, Run, advance
from napari_recon.scans import Geometry, Grid
from napari_recon.scans.errors import ScanError

VALUES = tuple(10.0 ** (-2 - 0.25 * k) for k in range(11))
"""The values of τ that are compared."""

ITERATIONS = 6
"""Of PADMM for each of them."""

LARGEST = 48**3 * 120
"""Voxels times views that are compared on, at most: a pair of A and Aᵀ takes about a tenth of a second on a CPU."""

UNEXPLAINED = 1.5
"""How many times what no τ explains the residual may be."""

SLAB = 12
"""Slices that are enough, where the beam lets some be had without the others."""


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
    """

    regularization: float
    residual: float
    variation: float


class RegularizationRun(Run[RegularizationJob]):
    """The run of a sweep over τ."""

    binning = 1
    """By how much detector and voxels are coarser than those of the reconstruction."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        yield from self._read_part()
        noise = noise_level(self.y[0, 0].permute(1, 0, 2).cpu().numpy())
        yield from self.fdk(shown=None, to_the_end=True)
        yield Stage("comparing", f"on {' × '.join(map(str, self.grid.shape))} voxels")
        rows: list[Row] = []
        for message in self._sweep(rows, noise):
            yield message
            if self.control.finishing:
                self.complete = False
                break
        if len(rows) < 3:
            raise ScanError("The sweep over τ ended before it could tell anything: let it go on a little longer.")
        chosen, sentence = choose(rows, noise)
        self.figures |= {"regularization": chosen, "residual": _residual_at(rows, chosen), "noise": noise}
        self.figures["binning"] = float(self.binning)
        sweep = [
            {
                "regularization": row.regularization,
                "residual": row.residual,
                "variation": row.variation / rows[0].variation,
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

    def _sweep(self, rows: list[Row], noise: float) -> Iterator[Message]:
        """Lengthen ``rows``, a value of τ after the other, until both rules have found theirs."""
        from napari_recon.reconstruction.padmm import PADMM

        control, begin = self.control, self.control.clock()
        method = PADMM(iterations=ITERATIONS * len(VALUES), regularization=VALUES[0])
        done = 0

        def settings() -> dict[str, float]:
            return {"regularization": VALUES[min(done // ITERATIONS, len(VALUES) - 1)]}

        size, count = float(self.y.norm()), self.y.numel()
        updates = method.stream(self.y, self.physics, init=self.start, settings=settings)
        while (update := advance(updates)) is not None:
            control.checkpoint()
            done = update.step
            if done == 0 or done % ITERATIONS:
                continue
            regularization = VALUES[done // ITERATIONS - 1]
            residual = update.figures["residual"] * size
            variation = (update.figures["objective"] - 0.5 * residual**2) / regularization
            rows.append(Row(regularization, residual / math.sqrt(count), max(variation, 1e-30)))
            step, total, seconds = done // ITERATIONS, len(VALUES), control.clock() - begin
            figures = {"regularization": regularization, "residual": rows[-1].residual}
            yield Progress("sweep", step, total, (), None, seconds, seconds / step * (total - step), figures)
            if UNEXPLAINED * rows[-1].residual < noise:  # which decides, then
                return


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
    times = f", here {_residual_at(rows, tau) / noise:.1f} times the noise" if noise > 0 else ""
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


def _residual_at(rows: Sequence[Row], regularization: float) -> float:
    """The residual with any τ between those of the rows."""
    at = np.interp(-math.log(regularization), [-math.log(r.regularization) for r in rows], [r.residual for r in rows])
    return float(at)
