"""The measurement operator A, its adjoint and their stand-ins, each a deepinv LinearPhysics."""

from napari_recon.physics.mri import MultiCoilMRI
from napari_recon.physics.normal import (
    DiagCirculantWrapper,
    DiagonalCirculantWrapper,
    NormalOperator,
    fit_normal_operator,
)
from napari_recon.physics.xray import XRayTransform

__all__ = [
    "DiagCirculantWrapper",
    "DiagonalCirculantWrapper",
    "MultiCoilMRI",
    "NormalOperator",
    "XRayTransform",
    "fit_normal_operator",
]
