"""The runs of reconstructions.

The stream is: ``Stage("reading")``, ``Stage("fdk")``, ``VolumeReady("fdk")``, the method's own stages,
``VolumeReady("result")`` holding the start, a ``Progress`` a step, ``Stage("writing")``. With FDK as the method, "fdk"
is the result.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.job import FDKParameters, ReconstructionJob, SIRTParameters, TVParameters
from napari_recon.jobs.memory import drop_frames, is_out_of_memory, peak_memory, release_memory
from napari_recon.jobs.messages import Finished, Message, Notice, Stage
from napari_recon.jobs.stages import JobCancelled, Run, advance, keep_operator, operator_file
from napari_recon.scans.errors import ScanError

if TYPE_CHECKING:  # torch is imported where a job runs, not where jobs are made
    import torch

    from napari_recon.physics import NormalOperator, XRayTransform
    from napari_recon.reconstruction import Update

QUICK_FIT: dict[str, Any] = {"probes": 4, "iterations": 2, "positions": 3}
"""How a job fits: a person waits. About half the time of the full fit, which ``fit-operator`` makes, for nearly its
errors (docs/benchmarks.md)."""


class ReconstructionRun(Run[ReconstructionJob]):
    """The run of a reconstruction."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        job, control = self.job, self.control
        parameters = job.parameters
        yield from self.read()
        control.checkpoint()
        # FDK is always computed and shown: it is what to beat, and where the methods start.
        yield from self.fdk(parameters.window if isinstance(parameters, FDKParameters) else "ram-lak")
        control.checkpoint()
        if isinstance(parameters, FDKParameters):
            control.volumes["result"] = control.volumes["fdk"]
        else:
            yield from self._reconstruct()
        yield from self._measure()
        made_by, seconds = self.made_by()
        output = None
        if job.output is not None:
            from napari_recon.jobs.volumes import write_volume

            yield Stage("writing", str(job.output))
            control.checkpoint()
            volume = control.volumes["result"]
            if write_volume(job.output, volume, self.grid, made_by, lambda: control.cancelled) is None:
                raise JobCancelled
            output = str(job.output)
        yield Finished(self.figures, seconds, peak_memory(), output, self.complete, made_by)

    def check(self) -> None:
        """The output must be one that can be written."""
        if self.job.output is not None:
            from napari_recon.jobs.volumes import check_output

            check_output(self.job.output)

    def _reconstruct(self) -> Iterator[Message]:
        parameters = self.job.parameters
        if isinstance(parameters, TVParameters) and parameters.patch is not None:
            patch, begin = parameters.patch, self.start
            operator = yield from self._operator(parameters)
            yield Stage("reconstructing", parameters.method)
            if self.control.finishing:
                yield from self._finish_early()
                return
            try:
                yield from self.follow(self._partitioned(parameters, patch, operator, begin), "result")
            except Exception as error:
                if not is_out_of_memory(error) or patch <= 16:
                    raise
                drop_frames(error)
                patch = max(16, patch // 2)
            else:
                return
            import torch

            release_memory()
            yield Notice(f"Memory ran out, so the patch was halved to {patch} voxels and the job goes on.")
            if "result" in self.control.volumes:
                begin = torch.from_numpy(self.control.volumes["result"].copy())[None, None].to(self.y.device)
            yield from self.follow(self._partitioned(parameters, patch, operator, begin), "result")
            return
        yield Stage("reconstructing", parameters.method)
        if self.control.finishing:
            yield from self._finish_early()
            return
        if isinstance(parameters, SIRTParameters):
            from napari_recon.reconstruction import SIRT

            method: Any = SIRT(iterations=parameters.iterations, nonnegative=parameters.nonnegative)
        else:
            from napari_recon.reconstruction import TV

            assert isinstance(parameters, TVParameters)
            method = TV(iterations=parameters.iterations, regularization=parameters.regularization)
        yield from self.follow(method.stream(self.y, self.physics, init=self.start), "result")

    def _partitioned(
        self, parameters: TVParameters, patch: int, operator: NormalOperator | None, start: torch.Tensor
    ) -> Iterator[Update]:
        """Updates of TV by patches, with ``operator`` in place of AᵀA where there is one."""
        from napari_recon.physics import DiagCirculantWrapper
        from napari_recon.reconstruction import PartitionedReconstructor
        from napari_recon.reconstruction.tv import tv_patch_solver

        size, physics = (1, *self.grid.shape), self.physics
        iterations = math.ceil(parameters.iterations / parameters.passes)
        method = PartitionedReconstructor(
            base_reconstructor=tv_patch_solver(physics, self.start, iterations, parameters.regularization),
            img_size=size,
            patch_size=patch,
            passes=parameters.passes,
            batch=patches_at_once(patch, self.y.device),
        )
        wrapped = DiagCirculantWrapper(physics=physics, img_size=size, scaling=1.0, device=self.y.device)
        return method.stream(
            self.y,
            physics if operator is None else wrapped,
            operator=operator,
            init=start,
            focus=lambda: self.control.point,
        )

    def _operator(self, parameters: TVParameters) -> Generator[Message, None, NormalOperator | None]:
        """The normal operator that the job asks for: none, a file's, the last job's, the disk's, or a new fit."""
        from napari_recon.physics import NormalOperator

        if parameters.operator == "exact":
            return None
        device = self.y.device
        if parameters.operator != "fit":
            return self.load_operator(parameters.operator)
        kept = self.prepared.things
        name = f"operator {self.job.seed}"
        if name not in kept:
            file = operator_file(self.physics, self.job.seed, QUICK_FIT)
            operator = None
            with contextlib.suppress(ScanError, OSError):  # not there, damaged, or from another version
                operator = NormalOperator.load(file, self.physics, device)
                file.touch()  # used last, so forgotten last
            if operator is None:
                operator = yield from self._fit()
                if operator is None:
                    return None
                keep_operator(operator, file, self.physics)
            kept[name] = operator
        return kept[name]

    def _fit(self) -> Generator[Message, None, NormalOperator | None]:
        from napari_recon.physics.normal import stream_normal_operator_fit

        name = "fitting the normal operator"
        yield Stage(name)
        updates = stream_normal_operator_fit(self.physics, seed=self.job.seed, device=self.y.device, **QUICK_FIT)
        operator = None
        while (update := advance(updates)) is not None:
            operator = update.operator
            error = update.figures.get("held_out")
            told = "" if error is None else f", relative error {error:.2g}"
            yield Stage(name, f"{update.stage}, step {update.step} of {update.total}{told}")
            self.control.checkpoint()
            if self.control.finishing:
                return None
        return operator

    def _measure(self) -> Iterator[Message]:
        """The figures of the end: the residual, and the distance to the truth where the scan has one."""
        control = self.control
        control.checkpoint()
        yield Stage("measuring")
        volume = control.volumes["result"]
        if not np.isfinite(volume).all():
            yield Notice("The result holds NaN or infinity: choose fewer iterations or more regularisation.")
            return
        if "residual" not in self.figures or not self.complete:
            self.figures["residual"] = relative_residual(self.physics, volume, self.y, control.checkpoint)
        if self.scan.truth is not None:
            from napari_recon.jobs.quality import compare_volumes, field_of_view, on_grid
            from napari_recon.jobs.volumes import read_volume

            control.checkpoint()
            try:
                truth = on_grid(read_volume(self.scan.truth), self.grid)
                inside = field_of_view(self.grid, self.scan.geometry.field_of_view_radius)
                self.figures |= compare_volumes(volume, truth, inside)
            except ScanError as error:  # the job is done; only its figure is not to be had
                yield Notice(str(error))

    def _finish_early(self) -> Iterator[Message]:
        """Finish was pressed before the method began: what there is, is FDK."""
        self.complete = False
        self.control.allocate("result", self.grid.shape)[...] = self.control.volumes["fdk"]
        yield self.ready("result")


def relative_residual(
    physics: XRayTransform, volume: NDArray[np.float32], y: torch.Tensor, between: Callable[[], None] = lambda: None
) -> float:
    """||A x - y|| / ||y||, a few views at a time: a second set of projections may not fit.

    Parameters
    ----------
    volume
        (D, H, W), 1/mm.
    y
        (1, 1, rows, views, columns).
    between
        Called between two groups of views.
    """
    import torch

    x = torch.from_numpy(np.ascontiguousarray(volume))[None, None].to(y.device)
    views = y.shape[3]
    group = max(1, views // 8)
    error = power = 0.0
    for first in range(0, views, group):
        between()
        chosen = np.arange(first, min(first + group, views))
        with torch.no_grad():
            measured = y[:, :, :, first : first + group]
            error += float(torch.sum((physics.subset(chosen).A(x) - measured).double() ** 2))
            power += float(torch.sum(measured.double() ** 2))
    return (error / power) ** 0.5 if power > 0 else float("inf")


def patches_at_once(patch: int, device: torch.device) -> int:
    """How many patches of an edge the solver gets at once: one on the CPU, more on a GPU that they would leave idle.

    A voxel of a patch costs about 400 bytes with H and total variation: padded spectra, iterates, duals.
    """
    if device.type != "cuda":
        return 1
    import torch

    free = torch.cuda.mem_get_info(device)[0]
    return max(1, min(16, int(0.25 * free / (400 * patch**3))))
