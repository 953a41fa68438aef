"""Preconditioned ADMM: the minimiser of :class:`~napari_recon.reconstruction.tv.TV` in few projections, from any start.

    ½‖W^½(Ax − y)‖² + weight · ‖∇x‖₂,₁,   x ≥ 0

A and Aᵀ are the dear part, so that everything else is done between them. An iteration replaces AᵀWA by a B ⪰ AᵀWA that
a cosine transform makes diagonal (or that is a diagonal, or a number), and minimises

    ½⟨x − v, B(x − v)⟩ + ⟨x, AᵀW(Av − y)⟩ + weight · ‖∇x‖₂,₁,   x ≥ 0

by some steps of ADMM with z = ∇x: shrinkage, and a division by M = B + ρ(∇ᵀ∇ + 1) in the cosine transform. Nothing of
this touches A. v runs ahead with Nesterov's momentum, which is dropped where it points uphill. With a single inner step
and no momentum it is the preconditioned (linearised) ADMM of the textbooks, x⁺ = x − M⁻¹[Aᵀ(Ax − y) + ρ∇ᵀ(∇x − z + u)].
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import scipy.fft
import torch
from deepinv.physics import LinearPhysics
from deepinv.utils.mixins import MRIMixin
from numba import njit, prange
from torch import Tensor

from napari_recon.physics.normal_operator import NormalOperator
from napari_recon.physics.projectors import FAST, kernel_lock
from napari_recon.physics.xray import as_xray_transform
from napari_recon.reconstruction.start import (
    Start,
    brightness,
    data_volume,
    is_xray,
    operator_sqnorm,
    start_volume,
)
from napari_recon.reconstruction.streaming import StreamingReconstructor, Update, whole
from napari_recon.reconstruction.tv import TVPrior, differences, divergence_adjoint
from napari_recon.scans.errors import ScanError

Preconditioner = Literal["scalar", "diagonal", "circulant", "operator"]

RELAXATION = 1.7
"""Over-relaxation of the inner ADMM."""

INNER = 8
"""Inner steps of an iteration, where B is worth them."""

OPTIMISM = 0.6
"""B starts so far below what the first volume asks for: it need only majorise along the steps that are taken."""

GROWTH = 1.3
"""How much B grows where a step finds it too small."""

ROUNDING = 1e-5
"""Steps that change A x by less, relative to it, do not question B."""

FLOOR = 1e-3
"""No curvature is believed to be less than this part of the largest."""

SLAB = 2**18
"""Voxels whose split variables are worked on at a time, where that is not by fused kernels; on a GPU 64 times those."""

BALANCE = 10.0
"""The adaptive ρ moves where one relative residual is so many times the other."""


class PADMM(StreamingReconstructor):
    """Least squares with total variation over the whole volume, by preconditioned ADMM.

    Minimises ½‖W^½(Ax − y)‖² + weight · TV(x), x >= 0, the objective of :class:`TV`, in a few pairs of A and Aᵀ. The
    start decides how many, never the answer.

    Parameters
    ----------
    iterations
        Steps: a pair of A and Aᵀ each, and another A whenever B was found too small.
    regularization
        Relative weight of the total variation, see :func:`napari_recon.reconstruction.tv.tv_threshold`; its unit comes
        from the data, not from the start.
    rho
        Penalty that ties z to ∇x, relative: ρ = rho · ‖A‖² / 4, 4 being the squared norm of the differences along an
        axis. It changes how fast, not where to.
    preconditioner
        What stands for AᵀWA between projections. "circulant": a convolution, with the spectrum 1/ω of many views below
        ω_c and the flat one of single views above it; for other physics the positive part of ``operator``'s λ, or a
        spectrum that is estimated from a product with noise. "operator": a fitted normal operator, m C m, of which C
        is made positive: λ at its largest over the directions, and nowhere less than the spectrum of "circulant".
        "diagonal": the sums AᵀWA1 of SIRT and of Pock and Chambolle. "scalar": ‖A‖².
    nonnegative
        Whether values below zero are forbidden; complex volumes (MRI) have no sign, and are left as they are.
    init
        The start, as for :func:`napari_recon.reconstruction.start.start_volume`.
    weights
        Of the measurements, y's shape, such as counted photons: their ratios count, as they are divided by their mean.
    inner
        Inner steps an iteration; None is 8, or for "scalar" and "diagonal" 1: the linearised ADMM. Momentum comes with
        more than one.
    tolerance
        End where the relative primal and dual residuals are both below it (Boyd et al. 2011, section 3.3.1, divided
        by their scales as in Wohlberg 2017). 0 never does.
    adaptive
        Whether ρ is doubled or halved where one of them is ten times the other.
    scratch
        A folder on a disk for the split variables, where a volume is too large: nine volumes of the seventeen that an
        iteration takes, in files without a name that go with the run. The answer is the same to the last bit; the
        system keeps in memory what there is room for. None keeps them in memory. For the CPU.

    Notes
    -----
    Figures of every update: ``residual`` ‖Ax − y‖/‖y‖; ``objective``; ``primal`` ‖∇x − z‖ relative to the larger of
    the two; ``dual``, what is left of the gradient of the Lagrangian relative to its dual part (an estimate that costs
    no projection); ``pairs``, applications of A and Aᵀ so far, by two, with those of the set-up. The start's own are
    not among them but for FDK's one, nor is ‖A‖², which a physics keeps.

    Volumes with several channels are as many volumes; the two of MRI are one complex volume, with the magnitudes of
    its differences in the total variation.

    References
    ----------
    S. Boyd et al., Distributed optimization and statistical learning via ADMM, Found. Trends Mach. Learn. 3, 2011.
    B. Wohlberg, ADMM penalty parameter selection by residual balancing, arXiv:1704.06209, 2017.
    T. Pock and A. Chambolle, Diagonal preconditioning for first order primal-dual algorithms, ICCV 2011.
    """

    def __init__(
        self,
        iterations: int = 30,
        regularization: float = 1e-3,
        rho: float = 0.1,
        preconditioner: Preconditioner = "circulant",
        nonnegative: bool = True,
        init: Start = "fdk",
        weights: Tensor | None = None,
        inner: int | None = None,
        tolerance: float = 0.0,
        adaptive: bool = False,
        scratch: str | Path | None = None,
    ) -> None:
        super().__init__()
        if inner is not None and int(inner) < 1:
            raise ScanError(f"PADMM needs at least one inner step, not {inner}.")
        if not tolerance >= 0:
            raise ScanError(f"The tolerance of PADMM is {tolerance}; it must be 0 (run to the end) or more.")
        _Choices(int(iterations), float(regularization), float(rho), preconditioner)  # says what is wrong at once
        self.iterations, self.regularization, self.rho = int(iterations), float(regularization), float(rho)
        self.preconditioner, self.nonnegative, self.init = preconditioner, bool(nonnegative), init
        self.weights, self.inner = weights, None if inner is None else int(inner)
        self.tolerance, self.adaptive = float(tolerance), bool(adaptive)
        self.scratch = None if scratch is None else Path(scratch)
        if self.scratch is not None and not self.scratch.is_dir():
            raise ScanError(
                f"PADMM's split variables cannot be in {self.scratch}, which is no folder: create it, or name another."
            )

    @torch.no_grad()
    def stream(
        self,
        y: Tensor,
        physics: LinearPhysics,
        init: Start | None = None,
        operator: NormalOperator | None = None,
        settings: Callable[[], Mapping[str, Any]] | None = None,
        unit: float | None = None,
        **options: Any,
    ) -> Iterator[Update]:
        """Yield the start, then the volume after each iteration.

        Parameters
        ----------
        y, physics, init
            Measurements, their physics, and a start that overrides the constructor's.
        operator
            H ≈ AᵀA, which the preconditioner "operator" needs; "circulant" uses it where the physics is no X-ray's.
        settings
            Asked before every iteration for what has changed since: any of ``regularization``, ``rho``,
            ``iterations``, ``preconditioner``, ``operator`` (which another preconditioner may need) and ``init`` (a
            volume, or the name of a start). Changes hold from that iteration on; the volume and the duals stay, but
            for a new ``init``.
        unit
            The brightness that ``regularization`` is relative to, where this is a part of something larger; None takes
            that of FDK.

        Raises
        ------
        ScanError
            If a setting, the weights or the operator do not fit.
        """
        choices = _Choices(self.iterations, self.regularization, self.rho, self.preconditioner)
        start = self.init if init is None else init
        data = _Data(y, physics, self.weights)
        x = start_volume(start, y, physics)
        sqnorm = operator_sqnorm(physics, tuple(x.shape[1:]), x.device)
        # FDK, or Aᵀy elsewhere: the unit of the weights comes from the data, not from the start.
        reference = (
            x if isinstance(start, str) and start == "fdk" and is_xray(physics) else data_volume(y, physics, sqnorm)
        )
        data.half_pairs += 1
        iteration, box = 0, whole(x)
        unit = brightness(reference) if unit is None else unit
        solver = _Solver(data, sqnorm, unit, self.nonnegative, self.inner, operator, self.scratch)
        solver.begin(x, choices, reference)
        del x, reference  # room for a volume or two while the generator lives
        yield Update(box, solver.volume, 0, choices.iterations, solver.figures(), box)
        while True:
            if settings is not None:
                asked = settings()
                if asked.get("operator") is not None:
                    solver.operator = asked["operator"]
                changed = choices.changed(asked)
                if changed.init is not None and not _same(changed.init, start):
                    start = changed.init
                    solver.begin(start_volume(start, y, physics), changed)
                elif changed != choices:
                    solver.change(changed)
                choices = changed
            if iteration >= choices.iterations:
                return
            solver.iterate()
            iteration += 1
            figures = solver.figures()
            done = max(figures["primal"], figures["dual"]) < self.tolerance
            following = box if iteration < choices.iterations and not done else None
            yield Update(box, solver.volume, iteration, max(choices.iterations, iteration), figures, following)
            if done:
                return
            if self.adaptive and (factor := _balance(figures["primal"], figures["dual"])) != 1:
                choices = choices.changed({"rho": choices.rho * factor})
                solver.change(choices)


@dataclass(frozen=True)
class _Choices:
    """What a person may change while it runs."""

    iterations: int
    regularization: float
    rho: float
    preconditioner: Preconditioner
    init: Start | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ScanError(f"PADMM needs at least one iteration, not {self.iterations}.")
        if not self.regularization >= 0:
            raise ScanError(f"The regularisation is {self.regularization}; it must be 0 or more.")
        if not (math.isfinite(self.rho) and self.rho > 0):
            raise ScanError(f"The penalty rho is {self.rho}; it must be more than 0.")
        if self.preconditioner not in get_args(Preconditioner):
            names = ", ".join(map(repr, get_args(Preconditioner)))
            raise ScanError(f"The preconditioner {self.preconditioner!r} is unknown: use one of {names}.")

    def changed(self, settings: Mapping[str, Any]) -> _Choices:
        """The same with what ``settings`` holds; a missing key, or None, leaves what there was."""
        given = {key: value for key, value in settings.items() if value is not None}
        return _Choices(
            int(given.get("iterations", self.iterations)),
            float(given.get("regularization", self.regularization)),
            float(given.get("rho", self.rho)),
            given.get("preconditioner", self.preconditioner),
            given.get("init"),
        )

    def __eq__(self, other: object) -> bool:
        """Whether the numbers are the same; starts are compared by who knows the last one."""
        return (
            isinstance(other, _Choices)
            and all(getattr(self, name) == getattr(other, name) for name in ("iterations", "regularization", "rho"))
            and self.preconditioner == other.preconditioner
        )


def _same(first: Start | None, second: Start | None) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return first is second
    return first == second


def _balance(primal: float, dual: float) -> float:
    return 2.0 if primal > BALANCE * dual else 0.5 if dual > BALANCE * primal else 1.0


class _Data:
    """The data term: A, Aᵀ and the weights, and how often they were used."""

    def __init__(self, y: Tensor, physics: LinearPhysics, weights: Tensor | None) -> None:
        self.y, self.physics, self.half_pairs = y, physics, 0
        self.size = float(torch.linalg.vector_norm(y))
        self.weights: Tensor | None = None
        if weights is not None:
            if weights.shape != y.shape:
                raise ScanError(
                    f"The weights have the shape {tuple(weights.shape)}, but the measurements {tuple(y.shape)}."
                )
            mean = float(weights.double().mean())
            if not (math.isfinite(mean) and mean > 0 and bool((weights >= 0).all())):
                raise ScanError("The weights of the measurements must be finite, none negative, and not all 0.")
            self.weights = weights.to(y) / mean
        self.is_complex = isinstance(physics, MRIMixin)

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        self.half_pairs += 1
        return self.physics.A(self.outside(x))

    def gradient(self, ax: Tensor) -> Tensor:
        """AᵀW(ax − y)."""
        return self.adjoint(self.weighted(ax - self.y))

    def adjoint(self, r: Tensor) -> Tensor:
        """Aᵀ r."""
        self.half_pairs += 1
        return self.inside(self.physics.A_adjoint(r))

    def weighted(self, r: Tensor) -> Tensor:
        """W r."""
        return r if self.weights is None else self.weights * r

    def square(self, r: Tensor) -> float:
        """⟨r, W r⟩."""
        if self.weights is not None:
            r = self.weights.sqrt() * r
        return float(torch.linalg.vector_norm(r)) ** 2

    def inside(self, x: Tensor) -> Tensor:
        """The volume as it is computed with: complex where two channels are its parts."""
        return torch.view_as_complex(x.movedim(1, -1).contiguous()).unsqueeze(1) if self.is_complex else x

    def outside(self, x: Tensor) -> Tensor:
        """The volume as the physics has it."""
        return torch.view_as_real(x.squeeze(1)).movedim(-1, 1).contiguous() if self.is_complex else x


class _Solver:
    """The state of a run: the volume, what its momentum needs, and the split variables.

    Volumes that live at once decide how large a problem fits: x, v, T(x − x of before), the gradient, w, e, 1/M and a
    buffer, beside the split variables and their copy.
    """

    def __init__(
        self,
        data: _Data,
        sqnorm: float,
        unit: float,
        nonnegative: bool,
        inner: int | None,
        operator: NormalOperator | None,
        scratch: Path | None,
    ) -> None:
        self.data, self.sqnorm, self.operator, self.unit = data, sqnorm, operator, unit
        self.nonnegative, self.inner, self.scratch = nonnegative and not data.is_complex, inner, scratch

    # -- where it stands ------------------------------------------------------------------------------------------

    def begin(self, x: Tensor, choices: _Choices, reference: Tensor | None = None) -> None:
        """Start, or start over, from a volume as the physics has it, which may be changed.

        Parameters
        ----------
        x
            The volume.
        choices
            The settings.
        reference
            What the data say at once, where it is at hand: the scale of B where x is empty.
        """
        self.x = self.data.inside(x)
        if self.nonnegative:
            self.x.clamp_(min=0)
        self.ax = self.data.forward(self.x) if bool(self.x.any()) else torch.zeros_like(self.data.y)
        self.kind: Preconditioner | None = None
        self.primal = self.dual = 1.0
        self._apply(choices, reference)
        self._rest()

    def change(self, choices: _Choices) -> None:
        """Go on with other settings, from the same volume and duals."""
        self._apply(choices)
        self._rest()

    def _apply(self, choices: _Choices, reference: Tensor | None = None) -> None:
        self.weight = choices.regularization * self.sqnorm * self.unit
        self.rho = choices.rho * self.sqnorm / 4
        anew = self.kind is None
        if self.kind != choices.preconditioner:
            self.kind = choices.preconditioner
            self.metric = _metric(self.kind, self.data, self.x, self.sqnorm, self.operator, self.nonnegative)
            if not self.metric.is_diagonal:
                self.metric.scale = OPTIMISM * self._curvature(self.metric, reference)
        # x ≥ 0 is split off as v = x where M does not commute with it; where M is a diagonal, x is only clipped.
        split_off = self.nonnegative and not self.metric.is_diagonal
        if anew:
            self.split = _Split(self.x, self.weight, self.rho, split_off, self.scratch)
        else:
            self.split.rescale(self.weight, self.rho, self.x, split_off)

    def _curvature(self, metric: _Metric, reference: Tensor | None) -> float:
        """‖W^½Ax‖² / ⟨x, Bx⟩ of the volume, or of the reference where that is empty."""
        x, ax = self.x, self.ax
        if not bool(x.any()):
            if reference is None:
                reference = data_volume(self.data.y, self.data.physics, self.sqnorm)
                self.data.half_pairs += 1
            x = self.data.inside(reference)
            ax = self.data.forward(x)
        found = self.data.square(ax) / max(metric.square(metric.forward(x)), 1e-30)
        return found if found > 0 else self.sqnorm

    def _rest(self) -> None:
        """Lose the momentum: v = x."""
        self.ahead, self.a_ahead = self.x, self.ax
        self.step, self.momentum, self.t = self.x.new_zeros(()), 0.0, 1.0

    @property
    def volume(self) -> Tensor:
        """The volume as the physics has it."""
        return self.data.outside(self.x)

    def figures(self) -> dict[str, float]:
        """Those of the volume as it is."""
        residual = self.ax - self.data.y
        left = float(torch.linalg.vector_norm(residual))
        return {
            "residual": left / self.data.size if self.data.size else 0.0,
            "objective": 0.5 * (left**2 if self.data.weights is None else self.data.square(residual))
            + self.weight * self._total_variation(),
            "primal": self.primal,
            "dual": self.dual,
            "pairs": self.data.half_pairs / 2,
        }

    def _total_variation(self) -> float:
        if self.x.is_complex():
            return float(_length(differences(self.x)).sum())
        return float(TVPrior().fn(self.x).sum())

    # -- an iteration ---------------------------------------------------------------------------------------------

    def iterate(self) -> None:
        """One A and one Aᵀ, and as many more A as B was too small."""
        metric, split = self.metric, self.split
        gradient = self.data.gradient(self.a_ahead)
        steps = self.inner or (1 if metric.is_diagonal else INNER)
        if not metric.is_diagonal:
            split.save()
        while True:
            x = self._minimise(gradient, steps)
            ax = self.data.forward(x)
            step = metric.forward(x - self.x, overwrite=True)
            moved = step - self.momentum * self.step  # T(x − v)
            true, believed = self.data.square(ax - self.a_ahead), metric.square(moved)
            # Steps that rounding has spoilt tell nothing.
            told = math.isfinite(true) and believed > 0 and true > ROUNDING**2 * self.data.square(ax)
            if metric.is_diagonal or true <= 1.001 * believed or not told:
                break
            metric.scale *= max(GROWTH, 1.05 * true / believed)
            split.restore()
            del x, step, moved
        del gradient
        if steps > 1:
            if metric.inner(moved, step) < 0:
                self.t = 1.0  # adaptive restart (O'Donoghue and Candès 2015), in the metric of B
            t_next = (1 + math.sqrt(1 + 4 * self.t**2)) / 2
            self.momentum, self.t, self.step = (self.t - 1) / t_next, t_next, step
            self.a_ahead = torch.add(ax, ax - self.ax, alpha=self.momentum)
            self.ahead = torch.sub(x, self.x).mul_(self.momentum).add_(x)
        else:
            self.ahead, self.a_ahead = x, ax
        self.x, self.ax = x, ax

    def _minimise(self, gradient: Tensor, steps: int) -> Tensor:
        """Some steps of ADMM on the majoriser about the volume ahead; from the last volume and duals."""
        metric, split, rho = self.metric, self.split, self.rho
        inverse = metric.inverse(rho)
        w, spare = self.x, torch.empty_like(self.x)
        # e = T(w − v) is carried along, so that a step costs one transform and one back.
        e = (-self.momentum * self.step).expand(self.x.shape).contiguous()
        for step in range(steps):
            change = metric.forward_dual(split.pull(w, spare).mul_(rho).add_(gradient))
            change.addcmul_(metric.curvature, e, value=metric.scale)
            if step == steps - 1:
                slope = float(torch.linalg.vector_norm(change))
            e.addcmul_(change, inverse, value=-1)
            spare = w if step else torch.empty_like(w)  # the first w is the volume itself
            w = metric.backward(change.copy_(e)).add_(self.ahead)
            if self.nonnegative and metric.is_diagonal:
                w.clamp_(min=0)
                torch.sub(w, self.ahead, out=e)
            split.update(w)
        gap, scale, dual = split.residuals(w)
        self.primal = gap / scale if scale else 0.0
        slope += metric.norm(e)
        self.dual = slope / (rho * dual) if dual else 1.0
        return w if split.p is None else torch.clamp(split.p, min=0, out=w)


# ---------------------------------------------------------------------------------------------------------------
# The split variables


class _Split:
    """z = ∇x and v = x, with their scaled duals u and s.

    Kept is q = z + u, after which z = (1 − t) q and u = t q with t = min(1, κ/|q|), κ = weight/ρ; likewise p = v + s,
    v = max(p, 0) and s = min(p, 0). Begins at z = ∇x with u along it, where x is not flat: what the optimum would have.

    Everything here is local: differences reach a voxel. So it is done in slabs of the first axis, which read a slice
    more on either side: exact, but for the order of sums. What is in between is so needed for a slab at a time (the
    fused kernels have nothing in between), and with ``scratch`` q, t, p and their copy are mapped files.
    """

    def __init__(self, x: Tensor, weight: float, rho: float, nonnegative: bool, scratch: Path | None = None) -> None:
        self.weight, self.rho, self.kappa, self.scratch = weight, rho, weight / rho, scratch
        self.q, self.t = self._space(x, x.ndim - 2), self._space(x.real if x.is_complex() else x)
        for a, b in _slabs(x):
            z = _differences(x, a, b)
            length = _length(z)
            self.q[:, :, :, a:b] = z * (1 + self.kappa / torch.where(length > 0, length, 1.0))
            self.t[:, :, a:b] = self.kappa / (length + self.kappa) if self.kappa > 0 else 0.0
        self.p = self._space(x).copy_(x) if nonnegative else None
        self._saved: tuple[Tensor, Tensor | None] | None = None
        self._fused = x.device.type == "cpu" and x.dtype == torch.float32

    def _space(self, like: Tensor, *more: int) -> Tensor:
        """A tensor for ``more`` volumes like one."""
        shape = (*more, *like.shape)
        if self.scratch is None:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        if like.device.type != "cpu":
            raise ScanError("PADMM's split variables can be in files on the CPU only: leave out scratch.")
        dtype = like.new_empty(0).numpy().dtype
        size = math.prod(shape) * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self.scratch) as file:
                if hasattr(os, "posix_fallocate"):  # a disk that is full only later ends the process
                    os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_numpy(np.memmap(file, dtype, "w+", shape=shape))
        except OSError as error:
            raise ScanError(
                f"PADMM's split variables need {size / 1e9:.3g} GB more in {self.scratch} ({error.strerror}): name a "
                "folder with more room."
            ) from None

    def save(self) -> None:
        """Keep a copy for :meth:`restore`."""
        if self._saved is None or (self._saved[1] is None) != (self.p is None):
            self._saved = self._space(self.q[0], len(self.q)), None if self.p is None else self._space(self.p)
        q, p = self._saved
        q.copy_(self.q)
        if p is not None and self.p is not None:
            p.copy_(self.p)

    def restore(self) -> None:
        """Be as when saved."""
        assert self._saved is not None
        q, p = self._saved
        self.q.copy_(q)
        if p is not None and self.p is not None:
            self.p.copy_(p)
        self._scale()

    def _scale(self) -> None:
        """t, which follows from q."""
        for a, b in _slabs(self.t):
            self.t[:, :, a:b] = self._scaled(self.q[:, :, :, a:b])

    def _scaled(self, q: Tensor) -> Tensor:
        length = _length(q)
        return torch.where(length > self.kappa, self.kappa / length.clamp(min=1e-30), 1.0)

    def rescale(self, weight: float, rho: float, x: Tensor, nonnegative: bool) -> None:
        """Another weight or ρ: z and ρu stay, but for |ρu| ≤ weight."""
        ratio, kappa = self.rho / rho, weight / rho
        self.weight, self.rho, self.kappa = weight, rho, kappa
        for a, b in _slabs(x):
            q, t = self.q[:, :, :, a:b], self.t[:, :, a:b]
            z, u = q * (1 - t), q * (t * ratio)
            q[...] = z + u * (kappa / _length(u).clamp(min=1e-30)).clamp(max=1)
            if self.p is not None:
                p = self.p[:, :, a:b]
                p[...] = p.clamp(min=0) + ratio * p.clamp(max=0)
        self._scale()
        if not nonnegative:
            self.p = None
        elif self.p is None:
            self.p = self._space(x).copy_(x)

    def update(self, w: Tensor) -> None:
        """Shrink, and move the duals."""
        if self._fused:
            for at in np.ndindex(*w.shape[:2]):
                p = _EMPTY if self.p is None else _volume(self.p[at])
                with kernel_lock:
                    _update(
                        _volume(w[at]),
                        _volumes(self.q[(slice(None), *at)]),
                        _volume(self.t[at]),
                        p,
                        np.float32(RELAXATION),
                        np.float32(self.kappa),
                        self.p is not None,
                    )
            return
        for a, b in _slabs(w):
            q, t = self.q[:, :, :, a:b], self.t[:, :, a:b]
            q[...] = RELAXATION * _differences(w, a, b) - (RELAXATION - 1) * (q * (1 - t)) + q * t
            t[...] = self._scaled(q)
            if self.p is not None:
                p = self.p[:, :, a:b]
                p[...] = RELAXATION * w[:, :, a:b] - (RELAXATION - 1) * p.clamp(min=0) + p.clamp(max=0)

    def pull(self, w: Tensor, out: Tensor) -> Tensor:
        """∇ᵀ(∇w − z + u) + (w − v + s), the gradient of the penalties, over ρ; in ``out``."""
        if self._fused:
            for at in np.ndindex(*w.shape[:2]):
                p = _EMPTY if self.p is None else _volume(self.p[at])
                q, t = _volumes(self.q[(slice(None), *at)]), _volume(self.t[at])
                with kernel_lock:
                    _pull(_volume(w[at]), q, t, p, _volume(out[at]), self.p is not None)
            return out
        for a, b in _slabs(w):
            c, d = max(a - 1, 0), min(b + 1, w.shape[2])
            force = _differences(w, c, d) + (2 * self.t[:, :, c:d] - 1) * self.q[:, :, :, c:d]
            out[:, :, a:b] = divergence_adjoint(force)[:, :, a - c : b - c]
            if self.p is not None:
                out[:, :, a:b] += w[:, :, a:b] - self.p[:, :, a:b].abs()
        return out

    def residuals(self, w: Tensor) -> tuple[float, float, float]:
        """‖∇w − z‖, the larger norm of the two, and ‖∇ᵀu + s‖."""
        squares = np.zeros(4)
        for a, b in _slabs(w):
            c, d = max(a - 1, 0), min(b + 1, w.shape[2])
            dw, z = _differences(w, a, b), self.q[:, :, :, a:b] * (1 - self.t[:, :, a:b])
            force = divergence_adjoint(self.q[:, :, :, c:d] * self.t[:, :, c:d])[:, :, a - c : b - c]
            if self.p is not None:
                force += self.p[:, :, a:b].clamp(max=0)
            parts = (torch.view_as_real(v) if v.is_complex() else v for v in (dw - z, dw, z, force))
            squares += [float(torch.linalg.vector_norm(v)) ** 2 for v in parts]
        gap, first, second, dual = np.sqrt(squares).tolist()
        return gap, max(first, second), dual


def _slabs(x: Tensor) -> Iterator[tuple[int, int]]:
    """Where slabs of about SLAB voxels begin and end on the first spatial axis of (B, C, *spatial)."""
    length = x.shape[2]
    voxels = SLAB if x.device.type == "cpu" else 64 * SLAB
    thickness = max(1, voxels * length // max(1, x.numel()))
    return ((first, min(first + thickness, length)) for first in range(0, length, thickness))


def _differences(x: Tensor, first: int, last: int) -> Tensor:
    """differences(x)[:, :, :, first:last]."""
    return differences(x[:, :, first : last + 1])[:, :, :, : last - first]


_EMPTY = np.zeros((1, 1, 1), np.float32)


def _volume(x: Tensor) -> Any:
    """A real float32 volume or slice as a (D, H, W) array."""
    return x.numpy().reshape(*[1] * (3 - x.ndim), *x.shape)


def _volumes(x: Tensor) -> Any:
    """(axes, ...) as (axes, D, H, W)."""
    return x.numpy().reshape(x.shape[0], *[1] * (4 - x.ndim), *x.shape[1:])


def _length(z: Tensor) -> Tensor:
    """|z| over the axes."""
    # Not torch's norm, which takes twenty times as long along a short first axis.
    squares = z.real.square() + z.imag.square() if z.is_complex() else z.square()
    return squares.sum(0).sqrt()


# Two dimensions are volumes of one slice: its differences across are 0, and q's first axis is then y.


@njit(parallel=True, **FAST)
def _update(w: Any, q: Any, t: Any, p: Any, relax: Any, kappa: Any, split: bool) -> None:
    depth, height, width = w.shape
    first = q.shape[0] - 2
    one = np.float32(1)
    over = relax - one
    square = kappa * kappa
    for task in prange(depth * height):
        k, j = task // height, task % height
        here, above, beyond = w[k, j], w[min(k + 1, depth - 1), j], w[k, min(j + 1, height - 1)]
        qz, qy, qx, tt = q[0, k, j], q[first, k, j], q[first + 1, k, j], t[k, j]
        for i in range(width):
            value = here[i]
            right = here[i + 1] if i < width - 1 else value
            kept = tt[i] - over * (one - tt[i])  # q → u − (relax − 1) z
            y = relax * (beyond[i] - value) + kept * qy[i]
            x = relax * (right - value) + kept * qx[i]
            length = y * y + x * x
            if first:
                z = relax * (above[i] - value) + kept * qz[i]
                qz[i] = z
                length += z * z
            qy[i] = y
            qx[i] = x
            tt[i] = kappa / np.sqrt(length) if length > square else one
        if split:
            pp = p[k, j]
            for i in range(width):
                before = pp[i]
                pp[i] = relax * here[i] + (before if before < 0 else -over * before)


@njit(parallel=True, **FAST)
def _pull(w: Any, q: Any, t: Any, p: Any, out: Any, split: bool) -> None:
    depth, height, width = w.shape
    first = q.shape[0] - 2
    one, two = np.float32(1), np.float32(2)
    for task in prange(depth * height):
        k, j = task // height, task % height
        here, o, tt = w[k, j], out[k, j], t[k, j]
        # No branches inside: before the first row and behind the last the row itself is read, times 0 or less itself.
        before, after, inside = max(j - 1, 0), min(j + 1, height - 1), np.float32(j > 0)
        a, b, qy, q_before, t_before = w[k, before], w[k, after], q[first, k, j], q[first, k, before], t[k, before]
        for i in range(width):
            o[i] = inside * ((here[i] - a[i]) + (two * t_before[i] - one) * q_before[i])
            o[i] -= (b[i] - here[i]) + (two * tt[i] - one) * qy[i]
        if first:
            up, down, inside = max(k - 1, 0), min(k + 1, depth - 1), np.float32(k > 0)
            a, b, qz, q_up, t_up = w[up, j], w[down, j], q[0, k, j], q[0, up, j], t[up, j]
            for i in range(width):
                o[i] += inside * ((here[i] - a[i]) + (two * t_up[i] - one) * q_up[i])
                o[i] -= (b[i] - here[i]) + (two * tt[i] - one) * qz[i]
        qx = q[first + 1, k, j]
        for i in range(width - 1):
            o[i] -= (here[i + 1] - here[i]) + (two * tt[i] - one) * qx[i]
        o[width - 1] -= (two * tt[width - 1] - one) * qx[width - 1]
        for i in range(1, width):  # not carried over from the loop before, so that both are vectorised
            o[i] += (here[i] - here[i - 1]) + (two * tt[i - 1] - one) * qx[i - 1]
        if split:
            pp = p[k, j]
            for i in range(width):
                o[i] += here[i] - abs(pp[i])


# ---------------------------------------------------------------------------------------------------------------
# What stands for AᵀWA


class _Metric:
    """B = scale · m T⁻¹ curvature T m with an orthonormal T, and M = B + ρ(∇ᵀ∇ + 1), or a little more.

    Attributes
    ----------
    curvature
        Over T's domain; an axis of length 1 where it does not vary along it.
    pull
        What stands there for ∇ᵀ∇ + 1, or ∇ᵀ∇ where values may be negative, as a sum of terms that vary along one axis:
        its eigenvalues where T is the cosine transform, whose even continuation is the border without differences;
        those of the periodic differences, which are no smaller, for a Fourier transform; a number for a diagonal.
    mask
        m, or None for 1.
    """

    def __init__(self, curvature: Tensor, pull: list[Tensor], transform: str, mask: Tensor | None = None) -> None:
        self.transform, self.mask, self.scale = transform, mask, 1.0
        self.curvature = curvature
        self.pull = pull if mask is None else [term / float(mask.min()) ** 2 for term in pull]
        self.is_diagonal = transform == "none"

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """T m x; with ``overwrite`` x may be lost."""
        return self._transform(x, overwrite) if self.mask is None else self._transform(self.mask * x, True)

    def forward_dual(self, g: Tensor) -> Tensor:
        """T m⁻¹ g, for a gradient g, which may be lost."""
        return self._transform(g if self.mask is None else g.div_(self.mask), True)

    def backward(self, s: Tensor) -> Tensor:
        """m⁻¹ T⁻¹ s; s may be lost."""
        if self.transform == "none":
            return s
        if self.transform == "fourier":
            x = torch.fft.ifftn(s, dim=tuple(range(2, s.ndim)), norm="ortho")
        else:
            x = cosine_transform(s, inverse=True, overwrite=True)
        return x if self.mask is None else x.div_(self.mask)

    def _transform(self, x: Tensor, overwrite: bool) -> Tensor:
        if self.transform == "none":
            return x if overwrite else x.clone()
        if self.transform == "fourier":
            return torch.fft.fftn(x, dim=tuple(range(2, x.ndim)), norm="ortho")
        return cosine_transform(x, overwrite=overwrite)

    def inverse(self, rho: float) -> Tensor:
        """M⁻¹ over T's domain."""
        found = self.curvature * self.scale
        for term in reversed(self.pull):  # the first axis last: a curvature of X-rays does not vary along it
            found = found + rho * term
        return found.reciprocal_()

    def square(self, s: Tensor) -> float:
        """⟨x, Bx⟩ of T m x."""
        return self.inner(s, s)

    def inner(self, s: Tensor, r: Tensor) -> float:
        """⟨x, By⟩ of T m x and T m y."""
        parts = ((self._curved(s, a, b), r[:, :, a:b]) for a, b in _slabs(s))
        return self.scale * sum(float(torch.vdot(f.flatten(), g.flatten()).real) for f, g in parts)

    def norm(self, s: Tensor) -> float:
        """‖m⁻¹Bx‖ of T m x, but for m."""
        return self.scale * math.hypot(*(float(torch.linalg.vector_norm(self._curved(s, a, b))) for a, b in _slabs(s)))

    def _curved(self, s: Tensor, first: int, last: int) -> Tensor:
        """Multiply a slab of s by the curvature."""
        curvature, axes = self.curvature, s.ndim - 2
        if curvature.ndim >= axes and curvature.shape[-axes] > 1:
            curvature = curvature.narrow(-axes, first, last - first)
        return s[:, :, first:last] * curvature


def cosine_transform(x: Tensor, inverse: bool = False, overwrite: bool = False) -> Tensor:
    """The orthonormal cosine transform (DCT-II) over the spatial axes of (B, C, *spatial), or its inverse.

    With ``overwrite`` it is made in place of x where that saves memory.
    """
    if x.device.type != "cpu":
        return cosine_by_fourier(x, inverse)
    transform = scipy.fft.idctn if inverse else scipy.fft.dctn
    axes = tuple(range(2, x.ndim))
    workers = torch.get_num_threads()
    return torch.from_numpy(transform(x.numpy(), axes=axes, norm="ortho", overwrite_x=overwrite, workers=workers))


def cosine_by_fourier(x: Tensor, inverse: bool = False) -> Tensor:
    """The same, axis by axis through a Fourier transform of twice the length, where there is no scipy."""
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        angle = torch.arange(n, device=x.device, dtype=x.dtype) * (math.pi / (2 * n))
        scale = torch.full_like(angle, math.sqrt(2 / n))
        scale[0] = math.sqrt(1 / n)
        x = x.movedim(axis, -1)
        if inverse:
            x = torch.fft.ifft(torch.polar(scale, angle) * x, n=2 * n).real[..., :n] * (2 * n)
        else:
            x = (torch.fft.fft(x, n=2 * n)[..., :n] * torch.polar(scale, -angle)).real
        x = x.movedim(-1, axis)
    return x.contiguous()


def _metric(
    kind: Preconditioner,
    data: _Data,
    x: Tensor,
    sqnorm: float,
    operator: NormalOperator | None,
    nonnegative: bool,
) -> _Metric:
    """What a preconditioner's name stands for, for volumes like x."""
    axes = [n for n in x.shape[2:] if n > 1]
    real = x.real.dtype
    if kind in ("scalar", "diagonal"):
        pull = torch.full((), 4.0 * len(axes), dtype=real, device=x.device)  # ‖∇‖²
        if kind == "scalar":
            largest = 1.0 if data.weights is None else float(data.weights.max())
            return _Metric(torch.full_like(pull, largest * sqnorm), [pull], "none")
        return _Metric(_row_sums(data, x, sqnorm), [pull], "none")
    if kind == "operator" and operator is None:
        raise ScanError("The preconditioner 'operator' needs a fitted normal operator: fit one, or use 'circulant'.")
    transform = "fourier" if data.is_complex else "cosine"
    frequencies = [_frequencies(n, transform).to(x.device, real) for n in x.shape[2:]]
    pulls = [2 - 2 * torch.cos(2 * math.pi * f) for f in _along_axes(frequencies)]
    pulls[-1] = pulls[-1] + float(nonnegative)
    xray = is_xray(data.physics)
    mask = None
    if xray:
        curvature = _xray_spectrum(data.physics, frequencies)
    if operator is not None and (kind == "operator" or not xray):
        if operator.shape != tuple(x.shape[2:]):
            raise ScanError(
                f"The normal operator stands for volumes of {operator.shape} voxels, not {tuple(x.shape[2:])}; fit it "
                "again for this volume."
            )
        fitted = _spectrum_of(operator.to(x.device), frequencies)
        if xray:  # a fit is right on average, and has holes that the envelope fills
            fitted = _largest_over_directions(fitted)
            scale = float((fitted * curvature).mean() / curvature.square().mean())
            fitted = torch.maximum(fitted, scale * curvature)
        curvature = fitted
        if kind == "operator":
            mask = operator.spatial_mask.to(x.device).abs().to(real)
            mask = (mask / mask.max()).clamp(min=0.5)
    elif not xray:
        curvature = _estimated_spectrum(data, x, transform)
    return _Metric(curvature.clamp(min=FLOOR * float(curvature.max())), pulls, transform, mask)


def _row_sums(data: _Data, x: Tensor, sqnorm: float) -> Tensor:
    """AᵀWA1, a diagonal no smaller than AᵀWA where A has no negative entries; made so where it has."""
    ones = torch.ones_like(x)
    sums = data.adjoint(data.weighted(data.forward(ones))).abs()
    floor = FLOOR * float(sums.max()) if float(sums.max()) > 0 else sqnorm
    sums = sums.clamp(min=floor)
    if is_xray(data.physics):
        return sums
    # The largest eigenvalue of D^-½ AᵀWA D^-½, with a tenth to spare.
    root = sums.rsqrt()
    v = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    largest = 0.0
    for _ in range(20):
        v = v / torch.linalg.vector_norm(v).clamp(min=1e-30)
        v = root * data.adjoint(data.weighted(data.forward(root * v)))
        before, largest = largest, float(torch.linalg.vector_norm(v))
        if abs(largest - before) < 0.02 * largest:
            break
    return sums * max(1.0, 1.1 * largest)


def _frequencies(n: int, transform: str) -> Tensor:
    """Cycles a voxel."""
    return torch.fft.fftfreq(n) if transform == "fourier" else torch.arange(n) / (2 * n)


def _along_axes(values: list[Tensor]) -> list[Tensor]:
    """Values of every axis, to be broadcast over the whole grid."""
    return [v.reshape(-1, *[1] * (len(values) - 1 - axis)) for axis, v in enumerate(values)]


def _xray_spectrum(physics: LinearPhysics, frequencies: list[Tensor]) -> Tensor:
    """The envelope of AᵀA's spectrum, but for its scale: (1 + ω/ω_c) / ω across the rotation axis, ω_c = V/(πL).

    Below ω_c the views overlap, and AᵀA is 1/ω. Above it every view has a slab of frequencies for itself, and AᵀA is as
    large there as at ω_c; since rays of a cone or a fan turn with position, no direction can be told apart from others.
    The first of the three axes, along which it does not vary, has length 1.
    """
    xray = as_xray_transform(physics)
    h = xray.grid.voxel_size
    _, fy, fx = _along_axes([f.double() / h for f in frequencies])
    omega = torch.hypot(fy, fx).clamp(min=1 / (4 * h * max(xray.grid.shape[1:])))
    omega_c = xray.geometry.views / (math.pi * max(xray.grid.extent[1:]))
    found = (1 + omega / omega_c) / omega
    return (found / found.max()).to(frequencies[0].dtype)[None]


def _estimated_spectrum(data: _Data, x: Tensor, transform: str) -> Tensor:
    """That of AᵀWA from its product with noise, the largest among neighbouring frequencies' means."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    probe = _Metric(torch.ones(()), [], transform)
    first = probe.forward(noise)
    second = probe.forward(data.adjoint(data.weighted(data.forward(noise))))
    axes = x.ndim - 2
    across = (first.conj() * second).real.sum((0, 1))[None, None]
    power = first.abs().square().sum((0, 1))[None, None]
    pool = {2: torch.nn.functional.avg_pool2d, 3: torch.nn.functional.avg_pool3d}[axes]
    largest = {2: torch.nn.functional.max_pool2d, 3: torch.nn.functional.max_pool3d}[axes]
    width = [3 if n > 2 else 1 for n in x.shape[2:]]
    around = [n // 2 for n in width]
    mean = pool(across, width, 1, around) / pool(power, width, 1, around).clamp(min=1e-30)
    return largest(mean, width, 1, around)[0, 0].clamp(min=0)


def _spectrum_of(operator: NormalOperator, frequencies: list[Tensor]) -> Tensor:
    """The positive part of C₀'s λ at other frequencies, the largest of those that differ by signs."""
    terms = operator.fourier_filter if operator.terms > 1 else operator.fourier_filter.unsqueeze(0)
    spectrum = (terms[0].real if terms.is_complex() else terms[0]).clamp(min=0)
    halved = not operator.full_spectrum
    found: Tensor | None = None
    for signs in np.ndindex(*[2] * len(frequencies)):
        if any(signs) and bool((frequencies[0] < 0).any()):
            break  # a Fourier transform tells signs apart
        if halved and signs[-1]:
            continue  # λ of a real kernel is the same at −ω
        part = spectrum
        for axis, (f, sign, length) in enumerate(zip(frequencies, signs, operator.lengths, strict=True)):
            at = torch.round(f.double() * length).long() * (-1 if sign else 1) % length
            part = part.index_select(axis, at.clamp(max=part.shape[axis] - 1))
        found = part if found is None else torch.maximum(found, part)
    assert found is not None
    return found


def _largest_over_directions(spectrum: Tensor) -> Tensor:
    """Its maximum over all in-plane directions at a distance from the last two axes' origin, slice by slice."""
    rows, columns = spectrum.shape[-2:]
    # Rings of equal physical frequency: an axis of n samples has a spacing of 1/n.
    span = max(rows, columns)
    i = torch.arange(rows, device=spectrum.device)[:, None] * (span / rows)
    j = torch.arange(columns, device=spectrum.device)[None] * (span / columns)
    ring = torch.hypot(i, j).round().long().flatten()
    flat = spectrum.reshape(-1, rows * columns)
    found = flat.new_zeros((len(flat), int(ring.max()) + 1))
    found.scatter_reduce_(1, ring.expand_as(flat), flat, "amax")
    return found[:, ring].reshape(spectrum.shape)
