"""Work as a value: what the docks, the command line and a notebook hand over, and what a layer keeps.

No torch here: the docks build their forms from these models, and napari starts without paying for torch.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from napari_recon.learning.training import TrainingConfig
from napari_recon.learning.weights import shipped_weights
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid
from napari_recon.scans.kspace import KSpaceOptions, KSpaceScan
from napari_recon.scans.scan import Scan, ScanOptions, open_scan
from napari_recon.scans.slabs import Slab, held_margin, slab_of


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


class ZeroFilledParameters(_Frozen):
    """Samples that were not taken count as zero: the fast standard of MRI."""

    method: Literal["zero-filled"] = "zero-filled"


class SENSEParameters(_Frozen):
    """Least squares by conjugate gradients, with what the coils see of each other's gaps (CG-SENSE)."""

    method: Literal["sense"] = "sense"
    iterations: int = Field(
        default=10, ge=1, le=10_000, title="Iterations", description="More of them resolve more, noise too."
    )
    regularization: float = Field(
        default=0.03,
        ge=0,
        allow_inf_nan=False,
        title="Regularisation",
        description="Weight of ‖x‖², relative to ‖A‖²: damps noise where coils tell little.",
    )


class SIRTParameters(_Frozen):
    """Simultaneous iterative reconstruction: least squares, smoothest parts first."""

    method: Literal["sirt"] = "sirt"
    iterations: int = Field(default=50, ge=1, le=10_000, title="Iterations")
    nonnegative: bool = Field(default=True, title="Non-negative", description="Attenuation below zero is set to zero.")


_REGULARIZATION = (
    "Weight of the total variation, relative to the data term and to the brightest part of FDK: 0.0003 keeps detail, "
    "0.003 is smooth."
)


class TVParameters(_Frozen):
    """Least squares with total variation, by accelerated proximal gradient: the whole volume, or by patches."""

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
        description=_REGULARIZATION,
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
        default=3,
        ge=1,
        le=10,
        title="Passes",
        description="Sweeps over the patches, each from the last one's result: closer to what no patches would give.",
    )


class UnrolledParameters(_Frozen):
    """Data steps and a trained network in turn (or the network after FDK), by patches, in one pass or two."""

    method: Literal["unrolled"] = "unrolled"
    weights: str = Field(
        default="unrolled",
        title="Weights",
        description="What the network learned: weights by their name, or a file that 'napari-recon train' made.",
    )
    iterations: int | None = Field(
        default=None,
        ge=1,
        le=100,
        title="Iterations",
        description="How often data steps and the network take turns; none takes as many as were trained. More repeat "
        "the last one's step size, where all share one network.",
    )
    patch: int | None = Field(
        default=48,
        ge=8,
        title="Patch",
        description="Edge of a patch in voxels; none gives the network the whole volume at once.",
    )
    operator: str = Field(
        default="fit",
        title="Data step",
        description="Of the second pass: 'fit' approximates the data step by m and λ, fitted to the scan; 'exact' "
        "projects every patch; or an operator file.",
    )
    passes: Literal[1, 2] = Field(
        default=1,
        title="Passes",
        description="1: data steps on the whole volume, the network by patches; 2: then every patch takes steps of its "
        "own, in the context of the first pass, which gains where views are fewest.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        title="Precision",
        description="Of the network's numbers, never of the physics: bfloat16 takes less time and memory and costs no "
        "0.02 dB; 'auto' takes it where the machine computes with it.",
    )


class PADMMParameters(_Frozen):
    """Least squares with total variation by preconditioned ADMM, from any start; tunable while it runs."""

    method: Literal["padmm"] = "padmm"
    start: str = Field(
        default="network",
        title="Start",
        description="Where it begins, which decides how soon it is done but not where it ends: 'network' (what one "
        "that was trained for this makes of FDK), 'fdk', 'tv' (forty quick steps), 'zeros', 'last' (the last result "
        "on this grid), a volume's file, or weights.",
    )
    preconditioner: Literal["scalar", "diagonal", "circulant", "operator"] = Field(
        default="circulant",
        title="Preconditioner",
        description="What stands for AᵀA in a step: a number, a number for each voxel (as in SIRT), a filter, or the "
        "normal operator H, which is fitted first.",
    )
    iterations: int = Field(
        default=30,
        ge=1,
        le=10_000,
        title="Iterations",
        description="About one A and one Aᵀ each.",
    )
    regularization: float = Field(
        default=1e-3,
        ge=0,
        allow_inf_nan=False,
        title="Regularisation τ",
        description=_REGULARIZATION,
    )
    rho: float = Field(
        default=0.1,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        title="Penalty ρ",
        description="How firmly the gradient and its copy, which total variation acts on, are tied, relative to ‖A‖²: "
        "a matter of speed only.",
    )
    adaptive: bool = Field(
        default=False,
        title="Adapt ρ",
        description="ρ is doubled or halved where one of the primal and dual residuals is ten times the other.",
    )
    tolerance: float = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        title="Tolerance",
        description="It ends sooner where both residuals of ADMM, relative, are below this; 0 never does.",
    )
    weighted: bool = Field(
        default=False,
        title="Photon statistics",
        description="Weigh each pixel by the photons that reached it, exp(-y): dark rays are the noisy ones. For scans "
        "with few photons behind dense parts.",
    )

    keep_iterates: bool = Field(
        default=False,
        title="Keep iterates",
        description="Keep the volumes of all iterations in a layer to scrub through, or of every 2nd, 4th, ... where "
        "all would take more than 1 GiB.",
    )

    TUNABLE: ClassVar[tuple[str, ...]] = ("start", "preconditioner", "iterations", "regularization", "rho")
    """What may be changed while it runs."""

    def start_weights(self, kind: Literal["x-ray", "mri"] = "x-ray") -> str | None:
        """The weights that the start stands for in a kind of scan, by name or path; None where it is no network's."""
        if self.start == "network":
            return START_WEIGHTS[kind]
        return self.start if self.start.endswith(".safetensors") or self.start in shipped_weights() else None

    @property
    def starts_from_file(self) -> bool:
        """Whether the start is a volume's file."""
        return self.start not in STARTS and self.start_weights() is None

    @property
    def start_is_computed(self) -> bool:
        """Whether the start is a volume that the job makes, beside FDK: a network's, or quick TV."""
        return self.start == "tv" or self.start_weights() is not None


STARTS = ("network", "fdk", "tv", "zeros", "last")
"""The starts of PADMM that have names."""

SHIPPED_WEIGHTS = {"x-ray": "unrolled", "mri": "mri"}
"""The weights that ship for each kind of scan: the usual ones."""

START_WEIGHTS = {"x-ray": "start", "mri": "start_mri"}
"""The same for PADMM's start "network": those that take few projections or none, so that the start is worth it."""

Parameters = Annotated[
    FDKParameters
    | ZeroFilledParameters
    | SENSEParameters
    | SIRTParameters
    | TVParameters
    | PADMMParameters
    | UnrolledParameters,
    Field(discriminator="method"),
]

MRI_REGULARIZATION = 3e-3
"""PADMM's regularisation of k-space where nobody has chosen one: three times that of X-rays."""

METHODS = {
    "x-ray": ("fdk", "sirt", "tv", "padmm", "unrolled"),
    "mri": ("zero-filled", "sense", "padmm", "unrolled"),
}
"""What each kind of scan can be reconstructed by."""


class _ScanJob(_Frozen):
    """What every job begins with: a scan, how it is read, and the grid of the volume.

    Attributes
    ----------
    scan
        Path of the scan.
    options
        How it is read: views, binning, corrections; coils and undersampling of k-space.
    shape, voxel_size
        Grid of the volume, (D, H, W) and mm; None takes what the scan suggests. K-space fixes it.
    device
        "auto", "cpu" or "cuda".
    seed
        Of whatever is random: probes of the operator's fit, samples that are held out.
    """

    scan: Path
    options: ScanOptions | KSpaceOptions = ScanOptions()
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    voxel_size: float | None = Field(default=None, gt=0)
    device: str = "auto"
    seed: int = 0

    def open_scan(self) -> Scan | KSpaceScan:
        """The scan, as it is to be read; options that ask for nothing suit every kind.

        Raises
        ------
        ScanError
            As :func:`~napari_recon.scans.open_scan`, or if the job's method is none for such a scan.
        """
        scan = open_scan(self.scan) if self.options == ScanOptions() else open_scan(self.scan, self.options)
        method = getattr(getattr(self, "parameters", None), "method", None)
        if method is not None and method not in METHODS[scan.kind]:
            what = {"x-ray": "X-ray projections", "mri": "k-space (MRI)"}[scan.kind]
            raise ScanError(
                f"{self.scan} holds {what}, which {method} is not for: use {', '.join(METHODS[scan.kind])}."
            )
        return scan


class ReconstructionJob(_ScanJob):
    """Everything that a reconstruction depends on.

    Attributes
    ----------
    scan, options, shape, voxel_size, device, seed
        Path of the scan; how it is read; grid of the volume, (D, H, W) and mm, None for what the scan suggests; "auto",
        "cpu" or "cuda"; of whatever is random.
    parameters
        The method and its parameters.
    output
        Where the volume is written, its ending one of :data:`napari_recon.jobs.volumes.ENDINGS`; or None.
    bits
        Of its numbers: 32 or 16, see :func:`~napari_recon.jobs.volumes.write_volume`; None is the format's own.
    slices
        [first, stop) along z of the grid: only these are asked for, with all the rays that see them; None takes all.
    slab
        How many slices are reconstructed at a time, one slab after the other into an .ome.zarr: for volumes that memory
        has no room for; see :mod:`napari_recon.jobs.slabs`. "auto" does so where that is the case, None never.
    """

    parameters: Parameters = TVParameters()
    output: Path | None = None
    bits: Literal[16, 32] | None = None
    slices: tuple[NonNegativeInt, PositiveInt] | None = None
    slab: PositiveInt | Literal["auto"] | None = "auto"

    @field_validator("slices")
    @classmethod
    def _some_slices(cls, slices: tuple[int, int] | None) -> tuple[int, int] | None:
        if slices is not None and not slices[0] < slices[1]:
            raise ValueError("the first slice must come before the one that it stops at")
        return slices

    def open_scan(self) -> Scan | KSpaceScan:
        """The scan.

        Raises
        ------
        ScanError
            As for other jobs, or if only some slices of k-space are asked for.
        """
        scan = super().open_scan()
        if self.slices is not None and scan.kind == "mri":
            raise ScanError(f"Every sample of the k-space {self.scan} sees all slices: leave the slices out.")
        return scan

    @property
    def into_zarr(self) -> bool:
        """Whether the output is OME-Zarr, which can be written slab by slab."""
        return self.output is not None and self.output.name.lower().endswith(".ome.zarr")

    def part_of(self, geometry: Geometry, grid: Grid, held: bool = False) -> Slab | None:
        """What it takes to reconstruct :attr:`slices` of a grid; None where all are asked for.

        ``held``: as one of many, what lies beyond a margin being held at its FDK.

        Raises
        ------
        ScanError
            If the grid has no such slices, or no ray sees them.
        """
        if self.slices is None:
            return None
        core = slice(*self.slices)
        if self.parameters.method != "fdk":
            return slab_of(geometry, grid, core, beyond=held_margin(geometry, grid) if held else None)
        return replace(slab_of(geometry, grid, core, margin=0), extended=core)  # whose voxels know nothing of others


class FitParameters(_Frozen):
    """How the normal operator is fitted: alternating least squares on random volumes."""

    terms: Literal[1, 3] = Field(
        default=1,
        title="Kernels",
        description="1 as in the paper; 3 let the kernel change with height and radius, at three times the cost of H.",
    )
    symmetric: bool = Field(
        default=True, title="Symmetric", description="The mask on both sides, m C m; off: the paper's form for CT, m C."
    )
    real_filter: bool = Field(
        default=True,
        title="Real λ",
        description="Only matters for the form that is not symmetric: a kernel that is its own mirror image.",
    )
    distribution: Literal["mixed", "white", "image", "residual"] = Field(
        default="mixed",
        title="Random volumes",
        description="What H is fitted on: 'white' noise, as in the paper; 'image', whose spectrum falls as 1/f; both "
        "'mixed'; 'residual', rough and on patches, as what is left to explain while reconstructing.",
    )
    probes: int = Field(
        default=8,
        ge=1,
        le=256,
        title="Probes",
        description="Random volumes: each costs one A, one Aᵀ and the memory of three volumes.",
    )
    iterations: int = Field(
        default=4, ge=0, le=100, title="Iterations", description="Rounds of λ and m; 0 keeps the computed start."
    )
    positions: int = Field(
        default=5, ge=1, le=64, title="Positions", description="Point-spread functions that λ starts from."
    )
    support: int | None = Field(
        default=None, ge=1, title="Support", description="Largest offset of the kernel in voxels; none keeps all."
    )
    mask_step: int = Field(
        default=1,
        ge=1,
        le=16,
        title="Mask step",
        description="m is piecewise linear on a grid of so many voxels: smoother, and with less of the probes' noise.",
    )


class OperatorJob(_ScanJob):
    """Fit the normal operator H, or load one, and see it beside AᵀA on a volume.

    Attributes
    ----------
    scan, options, shape, voxel_size, device, seed
        As for a reconstruction.
    operator
        "fit", or the path of an operator file.
    parameters
        How it is fitted; a file has been.
    volume
        x to see it on: a .tif, .ome.zarr or .npy, brought onto the job's grid; None takes the scan's FDK.
    output
        Operator file (.safetensors) to write; None keeps a fit in the user's cache.
    """

    operator: str = "fit"
    parameters: FitParameters = FitParameters()
    volume: Path | None = None
    output: Path | None = None


class PatchJob(_ScanJob):
    """Gradient steps on one patch, exactly and with H: what the approximation changes, and what it saves.

    Attributes
    ----------
    scan, options, shape, voxel_size, device, seed
        As for a reconstruction.
    operator
        Path of an operator file.
    center
        The patch's centre, (z, y, x) in voxels of the volume; the patch is moved into the volume.
    patch
        Its edge in voxels; less where the volume is thinner.
    steps
        Gradient steps.
    """

    operator: str
    center: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    patch: int = Field(default=32, ge=8, title="Patch", description="Edge of the patch in voxels.")
    steps: int = Field(default=10, ge=1, le=200, title="Steps", description="Gradient steps, of both kinds.")


class DataConsistencyJob(_ScanJob):
    """Project a volume, or make k-space of it, beside what was measured: what it claims and the data do not show.

    Attributes
    ----------
    scan, options, shape, voxel_size, device, seed
        As for a reconstruction.
    volume
        A .tif, .ome.zarr or .npy, brought onto the job's grid; of k-space a complex .npy on its grid. None takes the
        last result on this grid.
    """

    volume: Path | None = None


class RegularizationJob(_ScanJob):
    """Suggest how much to regularise, from a sweep over τ on a part of the scan.

    Attributes
    ----------
    scan, options, shape, voxel_size, device, seed
        As for the reconstruction that is to be regularised.
    """


HALVES: dict[Literal["even", "odd"], str] = {"even": "first half", "odd": "second half"}
"""What a resolution is told from: every second view from the first on, and from the second on, as volumes' names."""


class ResolutionJob(_ScanJob):
    """Reconstruct from even and from odd views, and tell from both what is resolved (Fourier shell correlation).

    Attributes
    ----------
    scan, options, shape, voxel_size, device, seed
        As for a reconstruction.
    parameters
        The method and its parameters, the same for both halves.
    """

    parameters: Parameters = TVParameters()

    def open_scan(self) -> Scan:
        """The scan.

        Raises
        ------
        ScanError
            As for other jobs; or if it is k-space, has a single view, or is a half already.
        """
        scan = super().open_scan()
        if scan.kind == "mri":
            raise ScanError(f"{self.scan} holds k-space (MRI), and the resolution is told of X-ray projections only.")
        if scan.options.half is not None:
            raise ScanError("The scan's option half = 'even' or 'odd' leaves no halves to compare: leave it out.")
        if getattr(self.parameters, "start", None) == "last":
            raise ScanError("The halves cannot begin at the last result, which is of all views: choose another start.")
        return scan

    def half(self, which: Literal["even", "odd"], grid: Grid) -> ReconstructionJob:
        """The reconstruction from half the views, on the grid of all of them."""
        return ReconstructionJob(
            scan=self.scan,
            options=self.options.model_copy(update={"half": which}),
            shape=grid.shape,
            voxel_size=grid.voxel_size,
            device=self.device,
            seed=self.seed,
            parameters=self.parameters,
        )


SWEPT = ("regularization", "iterations", "rho", "passes", "patch", "views")
"""The parameters that a sweep can vary; "views" is no method's, but how many are kept of the scan."""


class SweepJob(_ScanJob):
    """Reconstruct with several values of one parameter, on coarser voxels or some slices, to see and choose.

    Attributes
    ----------
    scan, options, shape, voxel_size, device, seed
        As for the reconstruction that the value is for.
    parameters
        Its method and parameters.
    parameter
        Which of them is varied; or "views", how many are kept.
    values
        What it takes, each once.
    binning
        By how much detector and voxels are coarser than those of the reconstruction.
    slices
        [first, stop) along z of the reconstruction's grid, which ``shape`` and ``voxel_size`` then say; None takes all.
    reference
        A volume that the results are compared with, brought onto their grid; None compares with the scan's truth, where
        it has one.
    """

    parameters: Parameters = TVParameters()
    parameter: Literal["regularization", "iterations", "rho", "passes", "patch", "views"] = "iterations"
    values: Annotated[tuple[FiniteFloat, ...], Field(min_length=2, max_length=12)]
    binning: int = Field(
        default=2, ge=1, le=16, title="Binning", description="Detector and voxels so many times coarser: quicker."
    )
    slices: tuple[NonNegativeInt, PositiveInt] | None = None
    reference: Path | None = None

    @field_validator("values")
    @classmethod
    def _values_will_do(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError("a value stands there twice")
        if {"options", "parameters", "parameter"} <= set(info.data):  # else what is wrong with those is said
            for value in values:
                try:
                    _varied(info.data["options"], info.data["parameters"], info.data["parameter"], value)
                except ValidationError as error:
                    problem = error.errors()[0]["msg"]
                    raise ValueError(f"{value:g} is no {info.data['parameter']}: {problem}") from None
        return values

    @model_validator(mode="after")
    def _slices_have_a_grid(self) -> Self:
        if self.slices is not None and (self.shape is None or self.voxel_size is None):
            raise ValueError("slices are counted on a grid: give its shape and voxel_size, too")
        if self.slices is not None and self.shape is not None and not self.slices[0] < self.slices[1] <= self.shape[0]:
            first, stop = self.slices
            raise ValueError(f"the slices {first} to {stop} are none of a volume of {self.shape[0]}")
        return self

    def open_scan(self) -> Scan:
        """The scan.

        Raises
        ------
        ScanError
            As for other jobs; or if it is k-space, whose grid cannot be coarser.
        """
        scan = super().open_scan()
        if scan.kind == "mri":
            raise ScanError(f"{self.scan} holds k-space (MRI), and sweeps are made of X-ray projections only.")
        if getattr(self.parameters, "start", None) == "last":
            raise ScanError("A sweep cannot begin at the last result, which is on other voxels: choose another start.")
        return scan

    def coarse_grid(self, scan: Scan) -> Grid:
        """The grid of the results."""
        return self.coarser(scan.default_grid(self.shape, self.voxel_size))

    def coarser(self, grid: Grid) -> Grid:
        """The grid that the results are on, or are slices of, in the place of the reconstruction's own."""
        d, h, w = (max(1, math.ceil(n / self.binning)) for n in grid.shape)
        return Grid((d, h, w), grid.voxel_size * self.binning, grid.center)

    def coarse_slices(self, grid: Grid) -> tuple[int, int] | None:
        """[first, stop) of the slices of the coarser grid that hold the job's own; None for all."""
        if self.slices is None or self.shape is None:
            return None
        # Both grids have one centre, and the coarser one may be a little larger.
        first, stop = (
            (edge - self.shape[0] / 2) / self.binning + grid.shape[0] / 2 for edge in map(float, self.slices)
        )
        return max(0, math.floor(first + 1e-6)), min(grid.shape[0], math.ceil(stop - 1e-6))

    def part(self, value: float, grid: Grid) -> ReconstructionJob:
        """The reconstruction with a value of the parameter, on :meth:`coarse_grid` or slices of it."""
        options, parameters = _varied(self.options, self.parameters, self.parameter, value)
        options = options.model_copy(update={"binning": getattr(options, "binning", 1) * self.binning})
        return ReconstructionJob(
            scan=self.scan,
            options=options,
            shape=grid.shape,
            voxel_size=grid.voxel_size,
            device=self.device,
            seed=self.seed,
            parameters=parameters,
            slices=self.coarse_slices(grid),
        )


def _varied(
    options: ScanOptions | KSpaceOptions, parameters: Parameters, parameter: str, value: float
) -> tuple[ScanOptions | KSpaceOptions, Parameters]:
    """Options and parameters with a value of the one that is varied."""
    if parameter == "views":
        return type(options)(**{**options.model_dump(), "views": value}), parameters
    fields = parameters.model_dump()
    if parameter not in fields:
        raise ValueError(f"the method {fields['method']} has no parameter {parameter}")
    return options, type(parameters)(**{**fields, parameter: value})


def sweep_name(parameter: str, value: float) -> str:
    """What the volume of a value is called: "iterations 20", "regularization 0.001"."""
    return f"{parameter} {value:g}"


class CoilMapsJob(_ScanJob):
    """See the coil sensitivities that k-space is reconstructed with: those of the scan, or estimated ones.

    Attributes
    ----------
    scan, options, shape, voxel_size, device, seed
        As for a reconstruction.
    """

    def open_scan(self) -> KSpaceScan:
        """The scan.

        Raises
        ------
        ScanError
            As for other jobs, or if it is no k-space.
        """
        scan = super().open_scan()
        if scan.kind != "mri":
            raise ScanError(f"{self.scan} holds X-ray projections, which no coil has seen: open k-space.")
        return scan


class TrainJob(_Frozen):
    """Train a learned method; of all jobs the one that needs no scan.

    Attributes
    ----------
    training
        What is trained on, what, how, and how long: the contents of a CONFIG.toml.
    output
        Weights to write (.safetensors): the best so far, from the first validation on.
    resume
        Go on from the checkpoint beside the output where there is one; False begins anew.
    """

    training: TrainingConfig = TrainingConfig()
    output: Path
    resume: bool = True

    @property
    def device(self) -> str:
        """Of the training: "auto", "cpu" or "cuda"."""
        return self.training.device


ScanJob = (
    ReconstructionJob
    | OperatorJob
    | PatchJob
    | DataConsistencyJob
    | RegularizationJob
    | ResolutionJob
    | SweepJob
    | CoilMapsJob
)
"""The jobs of a scan."""

Job = ScanJob | TrainJob
"""Whatever :func:`~napari_recon.jobs.run_job` runs."""
