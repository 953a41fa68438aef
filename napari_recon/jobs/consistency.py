"""The run that holds a volume against the data.

The stream is: ``Stage("reading")``, ``Stage("reading the volume")`` where it is a file, ``Stage("projecting")``,
``VolumeReady`` of "measured", "projected" and "residual" (projected − measured), each (views, rows, columns), a
``Progress`` of "projected" a group of views. The figures at the end: ``residual`` ‖Ax − y‖/‖y‖; ``noise``, the standard
deviation of the projections' noise; ``residual_to_noise``, the residual's rms over it, 1 where the volume explains all
but the noise; ``worst_view``, the largest such ratio of a view, and ``worst_view_index`` where.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.job import DataConsistencyJob
from napari_recon.jobs.memory import peak_memory
from napari_recon.jobs.messages import Finished, Message, Progress, Stage, VolumeReady
from napari_recon.jobs.quality import noise_level, on_grid
from napari_recon.jobs.stages import Run
from napari_recon.jobs.volumes import read_volume
from napari_recon.scans.errors import ScanError


class DataConsistencyRun(Run[DataConsistencyJob]):
    """The run of a volume's projection beside the measured one."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        yield from self.read()
        self.control.checkpoint()
        volume = yield from self._volume()
        yield from self._project(volume)
        made_by, seconds = self.made_by()
        yield Finished(self.figures, seconds, peak_memory(), None, self.complete, made_by)

    def check(self) -> None:
        """A file must be there."""
        path = self.job.volume
        if path is not None and not path.exists():
            raise ScanError(f"There is no volume {path}: check the path.")

    def _volume(self) -> Generator[Message, None, NDArray[np.float32]]:
        path = self.job.volume
        self.projections()
        if path is None:
            if "last" not in self.prepared.things:
                raise ScanError("There is no last result on this grid to check: run once, or give a volume's file.")
            volume: NDArray[np.float32] = self.prepared.things["last"][0, 0].numpy()
        else:
            yield Stage("reading the volume", path.name)
            volume = on_grid(read_volume(path), self.grid)
        if not np.isfinite(volume).all():
            raise ScanError(f"The volume {path or 'of the last result'} holds NaN or infinity: choose another.")
        return volume

    def _project(self, volume: NDArray[np.float32]) -> Iterator[Message]:
        """Project some views at a time, which a person can look at while the others come."""
        import torch

        scan, control = self.projections(), self.control
        shape, views = scan.shape, scan.geometry.views
        yield Stage("projecting")
        # Measured as a person does, view by view; y is in the physics' order, row by row.
        measured = control.allocate("measured", shape)
        measured[...] = self.y[0, 0].permute(1, 0, 2).cpu().numpy()
        self.figures["noise"] = noise = noise_level(measured)
        projected, residual = control.allocate("projected", shape), control.allocate("residual", shape)
        for name in ("measured", "projected", "residual"):
            yield self._projections_ready(name)
        x = torch.from_numpy(np.ascontiguousarray(volume))[None, None].to(self.y.device)
        begin, group = control.clock(), max(1, views // 16)
        squares = np.zeros(views)
        power = 0.0
        for first in range(0, views, group):
            control.checkpoint()
            if control.finishing:
                self.complete = False
                break
            now = slice(first, min(first + group, views))
            with torch.no_grad():
                there = self.physics.subset(np.arange(now.start, now.stop)).A(x)[0, 0].permute(1, 0, 2)
            projected[now] = there.cpu().numpy()
            np.subtract(projected[now], measured[now], out=residual[now])
            squares[now] = np.square(residual[now], dtype=np.float64).sum((1, 2))
            power += float(np.square(measured[now], dtype=np.float64).sum())
            if power > 0:
                self.figures["residual"] = float(np.sqrt(squares.sum() / power))
            if noise > 0:
                ratios = np.sqrt(squares[: now.stop] / (shape[1] * shape[2])) / noise
                self.figures["residual_to_noise"] = float(np.sqrt(np.mean(ratios**2)))
                self.figures["worst_view"] = float(ratios.max())
                self.figures["worst_view_index"] = float(ratios.argmax())
            passed = control.clock() - begin
            box = (now, slice(0, shape[1]), slice(0, shape[2]))
            left = passed / now.stop * (views - now.stop)
            yield Progress("projected", now.stop, views, box, None, passed, left, dict(self.figures))

    def _projections_ready(self, name: str) -> VolumeReady:
        """The message that projections are there; a view is a step of 1 along the first axis."""
        scan = self.projections()
        (views, rows, columns), (pitch_v, pitch_u) = scan.shape, scan.geometry.pixel_size
        return VolumeReady(
            name,
            (views, rows, columns),
            (1.0, pitch_v, pitch_u),
            (0.0, -(rows - 1) / 2 * pitch_v, -(columns - 1) / 2 * pitch_u),
            handle=self.control.handles.get(name, ""),
            axis_labels=("view", "row", "column"),
        )
