"""The runs of reconstructions.

The stream is: ``Stage("reading")``, ``Stage("fdk")``, ``VolumeReady("fdk")``, the method's own stages,
``VolumeReady("result")`` holding the start, a ``Progress`` a step, ``Stage("writing")``. With FDK as the method, "fdk"
is the result. Of k-space it is "zero-filled" instead; its volumes are magnitudes, and a ``VolumeReady`` with " phase"
behind the name follows each.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_recon.jobs.job import (
    SHIPPED_WEIGHTS,
    FDKParameters,
    ReconstructionJob,
    SENSEParameters,
    SIRTParameters,
    TVParameters,
    UnrolledParameters,
    ZeroFilledParameters,
)
from napari_recon.jobs.memory import drop_frames, is_out_of_memory, network_bytes, peak_memory, release_memory
from napari_recon.jobs.messages import Finished, Message, Notice, Stage
from napari_recon.jobs.stages import JobCancelled, Run, advance, keep_operator, operator_file
from napari_recon.learning.weights import (
    WeightsHeader,
    find_weights,
    outside_training,
    outside_training_of_mri,
    read_header,
)
from napari_recon.scans.errors import ScanError

if TYPE_CHECKING:  # torch is imported where a job runs, not where jobs are made
    import torch
    from deepinv.physics import LinearPhysics

    from napari_recon.physics import NormalOperator
    from napari_recon.reconstruction import Update
    from napari_recon.reconstruction.unrolled import UnrolledPGD

QUICK_FIT: dict[str, Any] = {"probes": 4, "iterations": 2, "positions": 3}
"""How a job fits: a person waits. About half the time of the full fit, which ``fit-operator`` makes, for nearly its
errors (docs/benchmarks.md)."""
SMALLEST_PATCH = 16
"""Edge in voxels below which patches are not halved where memory runs out."""
TV_BYTES = 400
"""What a voxel of a patch takes with H and total variation: padded spectra, iterates, duals."""


class ReconstructionRun(Run[ReconstructionJob]):
    """The run of a reconstruction."""

    header: WeightsHeader | None = None
    """What the weights say of themselves, where the method has some."""

    def messages(self) -> Iterator[Message]:
        """All stages; see the module."""
        job, control = self.job, self.control
        yield from self.reconstruction()
        yield from self._measure()
        self.prepared.things["last"] = self._values("result")  # a start for the next job
        made_by, seconds = self.made_by()
        output = None
        if job.output is not None:
            from napari_recon.jobs.volumes import write_volume

            yield Stage("writing", str(job.output))
            control.checkpoint()
            data = control.volumes["result"], self.shown_grid, made_by, lambda: control.cancelled
            if write_volume(job.output, *data, job.bits) is None:
                raise JobCancelled
            output = str(job.output)
        yield Finished(self.figures, seconds, peak_memory(), output, self.complete, made_by)

    def reconstruction(self) -> Iterator[Message]:
        """The stages up to the volume "result", which is neither measured nor written."""
        job, control = self.job, self.control
        parameters = job.parameters
        yield from self.read()
        control.checkpoint()
        if self.header is not None:
            training, scan = self.header.training, self.scan
            if scan.kind == "mri":
                unlike = outside_training_of_mri(training, scan.acceleration, self.grid.shape)
            else:  # of the whole, of which slices may be asked for
                unlike = outside_training(training, scan.geometry, scan.default_grid(job.shape, job.voxel_size))
            for sentence in unlike:
                yield Notice(sentence)
        # FDK is always computed and shown: it is what to beat, and where the methods start.
        if self.scan.kind == "mri":
            yield from self.zero_filled()
        else:
            yield from self.fdk(parameters.window if isinstance(parameters, FDKParameters) else "ram-lak")
        control.checkpoint()
        if isinstance(parameters, FDKParameters | ZeroFilledParameters):
            control.volumes["result"] = control.volumes[self.baseline]
        else:
            yield from self._reconstruct()

    def check(self) -> None:
        """The output must be one that can be written, and weights must be there."""
        if self.job.output is not None:
            from napari_recon.jobs.volumes import check_output

            check_output(self.job.output)
        if isinstance(self.job.parameters, UnrolledParameters):
            self.header = read_header(find_weights(self.job.parameters.weights))

    def _reconstruct(self) -> Iterator[Message]:
        parameters = self.job.parameters
        updates = yield from self._method()
        yield Stage("reconstructing", parameters.method)
        if self.control.finishing:
            yield from self._finish_early()
            return
        patch: int | None = getattr(parameters, "patch", None)
        while True:
            try:
                yield from self.follow(updates(patch), "result")
                break
            except Exception as error:
                if not is_out_of_memory(error) or patch is None or patch <= SMALLEST_PATCH:
                    raise
                drop_frames(error)
            patch = max(SMALLEST_PATCH, patch // 2)
            release_memory()
            yield Notice(f"Memory ran out, so the patch was halved to {patch} voxels and the job goes on.")
        if isinstance(parameters, UnrolledParameters):  # told of its data steps, not of what the network made of them
            self.figures.clear()

    def _method(self) -> Generator[Message, None, Callable[[int | None], Iterator[Update]]]:
        """What the job's method tells of, by patches of an edge where it has patches."""
        parameters = self.job.parameters
        if isinstance(parameters, UnrolledParameters):
            return (yield from self._learned(parameters))
        if isinstance(parameters, TVParameters) and parameters.patch is not None:
            return (yield from self._partitioned(parameters))
        if isinstance(parameters, TVParameters):
            from napari_recon.reconstruction import TV

            method: Any = TV(iterations=parameters.iterations, regularization=parameters.regularization)
        elif isinstance(parameters, SENSEParameters):
            from napari_recon.reconstruction.sense import CGSense

            method = CGSense(iterations=parameters.iterations, regularization=parameters.regularization)
            return lambda _: method.stream(self.y, self.physics)
        else:
            from napari_recon.reconstruction import SIRT

            assert isinstance(parameters, SIRTParameters)
            method = SIRT(iterations=parameters.iterations, nonnegative=parameters.nonnegative)
        reference = self.start if self.reference is None else self.reference
        return lambda _: method.stream(self.y, self.physics, init=self.start, reference=reference)

    @property
    def reference(self) -> torch.Tensor | None:
        """Of a part, something as bright as the whole of which it is one: the unit of regularisation."""
        import torch

        unit = self.prepared.things.get("unit")
        return None if unit is None else torch.full((1, 1, 1, 1, 1), unit, device=self.y.device)

    def _partitioned(
        self, parameters: TVParameters
    ) -> Generator[Message, None, Callable[[int | None], Iterator[Update]]]:
        """TV by patches, with H in place of AᵀA unless the job wants it exact."""
        from napari_recon.physics import DiagCirculantWrapper
        from napari_recon.reconstruction import PartitionedReconstructor
        from napari_recon.reconstruction.tv import tv_patch_solver

        operator = yield from self._operator(parameters.operator, self.physics)
        size, physics, device = (1, *self.grid.shape), self.physics, self.y.device
        wrapped = DiagCirculantWrapper(physics=physics, img_size=size, scaling=1.0, device=device)
        iterations = math.ceil(parameters.iterations / parameters.passes)
        reference = self.start if self.reference is None else self.reference

        def updates(patch: int | None) -> Iterator[Update]:
            import torch

            assert patch is not None
            start = self.start
            if "result" in self.control.volumes:  # memory ran out amid it
                start = torch.from_numpy(self.volume("result").copy())[None, None].to(device)
            method = PartitionedReconstructor(
                base_reconstructor=tv_patch_solver(physics, reference, iterations, parameters.regularization),
                img_size=size,
                patch_size=patch,
                passes=parameters.passes,
                batch=patches_at_once(patch, device, TV_BYTES),
            )
            return method.stream(
                self.y,
                physics if operator is None else wrapped,
                operator=operator,
                init=start,
                focus=self._focus,
            )

        return updates

    def _learned(
        self, parameters: UnrolledParameters
    ) -> Generator[Message, None, Callable[[int | None], Iterator[Update]]]:
        """An unrolled network, or one after FDK: the weights tell."""
        from napari_recon.learning.networks import load_weights
        from napari_recon.reconstruction.tv import PreconditionedTV
        from napari_recon.reconstruction.unrolled import QUICK_STARTS, UnrolledPGD, computes_in_bfloat16

        header, device = self.header, self.y.device
        assert header is not None
        model = load_weights(header.path, device).model
        self.expect_kind(header, parameters.weights)
        self.used["weights"] = {"name": parameters.weights, "sha256": header.digest(), "card": header.card}
        auto = parameters.precision == "auto" and computes_in_bfloat16(device)
        model.mixed_precision = auto or parameters.precision == "bfloat16"
        self.used["precision"] = "bfloat16" if model.mixed_precision else "float32"
        options: dict[str, Any] = {}
        if isinstance(model, UnrolledPGD):
            if parameters.iterations is not None:
                set_iterations(model, parameters.iterations)
            model.passes = parameters.passes
            if model.passes > 1 and parameters.operator != "exact":
                options["operator"] = yield from self._step_operator(parameters.operator, model)
        elif parameters.iterations is not None:
            raise ScanError(
                f"The weights {parameters.weights} are a network after {str(model.init).upper()}, which has no "
                "iterations: leave them out."
            )
        if model.init in (None, "fdk"):
            options["init"] = self.start  # not computed again
        stepped = self.prepared.things.get("physics of ramp steps")
        if stepped is not None:  # nor this, where H was fitted to it
            options["ramp"] = stepped
        if "unit" in self.prepared.things:  # a part of what the networks are to see as one
            model.brightness = self.prepared.things["unit"]
            if isinstance(model.init, str) and model.init in QUICK_STARTS:
                start = PreconditionedTV.of(model.init)
                options["init"] = lambda y, physics: start(y, physics, ramp=stepped, reference=self.reference)

        def updates(patch: int | None) -> Iterator[Update]:
            # As whole as can be where no patches are asked for: the second pass goes by patches, if by one.
            model.patch_size = max(self.grid.shape) if patch is None else patch
            model.stride = None
            model.batch = 1 if patch is None else patches_at_once(patch, device, network_bytes(header.model))
            return model.stream(self.y, self.physics, focus=self._focus, **options)

        return updates

    def _focus(self) -> tuple[float, float, float] | None:
        """Where patches are wanted first; noted where it is not the middle: what overlaps is added in another order."""
        point = self.control.point
        middle = tuple((n - 1) / 2 for n in self.grid.shape)
        if point is None:
            return None
        if self.slab is not None:  # the person sees the slices that were asked for
            point = (point[0] + self.slab.inside.start, *point[1:])
        if np.allclose(point, middle, atol=1e-3):
            return None
        self.used["steered"] = True
        return point

    def expect_kind(self, header: WeightsHeader, name: str) -> None:
        """Refuse a network of another kind of scans."""
        complex_volumes = header.model["network"]["options"].get("channels", 1) == 2
        if complex_volumes != (self.scan.kind == "mri"):
            kinds = ("k-space (MRI)", "X-ray projections")
            raise ScanError(
                f"The weights {name} are for {kinds[not complex_volumes]}, and {self.job.scan} holds "
                f"{kinds[complex_volumes]}: choose others, such as {SHIPPED_WEIGHTS[self.scan.kind]!r}."
            )

    def _step_operator(self, wanted: str, model: UnrolledPGD) -> Generator[Message, None, NormalOperator | None]:
        """H of an unrolled network's steps, which may be other than AᵀA."""
        stepped = self.prepared.get(f"physics of {model.step} steps", lambda: model.step_physics(self.physics))
        try:
            return (yield from self._operator(wanted, stepped))
        except ScanError:
            if stepped is self.physics or wanted == "fit":
                raise
            self.load_operator(wanted)  # refused for a reason of its own?
            raise ScanError(
                f"The operator file {wanted} stands for AᵀA, and these weights take ramp-filtered steps, AᵀFA: use "
                "'fit', which fits H to those, or 'exact'."
            ) from None

    def _operator(self, wanted: str, physics: LinearPhysics) -> Generator[Message, None, NormalOperator | None]:
        """The normal operator of a physics: none, a file's, the last job's, the disk's, or a new fit."""
        from napari_recon.physics import NormalOperator

        if wanted == "exact":
            return None
        if wanted != "fit":
            return self.load_operator(wanted, physics)
        kept, seed = self.prepared.things, self.job.seed
        name = self._operator_name(physics)
        if name not in kept:
            file = operator_file(physics, seed, QUICK_FIT)
            operator = None
            with contextlib.suppress(ScanError, OSError):  # not there, damaged, or from another version
                operator = NormalOperator.load(file, physics, self.y.device)
                file.touch()  # used last, so forgotten last
            if operator is None:
                operator = yield from self._fit(physics)
                if operator is None:
                    return None
                keep_operator(operator, file, physics)
            kept[name] = operator
        return kept[name]

    def _operator_name(self, physics: LinearPhysics) -> str:
        """What the job's fit to a physics is kept as for the next job."""
        return f"operator of {type(physics).__name__} {self.job.seed}"

    def _fit(self, physics: LinearPhysics) -> Generator[Message, None, NormalOperator | None]:
        from napari_recon.physics.normal import stream_normal_operator_fit

        name = "fitting the normal operator"
        yield Stage(name)
        updates = stream_normal_operator_fit(physics, seed=self.job.seed, device=self.y.device, **QUICK_FIT)
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
        part = self.slab is not None and isinstance(self.job.parameters, FDKParameters)  # of what the rays meet
        if ("residual" not in self.figures or not self.complete) and not part:
            self.figures["residual"] = self._residual()
        if self.scan.truth is not None:
            from napari_recon.jobs.volumes import read_volume
            from napari_recon.measures.comparison import compare_volumes, field_of_view, on_grid

            control.checkpoint()
            try:
                truth = on_grid(read_volume(self.scan.truth), self.shown_grid)
                seen = math.inf if self.scan.kind == "mri" else self.scan.geometry.field_of_view_radius
                inside = field_of_view(self.shown_grid, seen)
                self.figures |= compare_volumes(volume, truth, inside)
            except ScanError as error:  # the job is done; only its figure is not to be had
                yield Notice(str(error))

    def _finish_early(self) -> Iterator[Message]:
        """Finish was pressed before the method began: what there is, is FDK."""
        self.complete = False
        volumes = self.control.volumes
        for more in ("", " phase"):
            if self.baseline + more in volumes:
                self.allocate("result" + more)[...] = self.volume(self.baseline + more)
                self._hand_over("result" + more)
                yield self.ready("result" + more)
        if self.baseline in self.complex_volumes:
            self.complex_volumes["result"] = self.complex_volumes[self.baseline]

    def _values(self, name: str) -> torch.Tensor:
        """A volume as the physics has it, (1, 1, D, H, W) or, complex, (1, 2, D, H, W); not a copy."""
        import torch

        if self.scan.kind == "mri":
            return self.complex_volumes[name if name in self.complex_volumes else self.baseline]
        return torch.from_numpy(self.volume(name))[None, None]

    def _residual(self) -> float:
        if self.scan.kind == "mri":
            from napari_recon.reconstruction.start import data_residual

            return data_residual(self.physics.A(self._values("result").to(self.y.device)), self.y)
        return relative_residual(self.physics, self.volume("result"), self.y, self.control.checkpoint)


def relative_residual(
    physics: Any, volume: NDArray[np.float32], y: torch.Tensor, between: Callable[[], None] = lambda: None
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


def set_iterations(model: UnrolledPGD, iterations: int) -> None:
    """Let an unrolled network take another number of iterations than it was trained with.

    Fewer are its first ones. More repeat its last step size.

    Raises
    ------
    ScanError
        If it has a network for each iteration, and so none for more.
    """
    import torch

    trained = model.iterations
    if iterations > trained and not model.tied:
        raise ScanError(
            f"The weights have a network for each of their {trained} iterations, and none for {iterations}: ask for "
            f"{trained} at most."
        )
    sizes = model.step_sizes.detach()
    repeated = sizes[-1:].expand(max(0, iterations - trained), *sizes.shape[1:])
    model.step_sizes = torch.nn.Parameter(torch.cat([sizes[:iterations], repeated]))
    model.iterations = iterations


def patches_at_once(patch: int, device: torch.device, voxel_bytes: int) -> int:
    """How many patches of an edge are computed at once: one on the CPU, more on a GPU that they would leave idle.

    Parameters
    ----------
    patch
        Its edge in voxels.
    device
        Where they are computed.
    voxel_bytes
        What a voxel of a patch takes.
    """
    if device.type != "cuda":
        return 1
    import torch

    free = torch.cuda.mem_get_info(device)[0]
    return max(1, min(16, int(0.25 * free / (voxel_bytes * patch**3))))
