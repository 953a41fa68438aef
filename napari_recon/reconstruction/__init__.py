"""x from y: deepinv Reconstructors that can also stream."""

from napari_recon.reconstruction.fdk import FDK
from napari_recon.reconstruction.padmm import PADMM
from napari_recon.reconstruction.partitioned import PartitionedReconstructor
from napari_recon.reconstruction.sense import CGSense, ZeroFilled
from napari_recon.reconstruction.sirt import SIRT
from napari_recon.reconstruction.streaming import StreamingReconstructor, Update
from napari_recon.reconstruction.tv import TV, TVPrior

__all__ = [
    "FDK",
    "PADMM",
    "SIRT",
    "TV",
    "CGSense",
    "PartitionedReconstructor",
    "StreamingReconstructor",
    "TVPrior",
    "Update",
    "ZeroFilled",
]
