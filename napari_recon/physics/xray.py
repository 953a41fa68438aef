"""The X-ray transform: line integrals of a volume along measured rays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from deepinv.physics import LinearPhysics, Physics
from numpy.typing import NDArray
from torch import Tensor

from napari_recon.physics.devices import resolve_device
from napari_recon.physics.projectors import Projector, Rays, projector_for
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Box, Grid

if TYPE_CHECKING:
    from napari_recon.scans.scan import Scan

# The norm of A is first estimated on a grid of about this many voxels along an axis, from as many views.
COARSE = 32

# Bytes of projections that are worked on at a time where they need not be held; at least half a volume's, since the
# kernels pad the volume for every batch of views.
VIEW_BYTES = 64 << 20

# Bytes of a batch that are filtered at a time; the FFT needs some four times as much, best within a core's cache.
FILTER_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


class XRayTransform(LinearPhysics):
    r"""Line integrals of a volume along the rays of a geometry, and their exact transpose.

    .. math:: (A x)_i = \int x(s_i + t\, d_i)\, \mathrm{d}t

    by Joseph's method: a ray steps along its view's main axis and interpolates bilinearly in every slice. Values are
    physical (attenuation in 1/mm gives line integrals without unit), memory beyond input and output is that of one
    padded copy of the volume, and both directions are differentiable any number of times. Kernels follow the device of
    the tensors they are given: numba on the CPU, Triton on GPUs, torch elsewhere.

    Parameters
    ----------
    geometry
        Where source and detector were: cone, fan or parallel beam, any vectors.
    grid
        Where the voxels are.
    device
        "auto", "cpu" or "cuda"; where the buffers are.
    normalize
        True divides A by its norm, as deepinv's TomographyWithAstra does by default; a number divides by that number.
    sqnorm
        What ‖A‖² is taken for, before any normalisation, where a bound of it is known; None estimates it when it is
        asked for.

    Attributes
    ----------
    img_size
        (1, D, H, W).
    measurement_shape
        (rows, views, columns).
    operator_norm
        What A was divided by; 1 unless normalised.
    batch_bytes
        How much of the projections :meth:`gradient` works on at a time; halved where memory runs out, so that who
        finds it smaller knows.

    Raises
    ------
    ScanError
        If the source lies among the voxels, a beam is too wide, or the device is not there.

    References
    ----------
    P. M. Joseph, An improved algorithm for reprojecting rays through pixel images, IEEE Trans. Med. Imaging 1, 1982.

    Examples
    --------
    >>> physics = XRayTransform(Geometry.parallel(range(0, 180, 6), (8, 12), 1.0), Grid((8, 12, 12), 1.0), device="cpu")
    >>> physics.A(torch.ones(1, 1, 8, 12, 12)).shape
    torch.Size([1, 1, 8, 30, 12])
    """

    operator_norm: Tensor

    def __init__(
        self,
        geometry: Geometry,
        grid: Grid,
        device: str | torch.device = "auto",
        normalize: bool | float = False,
        sqnorm: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size=(1, *grid.shape), device=resolve_device(device), **kwargs)
        self.geometry = geometry
        self.grid = grid
        self.rays = Rays(geometry, grid)
        rows, columns = geometry.detector_shape
        self.measurement_shape = (rows, geometry.views, columns)
        self.batch_bytes = max(VIEW_BYTES, 2 * grid.voxels)
        self._view_batches: tuple[int, list[_Batch]] = (0, [])
        self._physical_sqnorm = sqnorm
        self.normalize = normalize is not False
        norm = math.sqrt(self._squared_norm()) if normalize is True else float(normalize or 1.0)
        if not (math.isfinite(norm) and norm > 0):
            raise ScanError("No ray of the geometry meets the volume; check distances, units and the volume's place.")
        self.register_buffer("operator_norm", torch.tensor(norm, device=self._device_holder.device))

    @classmethod
    def from_scan(
        cls,
        scan: Scan,
        shape: tuple[int, int, int] | None = None,
        voxel_size: float | None = None,
        device: str | torch.device = "auto",
        **kwargs: Any,
    ) -> XRayTransform:
        """The transform of a scan on its default grid, or on one of another shape (D, H, W) or voxel size (mm)."""
        return cls(scan.geometry, scan.default_grid(shape, voxel_size), device, **kwargs)

    # -- the operator ---------------------------------------------------------------------------------------------

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Project volumes (B, C, D, H, W) to line integrals (B, C, rows, views, columns), float32."""
        self._expect(x, self.grid.shape, "volumes", "(B, C, D, H, W)")
        return _Forward.apply(x.float(), self)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """The transpose of :meth:`A`: (B, C, rows, views, columns) to (B, C, D, H, W), float32."""
        self._expect(y, self.measurement_shape, "projections", "(B, C, rows, views, columns)")
        return _Adjoint.apply(y.float(), self)

    def A_adjoint_A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """A_adjoint(A(x)) a few views at a time: never holds the projections, only follows rays that meet the grid."""
        self._expect(x, self.grid.shape, "volumes", "(B, C, D, H, W)")
        return _Normal.apply(x.float(), self)

    @property
    def sqnorm(self) -> float:
        """The largest eigenvalue of AᵀA, over-estimated by about a percent: 1 / sqnorm is a safe gradient step."""
        return self._squared_norm() / float(self.operator_norm) ** 2

    # -- a batch of views at a time --------------------------------------------------------------------------------

    @torch.no_grad()
    def gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """The gradient of ½‖Ax − y‖² and ‖Ax − y‖², without ever holding A x.

        Parameters
        ----------
        x
            Volumes (B, C, D, H, W); where they are is where it is computed.
        y
            Projections (B, C, rows, views, columns), on that device or on the host, from where a batch at a time is
            taken; they may be a mapped file.

        Returns
        -------
        Aᵀ(A x − y), (B, C, D, H, W) float32, and the squared norm over the whole batch. Not differentiable.
        """
        return self._least_squares(x, y)

    @torch.no_grad()
    def squared_residual(self, x: Tensor | None, y: Tensor) -> float:
        """‖Ax − y‖², or ‖y‖² where x is None, as :meth:`gradient` has it."""
        return self._least_squares(x, y, back=False)[1]

    def _least_squares(
        self,
        x: Tensor | None,
        y: Tensor | None,
        filtered: Callable[[Tensor], Tensor] | None = None,
        back: bool = True,
    ) -> tuple[Tensor, float]:
        """AᵀF(A x − y), if wanted ``back``, and ⟨A x − y, F(A x − y)⟩; None stands for zeros.

        ``filtered`` is F of a part of the projections, which it may take along rows only; None the identity. Without y
        only rows in the grid's shadow are seen, and the second is 0.
        """
        if x is not None:
            self._expect(x, self.grid.shape, "volumes", "(B, C, D, H, W)")
        if y is not None:
            self._expect(y, self.measurement_shape, "projections", "(B, C, rows, views, columns)")
        like = x if x is not None else y
        assert like is not None
        while True:
            try:
                return self._by_batches(x, y, filtered, back, like)
            except (MemoryError, RuntimeError) as error:
                largest = max(batch.bytes for batch in self._batches())
                if not _memory_ran_out(error) or largest <= 4 * math.prod(self.geometry.detector_shape):
                    raise
            # What was added to the gradient is not known: it begins anew.
            self.batch_bytes = largest // 2

    def _by_batches(
        self,
        x: Tensor | None,
        y: Tensor | None,
        filtered: Callable[[Tensor], Tensor] | None,
        back: bool,
        like: Tensor,
    ) -> tuple[Tensor, float]:
        device = like.device
        shape = (*like.shape[:2], *self.grid.shape)
        out = torch.zeros(shape if back else (0,), device=device)
        square = torch.zeros((), dtype=torch.float64, device=device)
        norm = self.operator_norm.to(device) if self.normalize else None
        volumes = [(b, c) for b in range(like.shape[0]) for c in range(like.shape[1])]
        for batch in self._batches():
            projector = projector_for(batch.rays, device)
            for b, c in volumes:
                measured = None if y is None else y[b, c][:, batch.views].to(device)
                if x is not None:
                    part = projector.forward(x[b, c].detach().float())
                    if norm is not None:
                        part /= norm
                    if measured is not None:
                        part -= measured
                else:
                    assert measured is not None
                    part = -measured.float()
                del measured
                rows = slice(None) if y is not None else batch.rows
                for piece in _pieces(part[rows]):
                    if filtered is not None:
                        changed = filtered(piece)
                        if y is not None:
                            square += torch.vdot(piece.flatten(), changed.flatten())
                        piece.copy_(changed)
                    elif y is not None:
                        square += torch.vdot(piece.flatten(), piece.flatten())
                if back:
                    if norm is not None:
                        part /= norm
                    projector.adjoint(part, out=out[b, c])
                del part
        return out, float(square)

    def _batches(self) -> list[_Batch]:
        """Views in batches of ``batch_bytes``: all at once, or else those that share a kernel, in their order."""
        if self._view_batches[0] != self.batch_bytes:
            rows, columns = self.geometry.detector_shape
            count = max(1, self.batch_bytes // (4 * rows * columns))
            batches = []
            if count >= self.geometry.views:
                batches.append(_Batch(slice(None), self.rays))
            else:
                groups = [views for *_, views in self.rays.groups]
                unseen = np.setdiff1d(np.arange(self.geometry.views), np.concatenate([*groups, []]))
                for views in [*groups, unseen.astype(np.int64)]:
                    for n in range(0, len(views), count):
                        batches.append(_Batch.of(views[n : n + count], self.geometry, self.grid))
            self._view_batches = (self.batch_bytes, batches)
        return self._view_batches[1]

    # -- parts of it ----------------------------------------------------------------------------------------------

    def restrict(self, box: Box) -> XRayTransform:
        """The same rays through the voxels of ``box`` only.

        ``restrict(box).A(patch)`` equals ``A`` of the patch amid zeros, at the cost of the rays that meet it; its
        ``A_adjoint_A`` has the memory of the patch.
        """
        return self._like(self.geometry, self.grid.crop(box))

    def subset(self, views: Sequence[int] | NDArray[np.integer] | slice) -> XRayTransform:
        """The transform of some of the views."""
        return self._like(self.geometry.select(views), self.grid)

    def _like(self, geometry: Geometry, grid: Grid) -> XRayTransform:
        scale = float(self.operator_norm) if self.normalize else False
        return XRayTransform(geometry, grid, self._device_holder.device, normalize=scale, noise_model=self.noise_model)

    def __repr__(self) -> str:
        d, h, w = self.grid.shape
        center = f" about {self.grid.center} mm" if any(self.grid.center) else ""
        norm = f",\n  divided by {float(self.operator_norm):.4g}" if self.normalize else ""
        return (
            f"XRayTransform(\n  {self.geometry},\n"
            f"  volume {d} x {h} x {w} of {self.grid.voxel_size:.4g} mm{center}{norm},\n"
            f"  on {self._device_holder.device})"
        )

    # -- inside ---------------------------------------------------------------------------------------------------

    def _apply_each(self, kind: str, tensor: Tensor) -> Tensor:
        """Apply a projector's method to every volume of a batch, as A (with its normalisation) prescribes."""
        projector: Projector = projector_for(self.rays, tensor.device)
        method = getattr(projector, kind)
        batch, channels = tensor.shape[:2]
        tensor = tensor.detach()
        if batch == channels == 1:
            out = method(tensor[0, 0])[None, None]
        else:
            parts = [method(part) for part in tensor.flatten(0, 1)]
            out = torch.stack(parts).unflatten(0, (batch, channels))
        if self.normalize:
            out /= self.operator_norm.to(out.device) ** (2 if kind == "normal" else 1)
        return out

    def _expect(self, tensor: Tensor, shape: tuple[int, int, int], what: str, axes: str) -> None:
        if tensor.ndim != 5 or tuple(tensor.shape[2:]) != tuple(shape):
            raise ScanError(
                f"The {what} given to the X-ray transform have the shape {tuple(tensor.shape)}; it needs {axes} with "
                f"the last three {tuple(shape)}."
            )

    def _squared_norm(self) -> float:
        if self._physical_sqnorm is None:
            self._physical_sqnorm = _largest_eigenvalue(self.geometry, self.grid, self._device_holder.device)
        return self._physical_sqnorm


@dataclass(frozen=True, eq=False)
class _Batch:
    """Some views, as an index of the projections' axis (a slice where they are neighbours), and their rays."""

    views: slice | Tensor
    rays: Rays

    @classmethod
    def of(cls, views: NDArray[np.int64], geometry: Geometry, grid: Grid) -> _Batch:
        """The batch of these views."""
        together = bool((np.diff(views) == 1).all())
        index = slice(int(views[0]), int(views[-1]) + 1) if together else torch.from_numpy(views)
        return cls(index, Rays(geometry.select(views), grid))

    @property
    def bytes(self) -> int:
        """Of the batch's projections."""
        return 4 * self.rays.geometry.views * math.prod(self.rays.geometry.detector_shape)

    @property
    def rows(self) -> slice:
        """The detector's rows that rays through the grid meet."""
        window = self.rays.window[self.rays.window[:, 1] > self.rays.window[:, 0]]
        return slice(int(window[:, 0].min()), int(window[:, 1].max())) if len(window) else slice(0, 0)


def _pieces(part: Tensor) -> Iterator[Tensor]:
    """Rows of (rows, views, columns) in pieces that are worked on in turn."""
    step = max(1, FILTER_BYTES.get(part.device.type, FILTER_BYTES["cpu"]) // (4 * max(1, part[:1].numel())))
    return iter(part.split(step)) if len(part) else iter(())


def _memory_ran_out(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a GPU; torch has its own class for the latter only."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, physics: XRayTransform) -> Tensor:
        ctx.physics = physics
        return physics._apply_each("forward", x)

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Adjoint.apply(y, ctx.physics), None


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, physics: XRayTransform) -> Tensor:
        ctx.physics = physics
        return physics._apply_each("adjoint", y)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Forward.apply(x, ctx.physics), None


class _Normal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, physics: XRayTransform) -> Tensor:
        ctx.physics = physics
        return physics._apply_each("normal", x)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Normal.apply(x, ctx.physics), None


def _largest_eigenvalue(geometry: Geometry, grid: Grid, device: torch.device) -> float:
    """The largest eigenvalue of AᵀA, from above by about a percent, in a few products with it.

    Its eigenvector is positive (AᵀA has no negative entries) and mostly smooth: a coarse grid tells it well enough for
    Lanczos' method to need only two to four steps on the fine one.
    """
    x = torch.ones(grid.shape, device=device)
    factor = min(math.ceil(max(grid.shape) / COARSE), *(n // 4 for n in geometry.detector_shape if n > 1), 1 << 30)
    if factor > 1:
        views = geometry.select(slice(None, None, math.ceil(geometry.views / COARSE)))
        d, h, w = (math.ceil(n / factor) for n in grid.shape)
        coarse = Rays(views.binned(factor), grid.resampled(shape=(d, h, w)))
        _, start = _lanczos(projector_for(coarse, device), torch.ones(d, h, w, device=device), 24, 1e-3)
        x = torch.nn.functional.interpolate(start[None, None], size=grid.shape, mode="trilinear")[0, 0]
    value, _ = _lanczos(projector_for(Rays(geometry, grid), device), x, 24, 1e-2, vector=False)
    return value


def _lanczos(
    projector: Projector, x: Tensor, steps: int, tolerance: float, vector: bool = True
) -> tuple[float, Tensor]:
    """The largest Ritz value plus its residual, and its vector if asked for, when the residual is within tolerance.

    Some eigenvalue lies within the residual of the Ritz value; it comes down to the largest as the residual shrinks.
    """
    diagonal: list[float] = []
    beside: list[float] = []
    basis: list[Tensor] = []
    before, q = torch.zeros_like(x), x / torch.linalg.vector_norm(x).clamp_min(1e-30)
    bound = 0.0
    for _ in range(min(steps, x.numel())):
        if vector:
            basis.append(q)
        w = projector.normal(q)
        diagonal.append(float(torch.vdot(q.flatten(), w.flatten())))
        w -= diagonal[-1] * q
        if beside:
            w -= beside[-1] * before
        beside.append(float(torch.linalg.vector_norm(w)))
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1))
        residual = beside[-1] * abs(vectors[-1, -1])
        bound = float(values[-1] + residual)
        if residual <= tolerance * values[-1] or beside[-1] == 0:
            break
        before, q = q, w / beside[-1]
    ritz = sum((float(c) * b for c, b in zip(vectors[:, -1], basis, strict=True)), torch.zeros_like(x)) if vector else x
    return bound, ritz


def as_xray_transform(physics: Physics) -> XRayTransform:
    """Ours as it is; deepinv's ``TomographyWithAstra`` as ours, with its geometry, grid and normalisation.

    Raises
    ------
    ScanError
        If it is another physics, two-dimensional, or its voxels are not cubes.
    """
    if isinstance(physics, XRayTransform):
        return physics
    volume, projection = (getattr(physics, name, None) for name in ("object_geometry", "projection_geometry"))
    if volume is None or projection is None:
        raise ScanError(
            f"{type(physics).__name__} is not an X-ray transform; use napari_recon.XRayTransform or deepinv's "
            "TomographyWithAstra."
        )
    if getattr(physics, "is_2d", False):
        raise ScanError(
            "This TomographyWithAstra is two-dimensional; make it three-dimensional with one slice and one row."
        )
    norm = float(physics.operator_norm) if getattr(physics, "normalize", False) else False
    holder = getattr(physics, "_device_holder", torch.zeros(()))
    return XRayTransform(_astra_geometry(projection), _astra_grid(volume), holder.device, normalize=norm)


def _astra_grid(volume: dict[str, Any]) -> Grid:
    """ASTRA's volume geometry as a grid."""
    option = volume["option"]
    shape = (int(volume["GridSliceCount"]), int(volume["GridRowCount"]), int(volume["GridColCount"]))
    low = np.array([option[f"WindowMin{q}"] for q in "XYZ"], dtype=float)
    high = np.array([option[f"WindowMax{q}"] for q in "XYZ"], dtype=float)
    sizes = (high - low) / shape[::-1]
    if np.ptp(sizes) > 1e-5 * sizes.mean():
        raise ScanError(f"The voxels of this TomographyWithAstra measure {tuple(sizes.tolist())}; they must be cubes.")
    x, y, z = ((low + high) / 2).tolist()
    return Grid(shape, float(sizes.mean()), (x, y, z))


def _astra_geometry(projection: dict[str, Any]) -> Geometry:
    """ASTRA's 3D projection geometry as vectors (its documentation's cone, cone_vec, parallel3d and parallel3d_vec)."""
    kind = projection["type"]
    shape = (int(projection["DetectorRowCount"]), int(projection["DetectorColCount"]))
    if kind in ("cone_vec", "parallel3d_vec"):
        return Geometry(
            np.asarray(projection["Vectors"], dtype=float), shape, "cone" if kind == "cone_vec" else "parallel"
        )
    if kind not in ("cone", "parallel3d"):
        raise ScanError(
            f"ASTRA's projection geometry {kind!r} is not supported; use cone, cone_vec or parallel3d(_vec)."
        )
    angles = np.rad2deg(np.asarray(projection["ProjectionAngles"], dtype=float))
    pitch = (float(projection["DetectorSpacingY"]), float(projection["DetectorSpacingX"]))
    if kind == "parallel3d":
        return Geometry.parallel(angles, shape, pitch)
    source, detector = (float(projection[f"DistanceOrigin{q}"]) for q in ("Source", "Detector"))
    return Geometry.cone(angles, shape, pitch, source, source + detector)
