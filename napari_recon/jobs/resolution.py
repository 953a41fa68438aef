"""The run that tells what a method resolves, without a truth: both halves of the views, reconstructed and correlated.

The stream is that of a reconstruction from the even views, of which only the result is told of, "first half"; then that
from the odd views, "second half"; then ``Stage("measuring")``. The figures at the end: ``resolution_half_bit`` and
``resolution_one_seventh`` in mm, NaN where the curve crosses no threshold; ``noise``, the standard deviation of half
the two volumes' difference inside the field of view, which is that of their mean; ``noise_frequency``, its mean in
1/mm; ``residual_first`` and ``residual_second``. The provenance holds the ``resolution``: its ``sentence`` for a
person, and the curves of :class:`~napari_recon.measures.resolution.ShellCorrelation`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from napari_recon.jobs.job import HALVES, PADMMParameters, ResolutionJob
from napari_recon.jobs.memory import peak_memory, release_memory
from napari_recon.jobs.messages import Finished, Message, Notice, Stage
from napari_recon.jobs.parts import run_part
from napari_recon.jobs.stages import Run
from napari_recon.measures.comparison import field_of_view
from napari_recon.measures.resolution import fourier_shell_correlation, noise_summary
from napari_recon.scans.errors import ScanError


class ResolutionRun(Run[ResolutionJob]):
    """The run of both halves and their correlation."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        job, control = self.job, self.control
        # Neither half has use for what is kept of the whole scan, and the memory is for them.
        self.prepared.clear()
        scan = job.open_scan()
        grid = scan.default_grid(job.shape, job.voxel_size)
        if isinstance(job.parameters, PADMMParameters) and job.parameters.starts_from_file:
            yield Notice(
                "Both halves begin at the same volume, and what it holds comes out alike: for a resolution that the "
                "data show, let them begin elsewhere."
            )
        told: set[str] = set()
        for half, name in HALVES.items():
            ended = yield from run_part(job.half(half, grid), control, name, told=told)
            release_memory()
            if not ended.complete:
                raise ScanError("The resolution needs both halves to the end: let them go on, or ask for fewer steps.")
            self.figures[f"residual_{name.split()[0]}"] = ended.figures.get("residual", math.nan)
        yield Stage("measuring", "Fourier shell correlation")
        control.checkpoint()
        first, second = (control.volumes[name] for name in HALVES.values())
        inside = field_of_view(grid, scan.geometry.field_of_view_radius)
        shells = fourier_shell_correlation(first, second, grid.scale, inside)
        self.figures |= {
            "resolution_half_bit": shells.resolution_half_bit,
            "resolution_one_seventh": shells.resolution_one_seventh,
        }
        control.checkpoint()
        try:
            noise, frequency = noise_summary((first - second) / np.float32(2), grid.scale, inside)
            self.figures |= {"noise": noise, "noise_frequency": frequency}
        except ScanError:  # no square fits into so small a volume: one figure less
            pass
        self.used["resolution"] = {
            "sentence": shells.sentence,
            "frequency": shells.frequency.tolist(),
            "correlation": shells.correlation.tolist(),
            "half_bit": shells.half_bit.tolist(),
            "one_seventh": shells.one_seventh.tolist(),
        }
        made_by, seconds = self.made_by()
        yield Finished(self.figures, seconds, peak_memory(), None, self.complete, made_by)
