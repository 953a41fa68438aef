"""X-ray projections filtered by the square root of a ramp: a physics in which gradient steps converge in a few."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from deepinv.physics import LinearPhysics
from scipy.fft import next_fast_len
from torch import Tensor

from napari_recon.physics.fdk_filter import ramp
from napari_recon.physics.xray import as_xray_transform
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Box, Grid

POWER_STEPS = 8
"""Products with AᵀFA that its norm is estimated by."""


class RampFiltered(LinearPhysics):
    """F^½ A: X-ray projections in which all frequencies count alike, so that gradient steps converge in a few.

    Its normal operator AᵀFA is close to the identity, and ``A_adjoint(A(x) - measurement(y))`` is AᵀF(Ax − y), the
    back projection of the ramp-filtered residual. Everything that works with a physics works with it: patches,
    PartitionedReconstructor, the fit of a normal operator.

    F(ω) = |ω| / (1 + |ω| / ω_c) along the detector's rows. Below ω_c = V / (π L), V views across a width L, the views
    overlap and AAᵀ falls as 1/|ω|, which the ramp undoes. Above it every view stands for itself and AAᵀ is flat:
    a pure ramp would there be as many times too large as views are missing, and hold the step back everywhere else.

    Parameters
    ----------
    physics
        An XRayTransform, or deepinv's TomographyWithAstra.

    largest
        What ‖AᵀFA‖ is taken for before F is divided by it; None estimates it.

    Attributes
    ----------
    physics
        The transform itself.
    largest
        What F was divided by.
    sqnorm
        ‖AᵀFA‖: 1, since F is divided by what it was (estimated by a few products).

    Raises
    ------
    ScanError
        If it is no X-ray transform.
    """

    root: Tensor

    def __init__(self, physics: LinearPhysics, largest: float | None = None) -> None:
        xray = as_xray_transform(physics)
        device = xray._device_holder.device
        super().__init__(img_size=tuple(xray.img_size), device=device)
        self.physics = xray
        columns = xray.measurement_shape[2]
        length = next_fast_len(2 * columns, real=True)
        self.length = length + length % 2
        pitch = float(np.linalg.norm(xray.geometry.u, axis=1).mean())
        if xray.geometry.kind == "cone":  # seen at the rotation axis
            pitch *= float((xray.geometry.source_object / xray.geometry.source_detector).mean())
        width = max(xray.grid.extent[1:])
        frequency = ramp(self.length) / pitch  # cycles a mm
        frequency = np.maximum(frequency, frequency[frequency > 0].min())
        filtered = frequency / (1 + frequency * math.pi * width / xray.geometry.views)
        self.register_buffer("root", torch.from_numpy(np.sqrt(filtered)).to(device=device, dtype=torch.float32))
        self.largest = self._largest() if largest is None else largest
        self.root /= math.sqrt(self.largest)
        self.sqnorm = 1.0

    @property
    def geometry(self) -> Geometry:
        """That of the transform."""
        return self.physics.geometry

    @property
    def grid(self) -> Grid:
        """That of the transform."""
        return self.physics.grid

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Volumes (B, C, D, H, W) to filtered projections (B, C, rows, views, padded columns)."""
        return self.measurement(self.physics.A(x))

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """The transpose of :meth:`A`."""
        columns = self.physics.measurement_shape[2]
        return self.physics.A_adjoint(self._filter(y, self.root)[..., :columns].contiguous())

    def A_adjoint_A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """AᵀFA x a batch of views at a time: never holds the projections."""
        return _Normal.apply(x.float(), self)

    @torch.no_grad()
    def gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """The gradient of ½‖F^½(Ax − y)‖² and ‖F^½(Ax − y)‖², without ever holding A x.

        As :meth:`XRayTransform.gradient <napari_recon.physics.xray.XRayTransform.gradient>`: y are the projections as
        they are, (B, C, rows, views, columns), and not their :meth:`measurement`, which takes twice their memory.
        """
        return self.physics._least_squares(x, y, self._both)

    @torch.no_grad()
    def squared_residual(self, x: Tensor | None, y: Tensor) -> float:
        """‖F^½(Ax − y)‖², or ‖F^½y‖² where x is None, as :meth:`gradient` has it."""
        return self.physics._least_squares(x, y, self._both, back=False)[1]

    def measurement(self, y: Tensor) -> Tensor:
        """F^½ y of projections (B, C, rows, views, columns): the measurement that belongs to this physics."""
        return self._filter(y, self.root)

    def restrict(self, box: Box) -> RampFiltered:
        """The same rays through the voxels of ``box`` only, with the same filter."""
        patch = object.__new__(RampFiltered)
        LinearPhysics.__init__(patch, img_size=(1, *(s.stop - s.start for s in box)), device=self.root.device)
        patch.physics, patch.length = self.physics.restrict(box), self.length
        patch.register_buffer("root", self.root)
        patch.sqnorm = self.sqnorm
        return patch

    def _both(self, y: Tensor) -> Tensor:
        """F y: the filter of A and that of its adjoint."""
        return self._filter(y, self.root**2)[..., : y.shape[-1]]

    def _filter(self, y: Tensor, response: Tensor) -> Tensor:
        # The padding makes the convolution linear: cropped, it is F of the projections amid zeros.
        return torch.fft.irfft(torch.fft.rfft(y, n=self.length) * response.to(y.device), n=self.length)

    @torch.no_grad()
    def _largest(self) -> float:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand((1, *self.img_size), generator=generator).to(self.root.device)
        value = 0.0
        for _ in range(POWER_STEPS):
            x = self.A_adjoint_A(x / x.norm().clamp_min(1e-30))
            value = float(x.norm())
        if not value > 0:
            raise ScanError("No ray of the geometry meets the volume; check distances, units and the volume's place.")
        return 1.05 * value


class _Normal(torch.autograd.Function):
    """AᵀFA, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ramp: RampFiltered) -> Tensor:
        ctx.ramp = ramp
        return ramp.physics._least_squares(x.detach(), None, ramp._both)[0]

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Normal.apply(x, ctx.ramp), None
