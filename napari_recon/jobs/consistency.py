"""The run that holds a volume against the data.

The stream is: ``Stage("reading")``, ``Stage("reading the volume")`` where it is a file, ``Stage("projecting")``,
``VolumeReady`` of "measured", "projected" and "residual" (projected − measured), each (views, rows, columns), a
``Progress`` of "projected" a group of views. The figures at the end: ``residual`` ‖Ax − y‖/‖y‖; ``noise``, the standard
deviation of the projections' noise; ``residual_to_noise``, the residual's rms over it, 1 where the volume explains all
but the noise; ``worst_view``, the largest such ratio of a view, and ``worst_view_index`` where.

Of k-space the three are (coils, D, H, W), the :func:`~napari_recon.scans.kspace.decades` of magnitudes below the
largest measured sample, and a ``Progress`` comes with every coil. Only sites that were sampled count, and are shown.
``noise`` is that of complex samples, √E|n|² (:func:`~napari_recon.jobs.quality.kspace_noise`), and in place of a view
stand ``worst_coil``, over the noise of that coil, and ``worst_coil_index``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import numpy as np

from napari_recon.jobs.job import DataConsistencyJob
from napari_recon.jobs.memory import peak_memory
from napari_recon.jobs.messages import Finished, Message, Progress, Stage, VolumeReady
from napari_recon.jobs.quality import kspace_noise, noise_level
from napari_recon.jobs.stages import Run
from napari_recon.scans.errors import ScanError
from napari_recon.scans.kspace import FAINTEST, decades

if TYPE_CHECKING:  # torch is imported where a job runs, not where jobs are made
    import torch


class DataConsistencyRun(Run[DataConsistencyJob]):
    """The run of a volume's projection beside the measured one."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        yield from self.read()
        self.control.checkpoint()
        x = yield from self._volume()
        yield from self._make_kspace(x) if self.scan.kind == "mri" else self._project(x)
        made_by, seconds = self.made_by()
        yield Finished(self.figures, seconds, peak_memory(), None, self.complete, made_by)

    def check(self) -> None:
        """A file must be there."""
        path = self.job.volume
        if path is not None and not path.exists():
            raise ScanError(f"There is no volume {path}: check the path.")

    def _volume(self) -> Generator[Message, None, torch.Tensor]:
        path, kept = self.job.volume, self.prepared.things
        if path is not None:
            yield Stage("reading the volume", path.name)
            return self.volume_from(path)
        if "last" not in kept:
            raise ScanError("There is no last result on this grid to check: run once, or give a volume's file.")
        last: torch.Tensor = kept["last"].to(self.y.device)
        if not bool(last.isfinite().all()):
            raise ScanError("The last result holds NaN or infinity: choose another volume.")
        return last

    def _project(self, x: torch.Tensor) -> Iterator[Message]:
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

    def _make_kspace(self, x: torch.Tensor) -> Iterator[Message]:
        """Make k-space of the volume a coil at a time, which a person can look at while the others come."""
        import torch

        from napari_recon.physics.mri import MultiCoilMRI

        scan, control, physics = self.scan, self.control, self.physics
        assert scan.kind == "mri"
        yield Stage("projecting")
        kspace, mask, noise = scan.kspace, scan.mask, kspace_noise(scan)
        self.figures["noise"] = overall = float(np.sqrt(np.mean(noise**2)))
        coils, sites, largest = len(kspace), int(np.count_nonzero(mask)), float(np.abs(kspace).max())
        control.allocate("measured", kspace.shape)[...] = decades(kspace, largest)
        for name in ("projected", "residual"):
            control.allocate(name, kspace.shape)[...] = FAINTEST
        for name in ("measured", "projected", "residual"):
            yield self.ready_of_coils(name)
        begin, squares, power = control.clock(), np.zeros(coils), 0.0
        for coil in range(coils):
            control.checkpoint()
            if control.finishing:
                self.complete = False
                break
            alone = MultiCoilMRI(physics.mask[0, 0], physics.coil_maps[0, coil : coil + 1], self.grid, x.device)
            with torch.no_grad():
                parts = alone.A(x)[0, :, 0].cpu().numpy()
            there = parts[0] + 1j * parts[1]
            left = there - kspace[coil]
            control.volumes["projected"][coil] = decades(there, largest)
            control.volumes["residual"][coil] = decades(left, largest)
            squares[coil] = np.sum(np.abs(left) ** 2, dtype=np.float64)
            power += float(np.sum(np.abs(kspace[coil]) ** 2, dtype=np.float64))
            done = coil + 1
            if power > 0:
                self.figures["residual"] = float(np.sqrt(squares.sum() / power))
            if overall > 0:
                self.figures["residual_to_noise"] = float(np.sqrt(squares.sum() / (done * sites))) / overall
                ratios = np.sqrt(squares[:done] / sites) / np.where(noise[:done] > 0, noise[:done], np.inf)
                self.figures["worst_coil"] = float(ratios.max())
                self.figures["worst_coil_index"] = float(ratios.argmax())
            passed = control.clock() - begin
            box = (slice(coil, done), *self.grid.full_box)
            remaining = passed / done * (coils - done)
            yield Progress("projected", done, coils, box, None, passed, remaining, dict(self.figures))

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
