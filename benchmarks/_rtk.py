"""RTK's CPU filters on our geometry, grids and arrays, for benchmarks and cross-checks (needs the extra ``rtk``).

RTK turns about its y axis; a world point (x, y, z) of ours is (y, z, x) there.
"""

from __future__ import annotations

import itk
import numpy as np
from itk import RTK as rtk
from numpy.typing import NDArray

from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

_Image = itk.Image[itk.F, 3]


class RTK:
    """RTK's filters for a cone-beam geometry with rectangular pixels and a grid.

    Volumes are (D, H, W), projections (views, rows, columns), both float32.
    """

    def __init__(self, geometry: Geometry, grid: Grid, threads: int) -> None:
        itk.MultiThreaderBase.SetGlobalMaximumNumberOfThreads(threads)
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(threads)
        self.grid, self.detector = grid, geometry.detector_shape
        self.pitch_v, self.pitch_u = geometry.pixel_size
        self.views = geometry.views
        self.geometry = rtk.ThreeDCircularProjectionGeometry.New()
        point, vector = itk.Point[itk.D, 3], itk.Vector[itk.D, 3]
        for s, d, u, v in zip(geometry.source, geometry.detector_center, geometry.u, geometry.v, strict=True):
            u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
            if not self.geometry.AddProjection(point(_turn(s)), point(_turn(d)), vector(_turn(u)), vector(_turn(v))):
                raise ValueError("RTK does not take this geometry")

    def forward(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        """Joseph's forward projection."""
        f = rtk.JosephForwardProjectionImageFilter[_Image, _Image].New()
        f.SetInput(0, self._projections(np.zeros((self.views, *self.detector), np.float32)))
        f.SetInput(1, self._volume(volume))
        f.SetGeometry(self.geometry)
        f.Update()
        return itk.array_from_image(f.GetOutput())

    def adjoint(self, projections: NDArray[np.float32]) -> NDArray[np.float32]:
        """Its matched back projection."""
        f = rtk.JosephBackProjectionImageFilter[_Image, _Image].New()
        f.SetInput(0, self._volume(np.zeros(self.grid.shape, np.float32)))
        f.SetInput(1, self._projections(projections))
        f.SetGeometry(self.geometry)
        f.Update()
        return _back(f.GetOutput())

    def fdk(self, projections: NDArray[np.float32], weights: str | None = None) -> NDArray[np.float32]:
        """FDK, after no ray weights, "parker" (short scan) or "displaced" (detector off-centre)."""
        source = self._projections(projections.copy())
        if weights is not None:
            kind = {"parker": rtk.ParkerShortScanImageFilter, "displaced": rtk.DisplacedDetectorImageFilter}[weights]
            weighted = kind[_Image].New()
            weighted.SetInput(source)
            weighted.SetGeometry(self.geometry)
            weighted.Update()
            source = weighted.GetOutput()
        f = rtk.FDKConeBeamReconstructionFilter[_Image].New()
        f.SetInput(0, self._volume(np.zeros(self.grid.shape, np.float32)))
        f.SetInput(1, source)
        f.SetGeometry(self.geometry)
        f.GetRampFilter().SetTruncationCorrection(0.0)
        f.GetRampFilter().SetHannCutFrequency(0.0)
        f.Update()
        return _back(f.GetOutput())

    def _volume(self, array: NDArray[np.float32]) -> itk.Image:
        z, y, x = self.grid.translate
        return _image(array.transpose(2, 0, 1), [self.grid.voxel_size] * 3, [y, z, x])

    def _projections(self, array: NDArray[np.float32]) -> itk.Image:
        rows, columns = self.detector
        origin = [-(columns - 1) / 2 * self.pitch_u, -(rows - 1) / 2 * self.pitch_v, 0.0]
        return _image(array, [self.pitch_u, self.pitch_v, 1.0], origin)


def _turn(p: NDArray[np.float64]) -> tuple[float, float, float]:
    return float(p[1]), float(p[2]), float(p[0])


def _back(image: itk.Image) -> NDArray[np.float32]:
    return itk.array_from_image(image).transpose(1, 2, 0)


def _image(array: NDArray[np.float32], spacing: list[float], origin: list[float]) -> itk.Image:
    image = itk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    return image
