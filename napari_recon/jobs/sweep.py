"""The run of a sweep: one parameter over some values, on coarser voxels or some slices, every result kept.

The stream is, for each value, that of a reconstruction of which only the result is told of, a volume by the name of
:func:`~napari_recon.jobs.job.sweep_name`, and a ``Progress`` of "sweep" with the value's figures. The figures at the
end: ``best``, the value with the highest PSNR, where there is a truth or reference. The provenance holds the ``sweep``:
the ``parameter``, and ``rows``, a row a value with ``value``, ``residual``, ``seconds``, and ``psnr``, ``ssim`` and
``nrmse`` where there is something to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from napari_recon.jobs.job import SweepJob, sweep_name
from napari_recon.jobs.memory import peak_memory, release_memory
from napari_recon.jobs.messages import Finished, Message, Progress
from napari_recon.jobs.parts import run_part
from napari_recon.jobs.stages import Prepared, Run
from napari_recon.scans.errors import ScanError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TOLD = ("residual", "psnr", "ssim", "nrmse", "seconds")
"""What a row tells beside its value."""


class SweepRun(Run[SweepJob]):
    """The run of a sweep over one parameter."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        job, control = self.job, self.control
        scan = job.open_scan()
        if job.parameter == "views":
            scan.with_options(views=int(max(job.values)))  # more than there are is said now, not after the others
        whole = job.coarse_grid(scan)
        d, h, w = whole.shape
        self.grid = whole.crop((slice(*(job.coarse_slices(whole) or (0, d))), slice(0, h), slice(0, w)))
        reference = self._reference()
        kept = Prepared()  # what is kept for the reconstruction's own grid stays as it is
        begin, told = control.clock(), set[str]()
        rows: list[dict[str, float]] = []
        for number, value in enumerate(job.values, 1):
            name = sweep_name(job.parameter, value)
            ended = yield from run_part(job.part(value, whole), control, name, kept, told)
            if not ended.complete:
                self.complete = False
                break
            figures = ended.figures | {"seconds": ended.seconds}
            if reference is not None:
                figures |= self._compared(name, reference)
            rows.append({"value": value, **{key: figures[key] for key in _TOLD if key in figures}})
            seconds = control.clock() - begin
            remaining = seconds / number * (len(job.values) - number)
            yield Progress("sweep", number, len(job.values), (), None, seconds, remaining, rows[-1])
            if control.finishing:
                self.complete = number == len(job.values)
                break
        kept.clear()
        release_memory()
        if not rows:
            raise ScanError("The sweep ended before its first value did: let it go on a little longer.")
        judged = [row for row in rows if math.isfinite(row.get("psnr", math.nan))]
        if judged:
            self.figures["best"] = max(judged, key=lambda row: row["psnr"])["value"]
        self.used["sweep"] = {"parameter": job.parameter, "rows": rows}
        made_by, seconds = self.made_by()
        yield Finished(self.figures, seconds, peak_memory(), None, self.complete, made_by)

    def _reference(self) -> NDArray[np.float32] | None:
        """The reference on the sweep's grid, where the job names one; a scan's own truth the parts compare with."""
        if self.job.reference is None:
            return None
        from napari_recon.jobs.volumes import read_volume
        from napari_recon.measures.comparison import on_grid

        return on_grid(read_volume(self.job.reference), self.grid)

    def _compared(self, name: str, reference: NDArray[np.float32]) -> dict[str, float]:
        """A result's distance to the reference, inside the field of view."""
        from napari_recon.measures.comparison import compare_volumes, field_of_view

        return compare_volumes(self.control.volumes[name], reference, field_of_view(self.grid))
