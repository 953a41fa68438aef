"""Reconstruction patch by patch, with the memory of a patch and the data of the whole.

With S taking a patch out of the volume and x₀ the volume so far, the gradient of ½‖Ax − y‖² by the patch x̃, all else
held, is

    S Aᵀ(A x₀ − y) + S AᵀA Sᵀ (x̃ − S x₀).

The first part is one global gradient g, computed once for all patches; the second lives on the patch. It is computed
exactly (only rays that meet the patch) or with H ≈ AᵀA, when no patch ever touches the projections. Any algorithm that
knows A, its adjoint and a measurement solves the patch: A is S AᵀA Sᵀ, the adjoint is the identity, and the measurement

    b = S AᵀA Sᵀ S x₀ − S g.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import deepinv as dinv
import torch
from deepinv.models import Reconstructor
from deepinv.physics import LinearPhysics
from torch import Tensor

from napari_recon.physics.normal import DiagCirculantWrapper, NormalOperator, NormalPhysics
from napari_recon.reconstruction.start import Start, start_volume
from napari_recon.reconstruction.streaming import Region, StreamingReconstructor, Update, whole
from napari_recon.scans.errors import ScanError

Focus = Sequence[float] | Callable[[], Sequence[float] | None] | None
Window = Callable[[int], Tensor]


def hann(n: int) -> Tensor:
    """sin² at the middles of n cells, (n,): positive throughout, so that a volume's border keeps its weight."""
    return torch.sin(math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n).square()


class Partition:
    """Overlapping boxes that cover a volume, with windows that sum to one everywhere.

    All boxes have one shape (kernels and filters are then shared): the last along an axis is moved back into the
    volume, and an axis shorter than the patch gets one box. Boxes form a grid, so that windows which sum to one along
    every axis do so in the volume; nothing of the volume's size is kept.

    Parameters
    ----------
    shape
        Of the volume, (*spatial).
    patch_size, stride
        Edge of a box and step between boxes, one number or one an axis. Half overlap by default.
    window
        n -> (n,) positive weights along an axis, before they are normalised.

    Raises
    ------
    ScanError
        If a stride is longer than the patch (voxels would be left out), or sizes are not positive.
    """

    def __init__(
        self,
        shape: Sequence[int],
        patch_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        window: Window = hann,
    ) -> None:
        self.shape = tuple(int(n) for n in shape)
        sizes = _per_axis(patch_size, len(self.shape), "patch_size")
        steps = [max(1, p // 2) for p in sizes] if stride is None else _per_axis(stride, len(self.shape), "stride")
        self.patch_shape = tuple(min(p, n) for p, n in zip(sizes, self.shape, strict=True))
        self._starts: list[list[int]] = []
        self._weights: list[dict[int, Tensor]] = []
        for n, p, s in zip(self.shape, self.patch_shape, steps, strict=True):
            if s > p and n > p:
                raise ScanError(f"A stride of {s} leaves out voxels between patches of {p}; it must be at most {p}.")
            starts = [*range(0, n - p, s), n - p]
            raw = window(p).double()
            if raw.shape != (p,) or not bool((raw > 0).all()):
                raise ScanError(f"The window must give {p} positive weights for a patch of {p} voxels.")
            total = torch.zeros(n, dtype=torch.float64)
            for start in starts:
                total[start : start + p] += raw
            self._starts.append(starts)
            self._weights.append({start: (raw / total[start : start + p]).float() for start in starts})
        self.boxes: list[Region] = [
            tuple(slice(a, a + p) for a, p in zip(corner, self.patch_shape, strict=True))
            for corner in product(*self._starts)
        ]

    def __len__(self) -> int:
        return len(self.boxes)

    def weights(self, box: Region, device: str | torch.device = "cpu") -> Tensor:
        """The window of a box, (*patch_shape); over all boxes the windows sum to one at every voxel."""
        out = torch.ones((), device=device)
        for axis, s in enumerate(box):
            spread = [1] * len(box)
            spread[axis] = -1
            out = out * self._weights[axis][s.start].to(device).reshape(spread)
        return out

    def nearest(self, boxes: Sequence[Region], focus: Sequence[float]) -> Region:
        """Of some boxes the one whose middle is nearest to a point (voxels)."""

        def distance(box: Region) -> float:
            return sum(((s.start + s.stop - 1) / 2 - f) ** 2 for s, f in zip(box, focus, strict=True))

        return min(boxes, key=distance)


class PartitionedReconstructor(StreamingReconstructor):
    """Reconstruct overlapping patches with any deepinv Reconstructor, and blend them.

    Parameters
    ----------
    base_reconstructor
        Solves a patch: called as ``base(b, patch_physics)`` with a :class:`~napari_recon.physics.normal.NormalPhysics`
        and its measurement b. deepinv's optimisers (``dinv.optim.PGD`` with an L2 fidelity, for one) work as they are
        and start from the context; a network finds the context as ``patch_physics.context``, the gradient there as
        ``A(context) - b``, and a crude solution as ``A_dagger(b)``.
    img_size
        Of the volume, (C, D, H, W) or (D, H, W); None takes what comes.
    patch_size, stride
        In voxels, one number or one an axis; half overlap by default. A volume smaller than a patch is one patch.
    init
        The first context: "fdk", "zeros", a volume, or a function of (y, physics); see
        :func:`napari_recon.reconstruction.start.start_volume`.
    passes
        Sweeps over all patches; each has the result of the last as its context. Two passes of half the iterations cost
        the same as one, and come closer to what the algorithm does on the whole volume.
    window
        n -> (n,) positive weights along an axis.
    global_steps
        Conjugate-gradient steps on ½‖Ax − y‖² over the whole volume before the first pass, an A and an Aᵀ each, and one
        before each later pass. What the
        patches share and none sees whole is the residual's low frequencies: each patch would explain all of them, and
        many small patches together overshoot. Low frequencies are where AᵀA is largest, so a few steps remove them.
        0 is the bare scheme.
    """

    def __init__(
        self,
        base_reconstructor: Reconstructor,
        img_size: Sequence[int] | None = None,
        patch_size: int | Sequence[int] = 64,
        stride: int | Sequence[int] | None = None,
        init: Start = "fdk",
        passes: int = 1,
        window: Window = hann,
        global_steps: int = 4,
    ) -> None:
        super().__init__()
        if int(global_steps) < 0:
            raise ScanError(f"global_steps is {global_steps}; it must be 0 or more.")
        self.global_steps = int(global_steps)
        if int(passes) < 1:
            raise ScanError(f"A partitioned reconstruction needs at least one pass, not {passes}.")
        self.base_reconstructor = base_reconstructor
        self.img_size = None if img_size is None else tuple(int(n) for n in img_size)
        self.patch_size, self.stride, self.window = patch_size, stride, window
        self.init, self.passes = init, int(passes)

    @torch.no_grad()
    def stream(
        self,
        y: Tensor,
        physics: LinearPhysics,
        fourier_filter: Tensor | None = None,
        spatial_mask: Tensor | None = None,
        operator: NormalOperator | None = None,
        init: Start | None = None,
        focus: Focus = None,
        **options: Any,
    ) -> Iterator[Update]:
        """Yield the context, then the volume's box after each patch, blended into what is around it.

        Parameters
        ----------
        y
            Measurements of the physics (that of the wrapper, where one is given).
        physics
            Any LinearPhysics: patches then use its AᵀA exactly. Or a DiagCirculantWrapper: then H.
        fourier_filter, spatial_mask, operator
            H, as λ and m or whole; by default the wrapper's own. Given with another physics, H is used as well.
        init
            Overrides the constructor's.
        focus
            The patches nearest to this point, (z, y, x) in voxels, come first; the volume's middle by default. A
            function is asked before every choice, so that a person's cursor steers a running job; it may return None.

        Raises
        ------
        ScanError
            If sizes do not match, or H is missing.

        Notes
        -----
        Figures of a patch: ``change``, the blended change over the start's norm; ``data_term``, by how much the patch
        alone would change ½‖Ax − y‖², relative to it (negative is better). At the start and after each pass
        ``residual``, ‖Ax − y‖/‖y‖.
        """
        exact, scaling, h = _what_is_meant(physics, fourier_filter, spatial_mask, operator)
        shown = start_volume(self.init if init is None else init, y, exact)
        self._check(shown, h)
        partition = Partition(shown.shape[2:], self.patch_size, self.stride, self.window)
        h = h.to(shown.device) if h is not None else None
        total = self.passes * len(partition)
        norm = float(torch.linalg.vector_norm(shown)) or 1.0
        size = float(torch.linalg.vector_norm(y)) or 1.0

        def pick(boxes: Sequence[Region]) -> Region:
            point = focus() if callable(focus) else focus
            middle = [(n - 1) / 2 for n in partition.shape]
            return partition.nearest(boxes, middle if point is None else _point(point, partition.shape))

        step = 0
        context = shown.clone()
        residual = exact.A(context).sub_(y)
        figures = {"residual": float(torch.linalg.vector_norm(residual)) / size}
        waiting = list(partition.boxes)
        box = pick(waiting)
        yield Update(whole(shown), shown, 0, total, figures, box)
        for sweep in range(self.passes):
            # Later passes need less: what is left is small, and each step fits some of the noise that a prior removed.
            steps = self.global_steps if sweep == 0 else min(1, self.global_steps)
            gradient = _global_steps(exact, shown, residual, steps)
            if self.global_steps:
                context.copy_(shown)
            half_square = 0.5 * float(torch.linalg.vector_norm(residual)) ** 2 or 1.0
            del residual
            following: Region | None = box
            while following is not None:
                box = following
                waiting.remove(box)
                change, figures = self._solve(
                    box, context[_at(box)], gradient[_at(box)], exact, scaling, h, half_square
                )
                # What is shown is the context plus the windowed changes so far: meaningful at any time.
                change.mul_(partition.weights(box, shown.device))
                shown[_at(box)] += change
                figures["change"] = float(torch.linalg.vector_norm(change)) / norm
                step += 1
                following = pick(waiting) if waiting else None
                if following is not None:
                    yield Update(box, shown[_at(box)], step, total, figures, following)
            del gradient
            residual = exact.A(shown).sub_(y)
            figures["residual"] = float(torch.linalg.vector_norm(residual)) / size
            last = box
            if sweep < self.passes - 1:
                context.copy_(shown)
                waiting = list(partition.boxes)
                box = pick(waiting)
            yield Update(last, shown[_at(last)], step, total, figures, box if waiting else None)

    def _solve(
        self,
        box: Region,
        context: Tensor,
        gradient: Tensor,
        exact: LinearPhysics,
        scaling: float,
        h: NormalOperator | None,
        half_square: float,
    ) -> tuple[Tensor, dict[str, float]]:
        """What the base reconstructor changes in a patch, and what that does to the data term."""
        normal = _exact_patch(exact, box) if h is None else h.patch(box).apply
        context = context.contiguous()
        scaled = normal if scaling == 1 else (lambda x: normal(x).mul_(scaling))
        patch_physics = NormalPhysics(scaled, tuple(context.shape[1:]), context, context.device)
        at_context = patch_physics.A(context)
        b = at_context - scaling * gradient
        base = self.base_reconstructor
        _forget(base)
        found = base(b, patch_physics, **_start_option(base, context))
        if found.shape != context.shape:
            raise ScanError(
                f"The base reconstructor returned {tuple(found.shape)} for a patch of {tuple(context.shape)}; "
                "it must keep the shape."
            )
        change = found - context
        curved = patch_physics.A(found) - at_context
        decrease = float((0.5 * curved * change).sum() / scaling + (gradient * change).sum())
        return change, {"data_term": decrease / half_square}

    def _check(self, volume: Tensor, h: NormalOperator | None) -> None:
        spatial = tuple(volume.shape[2:])
        if self.img_size is not None and self.img_size not in (spatial, tuple(volume.shape[1:])):
            raise ScanError(
                f"The reconstructor is for volumes of {self.img_size}, but here they are {tuple(volume.shape[1:])}."
            )
        if h is not None and h.shape != spatial:
            raise ScanError(
                f"The normal operator is for volumes of {h.shape} voxels, not {spatial}; fit it for this volume."
            )


def _what_is_meant(
    physics: LinearPhysics,
    fourier_filter: Tensor | None,
    spatial_mask: Tensor | None,
    operator: NormalOperator | None,
) -> tuple[LinearPhysics, float, NormalOperator | None]:
    """The exact physics, the scaling of the data term, and H or None."""
    if isinstance(physics, DiagCirculantWrapper):
        if physics.physics is None:
            raise ScanError("This DiagCirculantWrapper was made without a physics; the projections cannot be used.")
        return physics.physics, physics.scaling, physics.resolve(operator, fourier_filter, spatial_mask)
    if operator is None and fourier_filter is None and spatial_mask is None:
        return physics, 1.0, None
    wrapper = DiagCirculantWrapper(physics, device=str(_device(fourier_filter, operator)))
    return physics, 1.0, wrapper.resolve(operator, fourier_filter, spatial_mask)


def _device(fourier_filter: Tensor | None, operator: NormalOperator | None) -> torch.device:
    if operator is not None:
        return operator.fourier_filter.device
    return fourier_filter.device if fourier_filter is not None else torch.device("cpu")


def _exact_patch(physics: LinearPhysics, box: Region) -> Callable[[Tensor], Tensor]:
    """S AᵀA Sᵀ: by the physics' own restriction where it has one, else amid zeros."""
    restrict: Any = getattr(physics, "restrict", None)
    if restrict is not None:
        normal: Callable[[Tensor], Tensor] = restrict(box).A_adjoint_A
        return normal
    spatial = tuple(int(n) for n in physics.img_size[-len(box) :]) if getattr(physics, "img_size", None) else None

    def normal_amid_zeros(x: Tensor) -> Tensor:
        if spatial is None:
            raise ScanError("The physics does not say how large its volumes are; exact patches need its img_size.")
        full = x.new_zeros((*x.shape[:2], *spatial))
        full[_at(box)] = x
        return physics.A_adjoint_A(full)[_at(box)].contiguous()

    return normal_amid_zeros


def _start_option(base: Reconstructor, context: Tensor) -> dict[str, Any]:
    """``init=`` for a base that takes it, in the form that it takes."""
    if isinstance(base, dinv.optim.optimizers.BaseOptim):
        if isinstance(base, dinv.optim.ADMM):
            return {"init": (context, torch.zeros_like(context))}  # its second iterate is the scaled dual
        return {"init": (context, context)}
    options = inspect.signature(base.forward).parameters
    if "init" in options or isinstance(base, StreamingReconstructor):
        return {"init": context}
    return {}


def _global_steps(physics: LinearPhysics, x: Tensor, residual: Tensor, steps: int) -> Tensor:
    """Take conjugate-gradient steps from x; changes x and residual = A x - y in place, returns the gradient there."""
    gradient = physics.A_adjoint(residual)
    square = float(torch.linalg.vector_norm(gradient)) ** 2
    direction = -gradient
    for _ in range(steps):
        a_direction = physics.A(direction)
        curvature = float(torch.linalg.vector_norm(a_direction)) ** 2
        if not curvature > 0:
            break
        x.add_(direction, alpha=square / curvature)
        residual.add_(a_direction, alpha=square / curvature)
        gradient = physics.A_adjoint(residual)
        before, square = square, float(torch.linalg.vector_norm(gradient)) ** 2
        direction.mul_(square / before).sub_(gradient)
    return gradient


def _forget(base: Reconstructor) -> None:
    """Priors that keep a state from call to call (TVPrior's dual) start afresh on a new patch."""
    priors = getattr(base, "prior", None) or []
    for prior in priors if isinstance(priors, list | torch.nn.ModuleList) else [priors]:
        reset: Any = getattr(prior, "reset", None)
        if reset is not None:
            reset()


def _at(box: Region) -> Any:
    """The index of a box in (B, C, *spatial)."""
    return (..., *box)


def _per_axis(value: int | Sequence[int], axes: int, name: str) -> list[int]:
    values = [int(value)] * axes if isinstance(value, int) else [int(v) for v in value]
    if len(values) != axes or min(values) < 1:
        raise ScanError(f"{name} is {value}; it must be a positive number, or {axes} of them.")
    return values


def _point(point: Sequence[float], shape: tuple[int, ...]) -> Sequence[float]:
    if len(point) != len(shape):
        raise ScanError(f"The focus {tuple(point)} must be {len(shape)} coordinates in voxels.")
    return point
