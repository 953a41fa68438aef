"""A reconstruction as a value: what the docks, the command line and a notebook hand over, and what a layer keeps.

No torch here: the docks build their forms from these models, and napari starts without paying for torch.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from napari_recon.scans.scan import ScanOptions


def quiet_threads(environment: MutableMapping[str, str]) -> MutableMapping[str, str]:
    """Let idle OpenMP threads sleep, unless the person said otherwise; to be set before torch is loaded.

    torch and numba each have a pool of threads. By default an idle pool spins, and takes the cores from the one that
    works: ten times slower where the machine has other work too.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FDKParameters(_Frozen):
    """Feldkamp-Davis-Kress: filtered back projection, the fast standard."""

    method: Literal["fdk"] = "fdk"
    window: Literal["ram-lak", "hann", "cosine", "shepp-logan"] = Field(
        default="ram-lak",
        title="Ramp window",
        description="Damps the ramp filter at high frequencies: less noise, less detail.",
    )


class SIRTParameters(_Frozen):
    """Simultaneous iterative reconstruction: least squares, smoothest parts first."""

    method: Literal["sirt"] = "sirt"
    iterations: int = Field(default=50, ge=1, le=10_000, title="Iterations")
    nonnegative: bool = Field(default=True, title="Non-negative", description="Attenuation below zero is set to zero.")


class TVParameters(_Frozen):
    """Least squares with total variation, by proximal gradient: over the whole volume, or patch by patch."""

    method: Literal["tv"] = "tv"
    iterations: int = Field(
        default=20,
        ge=1,
        le=10_000,
        title="Iterations",
        description="Gradient steps that every voxel gets; the passes over the patches share them.",
    )
    regularization: float = Field(
        default=1e-3,
        ge=0,
        allow_inf_nan=False,
        title="Regularisation",
        description="Weight of the total variation, relative to the data term and to the brightest part of FDK: "
        "0.0003 keeps detail, 0.003 is smooth.",
    )
    patch: int | None = Field(
        default=64,
        ge=8,
        title="Patch",
        description="Edge of a patch in voxels; none reconstructs the whole volume at once.",
    )
    operator: str = Field(
        default="fit",
        title="Data step",
        description="'fit' approximates AᵀA by m and λ, fitted to the scan; 'exact' projects every patch; or an "
        "operator file.",
    )
    passes: int = Field(
        default=2,
        ge=1,
        le=10,
        title="Passes",
        description="Sweeps over the patches, each from the last one's result: two come within 0.3 dB of no patches.",
    )


Parameters = Annotated[FDKParameters | SIRTParameters | TVParameters, Field(discriminator="method")]


class ReconstructionJob(_Frozen):
    """Everything that a reconstruction depends on.

    Attributes
    ----------
    scan
        Path of the scan.
    options
        How it is read: views, binning, corrections.
    shape, voxel_size
        Grid of the volume, (D, H, W) and mm; None takes what the scan suggests.
    parameters
        The method and its parameters.
    device
        "auto", "cpu" or "cuda".
    output
        Where the volume is written (.tif, .tiff or .ome.zarr), or None.
    seed
        Of whatever is random (the probes of the operator's fit).
    """

    scan: Path
    options: ScanOptions = ScanOptions()
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    voxel_size: float | None = Field(default=None, gt=0)
    parameters: Parameters = TVParameters()
    device: str = "auto"
    output: Path | None = None
    seed: int = 0
