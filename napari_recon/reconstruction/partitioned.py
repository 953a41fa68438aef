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

import heapq
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import deepinv as dinv
import torch
from deepinv.models import Reconstructor
from deepinv.optim.optim_iterators import ADMMIteration
from deepinv.physics import LinearPhysics
from torch import Tensor

from napari_recon.physics.normal import DiagCirculantWrapper, NormalOperator, NormalPhysics, is_self_adjoint
from napari_recon.reconstruction.start import Start, data_gradient, data_square, residual_of, start_volume
from napari_recon.reconstruction.streaming import Region, StreamingReconstructor, Update, whole
from napari_recon.scans.errors import ScanError

BOLDNESS = 1.5
"""A shortened pass's step, over the one that balances data and prior; 2 would gain nothing along it."""
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

    def nearest(self, boxes: Sequence[Region], focus: Sequence[float], count: int) -> list[Region]:
        """Of some boxes the ``count`` whose middles are nearest to a point (voxels), the nearest first."""

        def distance(box: Region) -> float:
            return sum(((s.start + s.stop - 1) / 2 - f) ** 2 for s, f in zip(box, focus, strict=True))

        return heapq.nsmallest(count, boxes, key=distance)


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
        before each later pass. What the patches share and none sees whole is the residual's low frequencies: each patch
        would explain all of them, and many small patches together overshoot. Low frequencies are where AᵀA is largest,
        so a few steps remove them. Where patches have overshot nevertheless, the pass's change is shortened at its
        end. 0 is the bare scheme, with neither.
    batch
        How many patches of a pass the base reconstructor gets at once, as one batch (batch · B, C, *patch); None: all
        of a pass. It fills a large device with small patches, at their memory; who stops or steers is heard once a
        batch. The result is that of one at a time as long as the base treats each sample of a batch by itself, which
        deepinv's optimisers do unless they are asked to stop early or to backtrack: both are decided by the batch's
        mean.
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
        batch: int | None = 1,
    ) -> None:
        super().__init__()
        if batch is not None and int(batch) < 1:
            raise ScanError(f"batch is {batch}; it must be at least one patch, or None for all of a pass.")
        self.batch = None if batch is None else int(batch)
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
            function is asked before every choice of a batch, so that a person's cursor steers a running job; it may
            return None.

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
        problem = _Problem.of(physics, fourier_filter, spatial_mask, operator)
        exact = problem.exact
        shown = start_volume(self.init if init is None else init, y, exact)
        self._check(shown, problem.operator)
        problem = problem.on(shown)
        partition = Partition(shown.shape[2:], self.patch_size, self.stride, self.window)
        total = self.passes * len(partition)
        norm = float(torch.linalg.vector_norm(shown)) or 1.0
        size = math.sqrt(data_square(exact, None, y)) or 1.0

        def pick(boxes: Sequence[Region]) -> list[Region]:
            point = focus() if callable(focus) else focus
            middle = [(n - 1) / 2 for n in partition.shape]
            return partition.nearest(
                boxes, middle if point is None else _point(point, partition.shape), self.batch or len(boxes)
            )

        step = 0
        context = shown.clone()
        # Without global steps nobody needs the residual, only the gradient.
        residual = residual_of(exact, context, y) if self.global_steps else None
        if residual is None:
            gradient, square = data_gradient(exact, context, y)
        else:
            square = float(torch.linalg.vector_norm(residual)) ** 2
        figures = {"residual": math.sqrt(square) / size}
        waiting = list(partition.boxes)
        boxes = pick(waiting)
        yield Update(whole(shown), shown, 0, total, figures, boxes[0])
        for sweep in range(self.passes):
            if residual is not None:
                # Later passes need less: what is left is small, and each step fits some of the noise that a prior
                # removed.
                steps = self.global_steps if sweep == 0 else min(1, self.global_steps)
                gradient = _global_steps(exact, shown, residual, steps)
                context.copy_(shown)
                square = float(torch.linalg.vector_norm(residual)) ** 2
            half_square = 0.5 * square or 1.0
            before = residual
            del residual
            believed = 0.0
            while boxes:
                for box in boxes:
                    waiting.remove(box)
                changes, curved, data_terms = self._solve(boxes, context, gradient, problem)
                for index, (box, change) in enumerate(zip(boxes, changes, strict=True)):
                    # What is shown is the context plus the windowed changes so far: meaningful at any time.
                    change.mul_(partition.weights(box, shown.device))
                    believed += float((change * curved[index]).sum()) / problem.scaling
                    shown[_at(box)] += change
                    figures = {
                        "change": float(torch.linalg.vector_norm(change)) / norm,
                        "data_term": data_terms[index] / half_square,
                    }
                    step += 1
                    if index + 1 < len(boxes):
                        yield Update(box, shown[_at(box)], step, total, figures, boxes[index + 1])
                last = boxes[-1]
                boxes = pick(waiting) if waiting else []
                if boxes:
                    yield Update(last, shown[_at(last)], step, total, figures, boxes[0])
            del gradient, changes, curved
            held_back, residual = False, None
            if before is not None:
                residual = residual_of(exact, shown, y)
                held_back = _hold_back(shown, context, believed, before, residual)
                square = float(torch.linalg.vector_norm(residual)) ** 2
            elif sweep < self.passes - 1:
                gradient, square = data_gradient(exact, shown, y)  # noqa: RUF059, of the next pass
            else:
                square = data_square(exact, shown, y)
            del before
            figures["residual"] = math.sqrt(square) / size
            if sweep < self.passes - 1:
                context.copy_(shown)
                waiting = list(partition.boxes)
                boxes = pick(waiting)
            changed = whole(shown) if held_back else last
            yield Update(changed, shown[_at(changed)], step, total, figures, boxes[0] if boxes else None)

    def _solve(
        self, boxes: Sequence[Region], context: Tensor, gradient: Tensor, problem: _Problem
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], list[float]]:
        """What the base reconstructor changes in some patches, AᵀA of each, and what each does to ½‖Ax − y‖²."""
        start = _taken(context, boxes)
        physics = problem.of_patches(boxes, start)
        at_start = physics.A(start)
        slope = _taken(gradient, boxes)
        b = at_start - problem.scaling * slope
        base = self.base_reconstructor
        _forget(base)
        found = base(b, physics, **_start_option(base, start))
        if found.shape != start.shape:
            raise ScanError(
                f"The base reconstructor returned {tuple(found.shape)} for a patch of {tuple(start.shape)}; "
                "it must keep the shape."
            )
        change = found - start
        curved = physics.A(found) - at_start
        decrease = (0.5 / problem.scaling * curved + slope).mul_(change)
        volumes = len(context)
        data_terms = [float(part.sum()) for part in decrease.split(volumes)]
        return change.split(volumes), curved.split(volumes), data_terms

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


@dataclass(frozen=True)
class _Problem:
    """Whose data is to be explained, and what stands for AᵀA on a patch.

    Attributes
    ----------
    exact
        The physics that was measured with.
    operator
        H, or None where patches use AᵀA itself.
    scaling
        Of the data term.
    max_iter, tol
        Of proximal operators.
    shape
        Of the volumes, (*spatial), once there is one.
    """

    exact: LinearPhysics
    operator: NormalOperator | None
    scaling: float
    max_iter: int
    tol: float
    shape: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        physics: LinearPhysics,
        fourier_filter: Tensor | None,
        spatial_mask: Tensor | None,
        operator: NormalOperator | None,
    ) -> _Problem:
        """What a call means by its physics and its H."""
        if isinstance(physics, DiagCirculantWrapper):
            if physics.physics is None:
                raise ScanError("This DiagCirculantWrapper was made without a physics; the projections cannot be used.")
            h = physics.resolve(operator, fourier_filter, spatial_mask)
            return cls(physics.physics, h, physics.scaling, physics.max_iter, physics.tol)
        if operator is not None or fourier_filter is not None or spatial_mask is not None:
            operator = DiagCirculantWrapper(physics).resolve(operator, fourier_filter, spatial_mask)
        return cls(physics, operator, 1.0, physics.max_iter, physics.tol)

    def on(self, volume: Tensor) -> _Problem:
        """The same for volumes like this one, (B, C, *spatial), with H where it is."""
        operator = None if self.operator is None else self.operator.to(volume.device)
        return replace(self, operator=operator, shape=tuple(volume.shape[2:]))

    def of_patches(self, boxes: Sequence[Region], context: Tensor) -> NormalPhysics:
        """The physics of some patches, whose volumes are the samples of one batch: context is (n · B, C, *patch)."""
        volumes = len(context) // len(boxes)
        transpose = None
        if self.operator is None:
            normal = _exact_patches(self.exact, boxes, volumes, self.shape)
        else:
            # One patch serves a batch of volumes as it is; several need a mask for each sample.
            samples = [box for box in boxes for _ in range(volumes)]
            h = self.operator.patch(boxes[0]) if len(boxes) == 1 else self.operator.patches(samples)
            normal = h.apply
            transpose = None if is_self_adjoint(h) else self._scaled(h.adjoint)
        patches = NormalPhysics(
            self._scaled(normal),
            tuple(context.shape[1:]),
            context,
            context.device,
            transpose,
            max_iter=self.max_iter,
            tol=self.tol,
        )
        # As the wrapper has them: unrolled networks take their steps in units of the whole operator's norm.
        patches.physics, patches.scaling = self.exact, self.scaling
        return patches

    def _scaled(self, normal: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return normal if self.scaling == 1 else (lambda x: normal(x) * self.scaling)


def _exact_patches(
    physics: LinearPhysics, boxes: Sequence[Region], volumes: int, shape: tuple[int, ...]
) -> Callable[[Tensor], Tensor]:
    """S AᵀA Sᵀ, box after box: by the physics' own restriction where it has one, else amid zeros."""
    restrict: Any = getattr(physics, "restrict", None)

    def amid_zeros(box: Region) -> Callable[[Tensor], Tensor]:
        def normal(x: Tensor) -> Tensor:
            full = x.new_zeros((*x.shape[:2], *shape))
            full[_at(box)] = x
            return physics.A_adjoint_A(full)[_at(box)].contiguous()

        return normal

    each = [amid_zeros(box) if restrict is None else restrict(box).A_adjoint_A for box in boxes]
    if len(each) == 1:
        return each[0]
    return lambda x: torch.cat([normal(part) for normal, part in zip(each, x.split(volumes), strict=True)])


def _start_option(base: Reconstructor, context: Tensor) -> dict[str, Any]:
    """``init=`` for a base that takes it, in the form that it takes."""
    if isinstance(base, dinv.optim.optimizers.BaseOptim):
        if isinstance(base.fixed_point.iterator, ADMMIteration):
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


def _hold_back(shown: Tensor, context: Tensor, believed: float, before: Tensor, after: Tensor) -> bool:
    """Shorten the change of a pass where patches overshot together; changes shown and its residual in place.

    With d the blended change, every patch took its own part to curve the data term by ⟨d, Hd⟩; in fact the curvature
    is ‖Ad‖², larger where patches moved the same way for the same reason. Each patch stands at its own minimum, where
    data and prior are in balance, so that the step along d with that balance is the ratio of the two, whatever the
    prior is. Ad costs nothing: it is the difference of the residuals. Below a half the pass as a whole went uphill;
    only then is it shortened, to a step of half as much again: patches also move in ways that they do not share.
    """
    after -= before
    actual = float(torch.linalg.vector_norm(after)) ** 2
    overshot = 0 < 2 * believed < actual
    if overshot:
        step = BOLDNESS * believed / actual
        shown.sub_(context).mul_(step).add_(context)
        after *= step
    after += before
    return overshot


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


def _taken(volume: Tensor, boxes: Sequence[Region]) -> Tensor:
    """Patches of (B, C, *spatial) as one batch, (n · B, C, *patch)."""
    return torch.cat([volume[_at(box)] for box in boxes])


def _per_axis(value: int | Sequence[int], axes: int, name: str) -> list[int]:
    values = [int(value)] * axes if isinstance(value, int) else [int(v) for v in value]
    if len(values) != axes or min(values) < 1:
        raise ScanError(f"{name} is {value}; it must be a positive number, or {axes} of them.")
    return values


def _point(point: Sequence[float], shape: tuple[int, ...]) -> Sequence[float]:
    if len(point) != len(shape):
        raise ScanError(f"The focus {tuple(point)} must be {len(shape)} coordinates in voxels.")
    return point
