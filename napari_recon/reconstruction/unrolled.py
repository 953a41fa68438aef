"""Learned reconstruction: data steps and a network in turn (unrolled), or the network after a start.

    x₍ₖ₊₁₎ = D(x₍ₖ₎ − t₍ₖ₎ · step(x₍ₖ₎)),   step(x) = Aᵀ(Ax − y) / ‖A‖²   or the same with the residual ramp-filtered,

or several such steps, accelerated, before each use of D: they cost little beside a network.

The first pass works on the whole volume: global data steps, the network patch by patch. Its result is the context of a
second pass, in which every patch takes all its steps by itself, exactly or with H ≈ AᵀA: the network's memory is that
of a patch in both.

D is any torch module from volumes to volumes. It is shown volumes whose brightness is about one, whatever the unit of
the attenuation: D(x) = s · network(x / s). Data steps fit noise as well as detail; a network with a memory is shown the
volume before them, too, and sees what they changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics
from torch import Tensor, nn

from napari_recon.physics.normal import DiagCirculantWrapper, NormalOperator, NormalPhysics
from napari_recon.physics.ramp_filtered import RampFiltered
from napari_recon.reconstruction.partitioned import Focus, Partition, PartitionedReconstructor
from napari_recon.reconstruction.start import (
    Start,
    brightness,
    data_gradient,
    data_square,
    operator_sqnorm,
    start_volume,
)
from napari_recon.reconstruction.streaming import Region, StreamingReconstructor, Update, whole
from napari_recon.reconstruction.tv import PreconditionedTV
from napari_recon.scans.errors import ScanError

Step = Literal["ramp", "gradient"]
Gradient = Callable[[Tensor], Tensor]

QUICK_STARTS = ("tv", "least-squares")
"""Starts that take steps themselves."""

SLICES = 16
"""A single slice is repeated so often for a network of volumes."""


def apply_by_patches(
    denoise: Callable[[Tensor], Tensor],
    x: Tensor | Sequence[Tensor],
    out: Tensor,
    partition: Partition,
    batch: int = 1,
    focus: Focus = None,
) -> Iterator[Region]:
    """Apply a network to a volume patch by patch, blended by windows that sum to one.

    Parameters
    ----------
    denoise
        (n, M, *patch) to (n, C, *patch).
    x
        Volume (B, C, *spatial), or several whose channels are shown together, M in all, such as it and the volume
        before; left as they are.
    out
        A copy of the volume, changed in place: at any time the blend of what is done with what is not.
    partition
        Of x's shape.
    batch
        Patches at a time.
    focus
        Which come first, as for PartitionedReconstructor.

    Yields
    ------
    The boxes, each after ``out`` has changed there.
    """
    volumes = [x] if isinstance(x, Tensor) else list(x)
    waiting = list(partition.boxes)
    while waiting:
        point = focus() if callable(focus) else focus
        if point is None:
            point = [(n - 1) / 2 for n in partition.shape]
        elif len(point) != len(partition.shape):
            raise ScanError(f"The focus {tuple(point)} must be {len(partition.shape)} coordinates in voxels.")
        boxes = partition.nearest(waiting, point, batch)
        patches = torch.cat([torch.cat([v[_at(box)] for v in volumes], 1) for box in boxes])
        changes = (denoise(patches) - patches[:, : out.shape[1]]).split(len(out))
        for box, change in zip(boxes, changes, strict=True):
            waiting.remove(box)
            out[_at(box)] += change * partition.weights(box, out.device)
        yield from boxes


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16, so that networks gain time by it and not only memory."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


class _Learned(StreamingReconstructor):
    """What the two methods share: a network, and how it is applied to volumes larger than its memory."""

    def __init__(
        self,
        patch_size: int | Sequence[int] | None,
        stride: int | Sequence[int] | None,
        batch: int,
        init: Start,
    ) -> None:
        super().__init__()
        if int(batch) < 1:
            raise ScanError(f"batch is {batch}; it must be at least one patch.")
        self.patch_size, self.stride, self.batch, self.init = patch_size, stride, int(batch), init
        self.mixed_precision = False
        """Whether the network (never the physics) computes in bfloat16 where it can."""

    def _shown(self, network: nn.Module, x: Tensor, scale: float | Tensor, before: Tensor | None = None) -> Tensor:
        """S · network(x / s), of x and the volume before it where there is one."""
        shown = (x if before is None else torch.cat([x, before], 1)) / scale
        flat = x.ndim == 5 and x.shape[2] == 1
        if flat:  # a slice of a fan beam: of an object that goes on above and below, as those of training do
            shown = shown.expand(-1, -1, SLICES, -1, -1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.mixed_precision):
            out = network(shown)
        if flat and out.shape[2:] == shown.shape[2:]:
            out = out[:, :, SLICES // 2 : SLICES // 2 + 1]
        if out.shape != x.shape:
            raise ScanError(
                f"The network returned {tuple(out.shape)} for {tuple(x.shape)}; it must keep the shape of its volumes."
            )
        return out.float() * scale

    def _starting(
        self, y: Tensor, physics: LinearPhysics, init: Start | None, ramp: LinearPhysics | None
    ) -> Iterator[Update]:
        """The start, and the steps that it takes."""
        begin = self.init if init is None else init
        if isinstance(begin, str) and begin in QUICK_STARTS:
            return PreconditionedTV.of(begin).stream(y, physics, ramp=ramp)
        x = start_volume(begin, y, physics)
        return iter([Update(whole(x), x, 0, 0)])

    def _partition(self, x: Tensor) -> Partition:
        size = tuple(x.shape[2:]) if self.patch_size is None else self.patch_size
        return Partition(x.shape[2:], size, self.stride if self.patch_size is not None else None)


class UnrolledPGD(_Learned):
    """Unrolled proximal gradient: data steps of learned length, with a network between them.

    On a physics the volume takes K global data steps, the network being applied patch by patch; with ``passes=2`` every
    patch then takes K steps of its own with that result as its context, exactly or with H. As the base of a
    :class:`~napari_recon.reconstruction.partitioned.PartitionedReconstructor` it is the second of these alone.

    Parameters
    ----------
    network
        A torch module that keeps the shape of its volumes (B, C, D, H, W), such as
        :func:`napari_recon.learning.networks.make_network` makes.
    iterations
        K.
    tied
        One network for all iterations, or a copy for each.
    step
        "ramp": AᵀF(Ax − y), the ramp-filtered residual projected back (X-rays only): worth 2 dB or more in few steps.
        "gradient": Aᵀ(Ax − y) of any physics.
    step_size
        Where the learned steps t start, in units of 1 / ‖AᵀFA‖ or 1 / ‖A‖²: below 2 a single step does not diverge,
        and of several accelerated ones at most 1.
    data_steps
        Data steps before each use of the network, with Nesterov's momentum from the second on.
    nonnegative
        Whether data steps set values below zero to zero, as attenuation is not negative.
    memory
        Whether the network is shown the volume before the data steps beside the one after them: (B, 2 C, D, H, W) to
        (B, C, D, H, W), as ``make_network(inputs=2)`` takes them.
    patch_size, stride, batch
        Edge of the patches (None: the network takes the volume whole), step between them, and how many at a time.
    passes
        1: the whole volume only. 2: then patch by patch in that context; and so on.
    init
        The start, as for :func:`napari_recon.reconstruction.start.start_volume`.

    Attributes
    ----------
    step_sizes
        The learned t, (K,).
    brightness
        s, or None (the default): the 99.9th percentile of what is started from. Networks without biases and
        normalisation do not depend on it.

    Notes
    -----
    In training mode, whole and in one pass, ``forward`` is differentiable.
    """

    def __init__(
        self,
        network: nn.Module,
        iterations: int = 3,
        tied: bool = True,
        step: Step = "ramp",
        step_size: float = 1.8,
        data_steps: int = 1,
        nonnegative: bool = False,
        memory: bool = False,
        patch_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        batch: int = 1,
        passes: int = 1,
        init: Start = "fdk",
        brightness: float | None = None,
    ) -> None:
        super().__init__(patch_size, stride, batch, init)
        if int(iterations) < 1 or int(passes) < 1:
            raise ScanError(f"UnrolledPGD needs at least one iteration and one pass, not {iterations} and {passes}.")
        if int(data_steps) < 1:
            raise ScanError(f"UnrolledPGD needs at least one data step before the network, not {data_steps}.")
        if step not in get_args(Step):
            raise ScanError(f"The step {step!r} is unknown: use 'ramp' or 'gradient'.")
        if int(passes) > 1 and patch_size is None:
            raise ScanError("A second pass goes patch by patch: give UnrolledPGD a patch_size.")
        self.iterations, self.tied, self.step, self.passes = int(iterations), bool(tied), step, int(passes)
        self.data_steps, self.nonnegative, self.memory = int(data_steps), bool(nonnegative), bool(memory)
        count = 1 if tied else self.iterations
        self.networks = nn.ModuleList([network, *(deepcopy(network) for _ in range(count - 1))])
        self.step_sizes = nn.Parameter(torch.full((self.iterations,), float(step_size)))
        self.brightness = brightness

    def step_physics(self, physics: LinearPhysics) -> LinearPhysics:
        """The physics whose gradient the steps take, to which an H for the second pass is fitted."""
        return RampFiltered(physics) if self.step == "ramp" and not isinstance(physics, RampFiltered) else physics

    def unroll(self, x: Tensor, gradient: Gradient, scale: float | Tensor) -> Iterator[Tensor]:
        """Yield the K iterates from x, each as the network left it; differentiable.

        Parameters
        ----------
        x
            Start (B, C, *spatial), a patch or a whole volume.
        gradient
            The step's direction at a volume, in units of the operator's squared norm.
        scale
            Brightness s, a number or (B, 1, 1, 1, 1).
        """
        for k in range(self.iterations):
            before = x
            *_, x = self.descend(x, gradient, k)
            x = self.denoise(x, k, scale, before)
            yield x

    def descend(self, x: Tensor, gradient: Gradient, iteration: int) -> Iterator[Tensor]:
        """Yield x after each of the data steps of an iteration; differentiable."""
        z, t = x, 1.0
        for left in reversed(range(self.data_steps)):
            following = torch.addcmul(z, gradient(z), -self.step_sizes[iteration])
            if self.nonnegative:
                following = following.clamp_(min=0)
            if left:
                t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
                z, t = torch.lerp(x, following, 1 + (t - 1) / t_next), t_next
            x = following
            yield x

    def denoise(self, x: Tensor, iteration: int, scale: float | Tensor, before: Tensor) -> Tensor:
        """D of an iteration, of the volume after its data steps and the one before them."""
        network = self.networks[0 if self.tied else iteration]
        return self._shown(network, x, scale, before if self.memory else None)

    def denoise_by_patches(
        self,
        x: Tensor,
        out: Tensor,
        iteration: int,
        scale: float | Tensor,
        before: Tensor,
        partition: Partition,
        focus: Focus = None,
    ) -> Iterator[Region]:
        """:meth:`denoise` by :func:`apply_by_patches`."""
        network, channels = self.networks[0 if self.tied else iteration], x.shape[1]

        def denoise(v: Tensor) -> Tensor:
            return self._shown(network, v[:, :channels], scale, v[:, channels:] if self.memory else None)

        shown = [x, before] if self.memory else x
        return apply_by_patches(denoise, shown, out, partition, self.batch, focus)

    def forward(self, y: Tensor, physics: LinearPhysics, **options: Any) -> Tensor:
        """The reconstruction (B, C, D, H, W): the last word of :meth:`stream`."""
        alone = self.patch_size is None and not isinstance(physics, NormalPhysics)
        if not (alone and self.training and torch.is_grad_enabled()):
            return super().forward(y, physics, **options)
        physics, starting, filtered = self._begin(y, physics, options.get("init"), None, options.get("ramp"))
        *_, started = starting
        if filtered is not None:
            y = filtered.measurement(y)
        x = started.values
        norm = operator_sqnorm(physics)
        iterates = self.unroll(x, lambda v: physics.A_adjoint(physics.A(v) - y) / norm, self._scale(x))
        return list(iterates)[-1]

    @torch.no_grad()
    def stream(
        self,
        y: Tensor,
        physics: LinearPhysics,
        operator: NormalOperator | None = None,
        init: Start | None = None,
        focus: Focus = None,
        ramp: RampFiltered | None = None,
        **options: Any,
    ) -> Iterator[Update]:
        """Yield the start, the volume after every data step, and a box after every patch that the network did.

        Parameters
        ----------
        y, physics
            Measurements and their physics; a RampFiltered physics has its own ``measurement(y)``. Or, as the base of a
            PartitionedReconstructor, the measurement and the physics of a patch.
        operator
            H for the patches of later passes, fitted to :meth:`step_physics`; None takes AᵀFA exactly. A
            DiagCirculantWrapper as the physics brings its own.
        init
            Overrides the constructor's.
        focus
            Which patches come first, as for PartitionedReconstructor.
        ramp
            RampFiltered(physics), where it is there already: it costs some products to make.

        Raises
        ------
        ScanError
            If sizes do not match, or a ramp step is asked of a physics that has no ramp.

        Notes
        -----
        Figures: ``residual``, ‖Ax − y‖/‖y‖ (ramp-filtered where the steps are) of the volume before a data step.
        """
        if isinstance(physics, NormalPhysics) and not isinstance(physics, DiagCirculantWrapper):
            yield from self._on_patch(y, physics, init)
            return
        if isinstance(physics, DiagCirculantWrapper):
            operator = physics.resolve(operator, options.get("fourier_filter"), options.get("spatial_mask"))
            if physics.physics is None:
                raise ScanError("This DiagCirculantWrapper was made without a physics; the projections cannot be used.")
            physics = physics.physics
            if self.passes > 1 and self.step == "ramp" and not isinstance(physics, RampFiltered):
                raise ScanError(
                    "This UnrolledPGD takes ramp-filtered steps, but the wrapper's normal operator stands for AᵀA "
                    "without the filter: fit one to step_physics(physics), and pass it as operator."
                )
        # The projections are never filtered as a whole: a data step takes a batch of views at a time.
        physics, starting, _ = self._begin(y, physics, init, operator, ramp)
        step = total = 0
        for update in starting:
            if not update.step:
                box = whole(update.values)
                partition = self._partition(update.values)
                a_pass = update.total + self.iterations * (self.data_steps + len(partition))
                total = a_pass + (self.passes - 1) * len(partition)
            x, step = update.values, update.step
            yield Update(box, x, step, total, update.figures, box)
        x = x.clone()  # who follows the stream may write what comes next into what was yielded
        del update, starting, init
        norm, scale = operator_sqnorm(physics, tuple(x.shape[1:]), x.device), self._scale(x)
        size = math.sqrt(data_square(physics, None, y)) or 1.0
        residual = 0.0

        def gradient(v: Tensor) -> Tensor:
            nonlocal residual
            found, square = data_gradient(physics, v, y)
            residual = math.sqrt(square) / size
            return found.div_(norm)

        shown = torch.empty_like(x)
        for k in range(self.iterations):
            before = x
            for count, x in enumerate(self.descend(x, gradient, k), start=1):  # noqa: B020
                step += 1
                following = box if count < self.data_steps else partition.boxes[0]
                yield Update(box, x, step, total, {"residual": residual}, following)
            shown.copy_(x)
            done = self.denoise_by_patches(x, shown, k, scale, before, partition, focus)
            for count, patch in enumerate(done, start=1):
                step += 1
                last = count == len(partition) and k == self.iterations - 1 and self.passes == 1
                yield Update(patch, shown[_at(patch)], step, total, {}, None if last else box)
            x = shown.clone()
        if self.passes == 1:
            return
        del x, before
        patches = PartitionedReconstructor(
            _OnPatches(self, scale, norm),
            patch_size=self.patch_size or 1,
            stride=self.stride,
            init=shown,
            passes=self.passes - 1,
            global_steps=0,
            batch=self.batch,
        )
        for update in patches.stream(y, physics, operator=operator, focus=focus):
            if update.step:
                yield Update(update.box, update.values, a_pass + update.step, total, update.figures, update.next_box)

    def _begin(
        self,
        y: Tensor,
        physics: LinearPhysics,
        init: Start | None,
        operator: NormalOperator | None,
        ramp: RampFiltered | None,
    ) -> tuple[LinearPhysics, Iterator[Update], RampFiltered | None]:
        """The physics whose gradient is taken, the steps of the start, and the physics if it is y that it filters."""
        stepped = ramp if ramp is not None and self.step == "ramp" else self.step_physics(physics)
        filtered = stepped if isinstance(stepped, RampFiltered) and stepped is not physics else None
        starting = self._starting(y, physics, init, ramp if filtered is None else filtered)
        return stepped, _checked(starting, operator), filtered

    def _on_patch(self, b: Tensor, physics: NormalPhysics, init: Start | None) -> Iterator[Update]:
        """K steps on a patch: the gradient at x̃ is A(x̃) − b."""
        source = getattr(physics, "physics", None)
        if self.step == "ramp" and source is not None and not isinstance(source, RampFiltered):
            raise ScanError(
                f"This UnrolledPGD takes ramp-filtered steps, but its patches are those of {type(source).__name__}: "
                "give PartitionedReconstructor RampFiltered(physics) and its measurement(y), or use step='gradient'."
            )
        start = init if isinstance(init, Tensor) else physics.context
        x = torch.zeros_like(b) if start is None else start.clone()
        if source is None:
            norm = operator_sqnorm(physics, tuple(x.shape[1:]), x.device)
        else:
            norm = physics.scaling * operator_sqnorm(source, device=x.device)
        box = whole(x)
        yield Update(box, x, 0, self.iterations, {}, box)
        iterates = self.unroll(x, lambda v: (physics.A(v) - b) / norm, self._scale(x))
        for k, iterate in enumerate(iterates, start=1):
            yield Update(box, iterate, k, self.iterations, {}, box if k < self.iterations else None)

    def _scale(self, x: Tensor) -> float:
        return self.brightness or brightness(x) or 1.0


class PostProcessing(_Learned):
    """A network after a start: x̂ = D(x₀), usually of FDK, patch by patch.

    Parameters
    ----------
    network
        As for :class:`UnrolledPGD`.
    patch_size, stride, batch, init
        As for :class:`UnrolledPGD`.
    brightness
        As for :class:`UnrolledPGD`.
    """

    def __init__(
        self,
        network: nn.Module,
        patch_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        batch: int = 1,
        init: Start = "fdk",
        brightness: float | None = None,
    ) -> None:
        super().__init__(patch_size, stride, batch, init)
        self.network, self.brightness = network, brightness

    def denoise(self, x: Tensor, scale: float | Tensor) -> Tensor:
        """D(x), differentiable."""
        return self._shown(self.network, x, scale)

    def forward(self, y: Tensor, physics: LinearPhysics, **options: Any) -> Tensor:
        """The reconstruction (B, C, D, H, W); differentiable by the weights in training mode, if not by patches."""
        if self.patch_size is not None or not (self.training and torch.is_grad_enabled()):
            return super().forward(y, physics, **options)
        *_, started = self._from(y, physics, options.get("init"), options.get("ramp"))
        return self.denoise(started.values, self._scale(started.values))

    @torch.no_grad()
    def stream(
        self,
        y: Tensor,
        physics: LinearPhysics,
        init: Start | None = None,
        focus: Focus = None,
        ramp: RampFiltered | None = None,
        **options: Any,
    ) -> Iterator[Update]:
        """Yield the start and its steps, then a box after every patch; as a base of patches, the context denoised."""
        for update in self._from(y, physics, init, ramp):
            x, box = update.values, whole(update.values)
            partition = self._partition(x)
            begun, total = update.step, update.total + len(partition)
            yield Update(box, x, update.step, total, update.figures, box)
        # Who follows the stream may write what comes next into what was yielded.
        scale, x, shown = self._scale(x), x.clone(), x.clone()
        done = apply_by_patches(lambda v: self.denoise(v, scale), x, shown, partition, self.batch, focus)
        for step, region in enumerate(done, start=begun + 1):
            yield Update(region, shown[_at(region)], step, total, {}, box if step < total else None)

    def _from(
        self, y: Tensor, physics: LinearPhysics, init: Start | None, ramp: RampFiltered | None
    ) -> Iterator[Update]:
        if isinstance(physics, NormalPhysics) and not isinstance(physics, DiagCirculantWrapper):
            context = init if isinstance(init, Tensor) else physics.context
            x = (y if context is None else context).clone()
            return iter([Update(whole(x), x, 0, 0)])
        if isinstance(physics, DiagCirculantWrapper) and physics.physics is not None:
            physics = physics.physics
        return self._starting(y, physics, init, ramp)

    def _scale(self, x: Tensor) -> float:
        return self.brightness or brightness(x) or 1.0


class _OnPatches(Reconstructor):
    """An unrolled network on patches, with the brightness and the norm of the whole that they are of."""

    def __init__(self, unrolled: UnrolledPGD, scale: float, norm: float) -> None:
        super().__init__()
        self.unrolled, self.scale, self.norm = unrolled, scale, norm

    def forward(self, y: Tensor, physics: NormalPhysics, init: Tensor, **options: Any) -> Tensor:
        *_, last = self.unrolled.unroll(init, lambda v: (physics.A(v) - y) / self.norm, self.scale)
        return last


def _checked(starting: Iterator[Update], operator: NormalOperator | None) -> Iterator[Update]:
    """The steps of a start, once it is sure that the operator is for such volumes."""
    for update in starting:
        shape = tuple(update.values.shape[2:])
        if operator is not None and operator.shape != shape:
            raise ScanError(
                f"The normal operator is for volumes of {operator.shape} voxels, not {shape}; fit it for this volume."
            )
        yield update


def _at(box: Region) -> Any:
    """The index of a box in (B, C, *spatial)."""
    return (..., *box)
