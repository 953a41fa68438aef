"""Learned, partitioned 3D reconstruction from X-ray projections and multi-coil MRI, seen in napari.

The public names are imported on first use, so that ``import napari_recon`` stays cheap: it pulls in neither torch
nor Qt (napari imports every plugin's package while it starts).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ScanError": "napari_recon.scans",
    "Geometry": "napari_recon.scans",
    "Grid": "napari_recon.scans",
    "Scan": "napari_recon.scans",
    "ScanOptions": "napari_recon.scans",
    "KSpaceScan": "napari_recon.scans",
    "KSpaceOptions": "napari_recon.scans",
    "open_scan": "napari_recon.scans",
    "XRayTransform": "napari_recon.physics",
    "MultiCoilMRI": "napari_recon.physics",
    "NormalOperator": "napari_recon.physics",
    "fit_normal_operator": "napari_recon.physics",
    "DiagCirculantWrapper": "napari_recon.physics",
    "DiagonalCirculantWrapper": "napari_recon.physics",
    "FDK": "napari_recon.reconstruction",
    "SIRT": "napari_recon.reconstruction",
    "CGSense": "napari_recon.reconstruction",
    "ZeroFilled": "napari_recon.reconstruction",
    "TV": "napari_recon.reconstruction",
    "TVPrior": "napari_recon.reconstruction",
    "PartitionedReconstructor": "napari_recon.reconstruction",
    "UnrolledPGD": "napari_recon.reconstruction.unrolled",
    "PostProcessing": "napari_recon.reconstruction.unrolled",
    "Update": "napari_recon.reconstruction",
    "compare_volumes": "napari_recon.measures.comparison",
    "fourier_shell_correlation": "napari_recon.measures.resolution",
    "ReconstructionJob": "napari_recon.jobs",
    "run_job": "napari_recon.jobs",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'napari_recon' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
