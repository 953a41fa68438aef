"""What was measured: geometry, grids, scans, corrections, and a reader for each format."""

from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Box, Grid
from napari_recon.scans.kspace import KSpaceOptions, KSpaceScan
from napari_recon.scans.scan import Scan, ScanOptions, open_scan

__all__ = ["Box", "Geometry", "Grid", "KSpaceOptions", "KSpaceScan", "Scan", "ScanError", "ScanOptions", "open_scan"]
