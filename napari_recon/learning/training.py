"""Training of the learned methods: on patches, each in the context of its whole volume.

A patch is trained as it is used later: with x_c the context and g = Aᵀ(A x_c − y) the gradient there, the gradient at a
patch x̃ is S g + S AᵀA Sᵀ(x̃ − S x_c). With x_c = x* + E, the truth with some error, linearity gives

    g = AᵀA E + Aᵀ(A x* − y),

both of them computed once a volume: a step of training projects nothing but its patches, whatever the volume's size.
E is nothing (the true context), a part of the start's error, or the error that the network's own first pass leaves,
refreshed now and then; a network that only ever saw true contexts is lost in its own second pass.

Volumes are seen mirrored as often as not, by the network alone: a mirrored circle of views is a circle of views, so
that the data steps need not know.

Scans of one's own without references are split instead: the whole volume is reconstructed from a part of the views, and
should explain the others (:mod:`napari_recon.learning.own_scans`). Not by patches: what other voxels get wrong is in
every ray through a patch, and patches taught to explain it would all explain it.

Under torchrun every process trains on volumes of its own, and gradients are averaged: a step of N processes is that of
one process on N batches. What goes wrong in one of them is told to all, so that none waits for it.

No torch is imported before training begins: forms are built from the configuration alone.
"""

from __future__ import annotations

import math
import os
import time
import tomllib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Box, Grid

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics
    from torch import Tensor, nn

    from napari_recon.learning.networks import Method
    from napari_recon.learning.own_scans import OwnScan, Split
    from napari_recon.physics.mri import MultiCoilMRI
    from napari_recon.physics.normal_operator import NormalOperator
    from napari_recon.physics.ramp_filtered import RampFiltered
    from napari_recon.physics.xray import XRayTransform

SOURCE_OBJECT, SOURCE_DETECTOR, EXTENT = 66.0, 199.0, 34.0
"""mm: the Walnut scanner's distances, and the edge of every training volume (a network knows no millimetres)."""

FINER = 2
"""Volumes are projected on voxels so many times finer than those that are reconstructed."""

REFRESHED = 24
"""How many scans' first passes are run anew at a time: they take longer than steps."""

MINIMISER_STEPS = 60
"""Of PADMM from the truth, where its minimiser is what is learned: within a percent of it, few views apart."""

PATIENCE = 24 * 3600
"""Seconds that a process waits for another, which may be validating: torchrun ends those whose fellow has died."""

_HELD_OUT = 1_000_000  # seeds of validation objects begin here


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Frozen):
    """What is trained on: simulated scans of synthetic objects, or of one's own volumes."""

    modality: Literal["x-ray", "mri"] = Field(
        default="x-ray",
        title="Modality",
        description="Cone-beam projections of anatomies, or multi-coil k-space of them.",
    )
    kinds: tuple[str, ...] = Field(
        default=("head", "thorax", "limb", "vessels", "shell", "foam"),
        min_length=1,
        title="Kinds",
        description="Synthetic anatomies or phantoms, in turn.",
    )
    folder: Path | None = Field(
        default=None,
        title="Folder",
        description="Volumes (.tif, .npy) to train on instead; the last ones, in order of their names, validate.",
    )
    scans: Path | None = Field(
        default=None,
        title="Scans",
        description="A folder of scans to train on instead, as they were measured, at their own size; the last ones, "
        "in order of their names, validate.",
    )
    supervision: Literal["reference", "splitting"] = Field(
        default="reference",
        title="Supervision",
        description="Of those scans: by 'reference' volumes beside them (reference.tif), or without any by "
        "'splitting': some views are left out, which the reconstruction from the others should explain.",
    )
    splits: int = Field(
        default=5,
        ge=2,
        le=50,
        title="Splits",
        description="Of 'splitting': parts that the views are in, each of them left out once.",
    )
    binning: int = Field(default=1, ge=1, le=64, title="Binning", description="Of those scans' detectors.")
    count: PositiveInt = Field(
        default=60, title="Volumes", description="Training volumes, each with a scan for every number of views."
    )
    size: int = Field(default=96, ge=8, le=1024, title="Size", description="Voxels along an edge of the volumes.")
    views: tuple[PositiveInt, ...] = Field(
        default=(6, 10, 19),
        title="Views",
        description="Projections of the scans, over a full circle; of scans of one's own so many, evenly spaced, and "
        "nothing takes all.",
    )
    photons: float | None = Field(
        default=30_000,
        ge=10,
        allow_inf_nan=False,
        title="Photons",
        description="A pixel without object; none leaves noise out.",
    )
    thickness: tuple[float, float] = Field(
        default=(1.5, 4.0),
        title="Thickness",
        description="Range of a scan's largest line integral: objects are scaled to one in it, whatever their unit.",
    )
    accelerations: tuple[PositiveFloat, ...] = Field(
        default=(5, 10),
        min_length=1,
        title="Accelerations",
        description="Of 'mri': a scan of every object with one of so many samples taken, for each.",
    )
    coils: int = Field(default=8, ge=1, le=128, title="Coils", description="Of 'mri'.")
    signal_to_noise: float = Field(
        default=30.0,
        gt=0,
        allow_inf_nan=False,
        title="Signal to noise",
        description="Of 'mri': mean of the object over the noise's standard deviation, as full sampling would have it.",
    )
    contrasts: float = Field(
        default=0.5,
        ge=0,
        le=1,
        title="Random contrasts",
        description="How many of the synthetic anatomies get any contrasts instead of their tissues', so that shapes "
        "are learned and not values.",
    )
    target: Literal["truth", "minimiser"] = Field(
        default="truth",
        title="Target",
        description="What is learned: the 'truth', or the 'minimiser' that PADMM makes of the same scan, for networks "
        "that are only to start it.",
    )
    regularization: float = Field(
        default=1e-3, ge=0, allow_inf_nan=False, title="Regularisation τ", description="Of that minimiser."
    )

    @property
    def samplings(self) -> tuple[float | None, ...]:
        """How often every object is scanned, and how: views, or accelerations; None takes all views."""
        return self.accelerations if self.modality == "mri" else self.views or (None,)

    @field_validator("photons", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        """TOML has no null."""
        return None if value == "none" else value

    @field_validator("scans")
    @classmethod
    def _one_folder(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("folder") is not None:
            raise ValueError("give a folder of volumes or one of scans, not both")
        return value

    @field_validator("views")
    @classmethod
    def _some_views(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if not value and info.data.get("scans") is None:
            raise ValueError("give at least one number of views")
        return value


class NetworkConfig(_Frozen):
    """The network, by its name."""

    name: Literal["light", "drunet", "unet"] = Field(default="light", title="Network")
    options: dict[str, Any] = Field(default={}, title="Options", description="See make_network.")
    weights: str = Field(
        default="",
        title="Begin with",
        description="Weights of the same method and network to begin with, by name or as a file; empty: random ones.",
    )


class MethodConfig(_Frozen):
    """What the network is a part of."""

    name: Literal["unrolled", "post-processing"] = Field(default="unrolled", title="Method")
    iterations: int = Field(default=3, ge=1, le=100, title="Iterations", description="Data steps, of 'unrolled'.")
    tied: bool = Field(default=True, title="Tied", description="One network for all iterations.")
    step: Literal["ramp", "gradient"] = Field(default="ramp", title="Data step")
    step_size: float = Field(default=1.0, gt=0, allow_inf_nan=False, title="Step size", description="To start with.")
    data_steps: int = Field(
        default=4, ge=1, le=100, title="Data steps", description="Accelerated ones before each use of the network."
    )
    start: Literal["fdk", "least-squares", "tv", "zero-filled", "sense"] = Field(
        default="tv",
        title="Start",
        description="FDK, or some ramp-filtered steps of least squares or of total variation after it; of 'mri' the "
        "zero-filled volume, CG-SENSE, or total variation.",
    )
    memory: bool = Field(
        default=False,
        title="Memory",
        description="Show the network the volume before the data steps, too, of 'unrolled'.",
    )
    normal: Literal["exact", "fit"] = Field(
        default="exact", title="Patches", description="AᵀA on patches: 'exact', or a fitted H."
    )


class OptimisationConfig(_Frozen):
    """How the weights are found: Adam, with warm-up, a cosine to the end, and clipped gradients."""

    steps: PositiveInt = Field(default=20_000, title="Steps")
    patch: int = Field(default=48, ge=8, title="Patch", description="Edge of a training patch in voxels.")
    batch: PositiveInt = Field(
        default=2, title="Batch", description="Patches at a time, in every process where there are several."
    )
    accumulation: PositiveInt = Field(default=1, title="Accumulation", description="Batches a step.")
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False, title="Learning rate")
    step_rate: float = Field(
        default=10.0,
        ge=0,
        allow_inf_nan=False,
        title="Rate of the data steps",
        description="The learning rate of the data steps' lengths, over the network's.",
    )
    warm_up: int = Field(default=200, ge=0, title="Warm-up", description="Steps to reach the learning rate.")
    clip: float = Field(default=0.1, gt=0, title="Clipping", description="Largest norm of the gradient.")
    loss: Literal["relative", "l1", "l2"] = Field(
        default="relative",
        title="Loss",
        description="'relative': squared error over that of the scan's start, so that easy scans count as much as hard "
        "ones; 'l1' and 'l2': in units of the brightness.",
    )
    flips: bool = Field(default=True, title="Mirror", description="Show volumes mirrored as often as not.")
    context_mix: float = Field(
        default=0.5,
        ge=0,
        le=1,
        title="Context mix",
        description="How often a patch's context has errors: most of the start's, or those of the first pass.",
    )
    refresh: int = Field(
        default=0,
        ge=0,
        title="Refresh",
        description="Steps after which first passes are run anew, on two dozen of the scans; 0: never.",
    )
    mixed_precision: bool = Field(
        default=False,
        title="Mixed precision",
        description="bfloat16 in the network: on a GPU, and on CPUs that have it (twice as fast there).",
    )


class ValidationConfig(_Frozen):
    """What decides which weights are best: first passes on objects that are not trained on."""

    every: PositiveInt = Field(default=500, title="Every", description="Steps.")
    kinds: tuple[str, ...] = Field(default=(), title="Kinds", description="By default those of training.")
    count: PositiveInt = Field(default=6, title="Volumes")


class TrainingConfig(_Frozen):
    """Everything that training depends on: the contents of a CONFIG.toml.

    Attributes
    ----------
    data, network, method, optimisation, validation
        The file's tables.
    checkpoint_every
        Steps; a checkpoint lies beside the weights until training is done.
    seed
        Of objects, noise, weights and patches.
    device
        "auto", "cpu" or "cuda".
    card
        Text for the weights' model card; figures are added.
    """

    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    method: MethodConfig = MethodConfig()
    optimisation: OptimisationConfig = OptimisationConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint_every: PositiveInt = 500
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    card: str = ""


@dataclass(frozen=True)
class TrainingUpdate:
    """What training tells while it goes on.

    Attributes
    ----------
    stage
        "preparing", then "training".
    step, total
        Of the stage: scans made, or steps of the optimiser done.
    figures
        ``loss`` (the mean of all processes) and ``learning_rate`` of every step; with a validation ``psnr`` (dB,
        inside the field of view, data range that of the truth, values below zero set to zero), ``start_psnr`` of what
        it began with, ``best_psnr``.
        Where views are split, these are of the projections that were left out, ramp-filtered.
    seconds
        Since training began here.
    patch, start, truth
        With a validation: the middle of a validation volume (p, p, p), float32 in 1/mm; what it began with; what it
        should be, where that is known.
    voxel_size
        Of these, in mm.
    """

    stage: Literal["preparing", "training"]
    step: int
    total: int
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    patch: NDArray[np.float32] | None = None
    start: NDArray[np.float32] | None = None
    truth: NDArray[np.float32] | None = None
    voxel_size: float = 1.0


def read_config(path: str | Path) -> TrainingConfig:
    """A configuration from a TOML file; paths in it are relative to it.

    Raises
    ------
    ScanError
        If the file cannot be read, or an entry will not do.
    """
    path = Path(path).expanduser()
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScanError(f"The configuration {path} cannot be read ({error.strerror}): check the path.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScanError(f"The configuration {path} is not TOML ({error}): correct it.") from None
    for table, names in (("data", ("folder", "scans")), ("network", ("weights",))):
        section = entries.get(table)
        for name in names:
            if isinstance(section, dict) and isinstance(section.get(name), str):
                beside = path.absolute().parent / Path(section[name]).expanduser()
                if name != "weights":
                    section[name] = beside
                elif beside.is_file():  # else the name of weights that ship
                    section[name] = str(beside)
    try:
        return TrainingConfig.model_validate(entries)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ScanError(f"{path}: there is no entry {name!r}; leave it out, or correct its name.") from None
        problem = first["msg"].removeprefix("Value error, ")
        problem = problem[0].lower() + problem[1:]
        raise ScanError(f"{path}: {name} = {first['input']} will not do: {problem}.") from None


def write_config(config: TrainingConfig, path: str | Path) -> None:
    """Write a configuration as TOML, whole or not at all.

    Raises
    ------
    ScanError
        If the file cannot be written.
    """
    import tomli_w

    path = Path(path).expanduser()
    entries = config.model_dump(mode="json")
    entries["data"] = {name: value for name, value in entries["data"].items() if value is not None}
    entries["data"].setdefault("photons", "none")
    unfinished = path.with_name(path.name + ".partial")
    try:
        unfinished.write_text(tomli_w.dumps(entries), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ScanError(f"The configuration {path} cannot be written ({error.strerror}): choose another.") from None
    finally:
        unfinished.unlink(missing_ok=True)


def train(config: TrainingConfig, output: str | Path, resume: bool = True) -> TrainingUpdate:
    """Train to the end; the last word of :func:`stream_training`."""
    last = None
    for update in stream_training(config, output, resume):
        last = update
    assert last is not None
    return last


def checkpoint_path(output: str | Path) -> Path:
    """Where the checkpoint of a training lies."""
    output = Path(output)
    return output.with_name(output.name + ".checkpoint")


def stream_training(
    config: TrainingConfig, output: str | Path, resume: bool = True
) -> Generator[TrainingUpdate, None, None]:
    """Train, and tell an update a step; the best weights so far are always in ``output``.

    Who consumes the generator may stop at any time: closing it leaves the best weights, and a checkpoint from which the
    same call goes on. Resumed training gives the weights that it would have given without interruption, bit by bit on a
    CPU. Under ``torchrun`` (WORLD_SIZE is set) every process trains on scans of its own, with a batch of its own, and
    gradients are averaged; the first one validates and writes, and it alone reads the checkpoint. Processes step
    together, so that they have to be stopped together (:func:`stops_anywhere`).

    Parameters
    ----------
    config
        What, how, how long.
    output
        Weights to write (.safetensors).
    resume
        False begins anew where there is a checkpoint.

    Raises
    ------
    ScanError
        If something in the configuration will not do, a checkpoint belongs to another one, or training diverges; in all
        processes, wherever it was found.
    """
    output = Path(output).expanduser()
    if output.suffix != ".safetensors":
        raise ScanError(f"Weights are written as .safetensors, not to {output.name!r}: give such a name.")
    if not output.absolute().parent.is_dir():
        raise ScanError(f"The folder of {output} does not exist: create it, or choose another.")
    trainer = _Trainer(config, output)
    try:
        yield from trainer.prepare()
        yield from trainer.run(resume)
    finally:
        trainer.close()


def stops_anywhere(stop: bool) -> bool:
    """Whether any process of a training was asked to stop.

    All of them have to ask after every update of "training": then all leave after the same step, and none waits in
    vain for the gradients of another. Without torchrun it is ``stop``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return stop
    import torch

    return any(_gathered(stop)) if torch.distributed.is_initialized() else stop


def _gathered(said: Any) -> list[Any]:
    """What every process says, in their order; a small thing that can be pickled."""
    import torch

    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, said)
    return everyone


# -- scans to train on ---------------------------------------------------------------------------------------------


@dataclass
class _Example:
    """A scan with its truth, and what makes patch gradients cheap; volumes are (1, 1, D, H, W)."""

    truth: Tensor
    start: Tensor
    scale: float
    physics: LinearPhysics  # of the data steps
    inside: NDArray[np.bool_]  # (H, W): the field of view
    voxel_size: float
    operator: NormalOperator | None = None
    error: float = 1.0  # mean square of start − x*, in units of the scale
    noise_gradient: Tensor | None = None  # Aᵀ(A x* − y)
    start_gradient: Tensor | None = None  # AᵀA (start − x*)
    first: Tensor | None = None  # the network's first pass
    first_gradient: Tensor | None = None


def _circle(grid: Grid, views: int) -> Geometry:
    """A full circle that sees the cylinder in the grid's cube, as the Walnut scanner would."""
    pitch = EXTENT / grid.shape[0] * SOURCE_DETECTOR / SOURCE_OBJECT
    reach = EXTENT / 2
    across = SOURCE_DETECTOR * reach / math.sqrt(SOURCE_OBJECT**2 - reach**2)
    along = SOURCE_DETECTOR * reach / (SOURCE_OBJECT - reach)
    rows, columns = (2 * math.ceil(half / pitch + 1) for half in (along, across))
    return Geometry.cone(np.arange(views) * 360 / views, (rows, columns), pitch, SOURCE_OBJECT, SOURCE_DETECTOR)


def _inside(size: int) -> NDArray[np.bool_]:
    """The field of view of an n x n slice: a little less than its inscribed circle, (n, n)."""
    place = (np.arange(size) - (size - 1) / 2) / (size / 2)
    return np.hypot(place[:, None], place[None]) < 0.98


def _objects(data: DataConfig, validation: ValidationConfig, seed: int, held_out: bool) -> list[tuple[Any, int]]:
    """(kind or file, seed) of every object, those of training or those held out."""
    count = validation.count if held_out else data.count
    if data.scans is not None:
        from napari_recon.learning.own_scans import find_scans

        return _some(find_scans(data.scans, data.binning, data.supervision == "reference"), data, validation, held_out)
    if data.folder is None:
        kinds = validation.kinds if held_out and validation.kinds else data.kinds
        for kind in kinds:
            if kind not in (known := _known_kinds(data)):
                raise ScanError(f"There is no kind of object {kind!r} to train on; there are {', '.join(known)}.")
        first = seed * 2 * _HELD_OUT + (_HELD_OUT if held_out else 0)
        return [(kinds[i % len(kinds)], first + i) for i in range(count)]
    try:
        files = sorted(f for f in data.folder.iterdir() if f.suffix.lower() in (".tif", ".tiff", ".npy"))
    except OSError as error:
        raise ScanError(f"The folder {data.folder} cannot be read ({error.strerror}): check the path.") from None
    if len(files) < 2:
        raise ScanError(f"{data.folder} holds {len(files)} volumes (.tif, .npy); training needs at least two.")
    return _some(files, data, validation, held_out)


def _known_kinds(data: DataConfig) -> tuple[str, ...]:
    from napari_recon.learning import anatomy, phantoms, simulate_mri

    return simulate_mri.KINDS if data.modality == "mri" else (*anatomy.KINDS, *phantoms.KINDS)


def _some(
    things: Sequence[Any], data: DataConfig, validation: ValidationConfig, held_out: bool
) -> list[tuple[Any, int]]:
    """The last ones validate, half of them at most; each with its number, the seed of what is random about it."""
    kept = min(validation.count, len(things) // 2)
    numbered = [(thing, i) for i, thing in enumerate(things)]
    return numbered[-kept:] if held_out else numbered[:-kept][: data.count]


def _fine_volume(kind: str | Path, seed: int, data: DataConfig) -> NDArray[np.float32]:
    """An anatomy or a person's own volume on the finer grid, (n, n, n)."""
    fine = FINER * data.size
    if isinstance(kind, str):
        from napari_recon.learning.anatomy import make_anatomy, with_random_contrasts

        anatomy = make_anatomy(kind, seed, size=fine)
        random = np.random.default_rng([seed, fine]).random() < data.contrasts
        return with_random_contrasts(anatomy, seed) if random else anatomy.volume
    import torch

    from napari_recon.learning.own_scans import read_volume

    raw = read_volume(kind)
    if min(raw.shape) < 8:
        raise ScanError(f"The volume {kind} is of {raw.shape} voxels, too few to train on: take it out of the folder.")
    edge = max(raw.shape)  # into a cube, so that voxels stay cubes
    room = [((edge - n) // 2, edge - n - (edge - n) // 2) for n in raw.shape]
    cube = torch.from_numpy(np.pad(raw, room))[None, None]
    return torch.nn.functional.interpolate(cube, size=(fine,) * 3, mode="trilinear", antialias=False)[0, 0].numpy()


def _simulate(kind: str | Path, seed: int, data: DataConfig, views: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """(truth, measurements) of an object's scans, (1, 1, n, n, n) and (1, 1, rows, views, columns), on the CPU."""
    import torch

    from napari_recon.learning import phantoms
    from napari_recon.physics.xray import XRayTransform

    n = data.size
    grid = Grid((n, n, n), EXTENT / n)
    if isinstance(kind, str) and kind in phantoms.KINDS:
        phantom = phantoms.make_phantom(kind, seed)
        volume = None
        truth = torch.from_numpy(phantom.volume(grid))[None, None]
    else:
        fine = np.clip(_fine_volume(kind, seed, data), 0, None) * _inside(FINER * n)
        volume = torch.from_numpy(np.ascontiguousarray(fine, np.float32))[None, None]
        truth = torch.nn.functional.avg_pool3d(volume, FINER)
    for count in views:
        geometry = _circle(grid, count)
        rng = np.random.default_rng([seed, count])
        if volume is None:
            y = torch.from_numpy(phantom.project(geometry)).permute(1, 0, 2)[None, None].contiguous()
        else:
            finer = Grid((FINER * n,) * 3, EXTENT / (FINER * n))
            y = XRayTransform(geometry, finer, device="cpu").A(volume)
        factor = rng.uniform(*data.thickness) / max(float(y.max()), 1e-12)
        y *= factor
        if data.photons is not None:
            counted = rng.poisson(data.photons * np.exp(-y.double().numpy())).clip(min=1)
            y = torch.from_numpy(-np.log(counted / data.photons)).float()
        yield truth * factor, y


# -- training itself -----------------------------------------------------------------------------------------------


class _Trainer:
    """The state of a training."""

    def __init__(self, config: TrainingConfig, output: Path) -> None:
        import torch

        from napari_recon.learning.networks import make_network
        from napari_recon.physics.devices import resolve_device
        from napari_recon.reconstruction.unrolled import PostProcessing, UnrolledPGD

        self.config, self.output = config, output
        self.started = time.perf_counter()
        self.patch: int | tuple[int, ...] = min(config.optimisation.patch, config.data.size)
        self.simulated = config.data.scans is None
        self.mri = config.data.modality == "mri"
        if self.mri:
            _expect_for_mri(config)
        self.splitting = not self.simulated and config.data.supervision == "splitting"
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.device = resolve_device(config.device)
        objects = _objects(config.data, config.validation, config.seed, held_out=False)
        if len(objects) < self.world:
            raise ScanError(
                f"There are fewer training volumes ({len(objects)}) than processes ({self.world}): raise data.count, "
                "or start fewer processes."
            )
        self.objects = objects[self.rank :: self.world]
        self.held_out = _objects(config.data, config.validation, config.seed, held_out=True) if self.rank == 0 else []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            options = dict(config.network.options)
            if config.method.name == "unrolled" and config.method.memory:
                options["inputs"] = 2
            if self.mri:
                options["channels"] = 2
            network = make_network(config.network.name, **options)
        method = config.method
        self.model: Method
        if method.name == "unrolled":
            self.model = UnrolledPGD(
                network,
                method.iterations,
                method.tied,
                method.step,
                method.step_size,
                data_steps=method.data_steps,
                nonnegative=not self.mri,
                memory=method.memory,
                patch_size=self.patch,
                batch=config.optimisation.batch,
                init=method.start,
            )
        else:
            self.model = PostProcessing(network, patch_size=self.patch, init=method.start)
        if config.network.weights:
            _begin_with(self.model, config.network.weights)
        self.model.to(self.device).train()
        self.model.mixed_precision = config.optimisation.mixed_precision
        self.mirror = _Mirror()
        for each in self.model.networks if isinstance(self.model, UnrolledPGD) else [self.model.network]:
            each.register_forward_pre_hook(self.mirror.before)
            each.register_forward_hook(self.mirror.after)
        rate = {"step_sizes": config.optimisation.step_rate}
        self.rates = [rate.get(name, 1.0) for name, _ in self.model.named_parameters()]
        self.optimiser = torch.optim.Adam([{"params": [p]} for p in self.model.parameters()])
        self.circles: dict[int, XRayTransform] = {}  # of simulated scans, by their views
        self.physics: dict[int, LinearPhysics] = {}
        self.ramps: dict[int, RampFiltered | None] = {}
        self.operators: dict[int, NormalOperator] = {}
        self.examples: list[_Example] = []
        self.validation: list[_Example] = []
        self.splits: list[Split] = []
        self.held_out_splits: list[Split] = []
        self.step, self.best = 0, -math.inf
        self.refreshed: dict[str, Tensor] | None = None  # the weights that the first passes were run with
        self.with_first: list[_Example] = []
        self.joined = False
        if self.device.index is not None:
            torch.cuda.set_device(self.device)
        if self.world > 1 and not torch.distributed.is_initialized():
            # NCCL wants a GPU for every process of a machine; gloo goes through the host.
            alone = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
            backend = "nccl" if self.device.type == "cuda" and alone else "gloo"
            torch.distributed.init_process_group(backend, timeout=timedelta(seconds=PATIENCE))
            self.joined = True

    def close(self) -> None:
        """Leave the process group, if it was joined here."""
        if self.joined:
            import torch

            torch.distributed.destroy_process_group()

    # -- scans ----------------------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[TrainingUpdate]:
        """Simulate or read all scans, with their starts and the gradients that patches need."""
        wrong = ""
        try:
            yield from self._prepare()
        except ScanError as error:
            wrong = str(error)
        self._all_hear(wrong)
        if self.world > 1 and self.config.data.scans is not None:  # for the weights, which are one method
            edges = [min(each) for each in zip(*_gathered(self._edges()), strict=True)]
            self.patch = self.model.patch_size = edges[0] if len(set(edges)) == 1 else tuple(edges)

    def _all_hear(self, wrong: str) -> None:
        """Raise, in every process, what is wrong in one of them; nothing where that is empty everywhere."""
        for sentence in _gathered(wrong) if self.world > 1 else [wrong]:
            if sentence:
                raise ScanError(sentence)

    def _prepare(self) -> Iterator[TrainingUpdate]:
        total = len(self.objects) + len(self.held_out)
        every = self.config.data.samplings
        for i, (thing, seed) in enumerate([*self.objects, *self.held_out]):
            place = i - len(self.objects)
            if self.splitting and place < 0:
                self.splits.extend(self._splits(thing, seed, every))
            elif self.splitting:
                self.held_out_splits.append(next(self._splits(thing, seed, [every[place % len(every)]])))
            elif place < 0:
                self.examples.extend(self._examples(thing, seed, every))
            else:
                self.validation.extend(self._examples(thing, seed, [every[place % len(every)]]))
            yield TrainingUpdate("preparing", i + 1, total, seconds=self._seconds())
        if self.config.data.scans is not None:  # a patch that all volumes have room for
            starts = [e.start for e in (*self.examples, *self.validation)]
            starts += [split.start for split in (*self.splits, *self.held_out_splits)]
            d, h, w = (min(self.config.optimisation.patch, *(s.shape[k] for s in starts)) for k in (2, 3, 4))
            self.patch = self.model.patch_size = d if d == h == w else (d, h, w)

    def _scans(
        self, thing: str | Path | OwnScan, seed: int, samplings: Sequence[float | None]
    ) -> Iterator[tuple[Tensor | None, Tensor, Any]]:
        """The truth, the measurements and the physics of an object's scans, or of one's own with some of its views."""
        from napari_recon.physics.xray import XRayTransform

        if not isinstance(thing, str | Path):
            for count in samplings:
                yield thing.read(None if count is None else int(count), self.device)
            return
        if self.mri:
            yield from self._kspace(str(thing), seed, samplings)
            return
        counts = [int(count) for count in samplings if count is not None]
        for count, (truth, y) in zip(counts, _simulate(thing, seed, self.config.data, counts), strict=True):
            if count not in self.circles:
                grid = Grid((self.config.data.size,) * 3, EXTENT / self.config.data.size)
                self.circles[count] = XRayTransform(_circle(grid, count), grid, device=self.device)
            yield truth.to(self.device), y.to(self.device), self.circles[count]

    def _kspace(
        self, kind: str, seed: int, accelerations: Sequence[float | None]
    ) -> Iterator[tuple[Tensor, Tensor, MultiCoilMRI]]:
        """Scans of an object by MRI, each with coils, phase, sampling and noise of its own."""
        import torch

        from napari_recon.learning.simulate_mri import simulate_mri
        from napari_recon.physics.mri import MultiCoilMRI

        data = self.config.data
        for number, acceleration in enumerate(accelerations):
            made = simulate_mri(
                kind, seed + number * 2 * _HELD_OUT, data.size, acceleration or 1.0, data.coils, data.signal_to_noise
            )
            truth = torch.from_numpy(np.stack([made.truth.real, made.truth.imag]))[None]
            physics = MultiCoilMRI.from_scan(made.scan, self.device)
            yield truth.to(self.device), made.scan.measurements(self.device), physics

    def _physics_of(self, xray: Any) -> tuple[LinearPhysics, RampFiltered | None]:
        """What data steps are taken with, and what a start may need; simulated scans of as many views share them."""
        from napari_recon.physics.ramp_filtered import RampFiltered

        if self.mri:
            return xray, None
        views, method = xray.geometry.views, self.config.method
        if self.simulated and views in self.physics:
            return self.physics[views], self.ramps[views]
        ramp = RampFiltered(xray) if method.step == "ramp" or method.start != "fdk" else None
        physics: LinearPhysics = ramp if ramp is not None and method.step == "ramp" else xray
        if self.simulated:
            self.physics[views], self.ramps[views] = physics, ramp
        return physics, ramp

    def _start(self, y: Tensor, xray: Any, ramp: RampFiltered | None) -> Tensor:
        """What the method begins with."""
        from napari_recon.reconstruction.start import start_volume
        from napari_recon.reconstruction.tv import PreconditionedTV

        start = self.config.method.start
        if self.mri:
            return start_volume(start, y, xray)
        return start_volume("fdk", y, xray) if start == "fdk" else PreconditionedTV.of(start)(y, xray, ramp=ramp)

    def _examples(
        self, thing: str | Path | OwnScan, seed: int, samplings: Sequence[float | None]
    ) -> Iterator[_Example]:
        """Scans whose truth is known."""
        from napari_recon.physics.normal import fit_normal_operator
        from napari_recon.physics.ramp_filtered import RampFiltered
        from napari_recon.reconstruction.padmm import PADMM
        from napari_recon.reconstruction.start import brightness

        for truth, y, xray in self._scans(thing, seed, samplings):
            assert truth is not None
            physics, ramp = self._physics_of(xray)
            start = self._start(y, xray, ramp)
            if self.config.data.target == "minimiser":
                method = PADMM(MINIMISER_STEPS, self.config.data.regularization)
                truth = method(y, xray, init=truth if self.mri else truth.clamp(min=0))
            if self.mri:
                inside = np.ones(truth.shape[-2:], bool)
            else:
                inside = _inside(self.config.data.size) if self.simulated else _seen(xray)
            size = xray.grid.voxel_size
            example = _Example(truth, start, brightness(start) or 1.0, physics, inside, size)
            example.error = float((start - truth).square().mean()) / example.scale**2
            if self.config.method.name == "unrolled":
                if self.config.method.normal == "fit":
                    count = 0 if self.mri else xray.geometry.views
                    if self.mri or not self.simulated or count not in self.operators:
                        self.operators[count] = fit_normal_operator(physics, seed=self.config.seed)
                    example.operator = self.operators[count]
                measured = physics.measurement(y) if isinstance(physics, RampFiltered) else y
                example.noise_gradient = physics.A_adjoint(physics.A(truth) - measured) / _norm(physics)
                example.start_gradient = self._normal(example, None)(start - truth)
            yield example

    def _splits(self, thing: OwnScan, seed: int, samplings: Sequence[float | None]) -> Iterator[Split]:
        """One's own scan without each part of its views, in turn."""
        from napari_recon.learning.own_scans import Split, split_views
        from napari_recon.physics.ramp_filtered import RampFiltered
        from napari_recon.reconstruction.start import brightness

        for _, y, xray in self._scans(thing, seed, samplings):
            seed_of_parts = (self.config.seed, seed, xray.geometry.views)
            for seen, left_out in split_views(xray.geometry.views, self.config.data.splits, seed_of_parts):
                part, others = xray.subset(seen), xray.subset(left_out)
                y_part, y_others = y[:, :, :, seen], y[:, :, :, left_out]
                physics, ramp = self._physics_of(part)
                start = self._start(y_part, part, ramp)
                measured = physics.measurement(y_part) if isinstance(physics, RampFiltered) else y_part
                back = physics.A_adjoint(measured) / _norm(physics)
                scale = brightness(start) or 1.0
                yield Split(start, scale, physics, back, _norm(physics), others, y_others)

    def _normal(self, example: _Example, box: Box | None) -> Callable[[Tensor], Tensor]:
        """AᵀA / ‖A‖² of the volume (exactly), or on a patch (as configured)."""
        norm, physics = _norm(example.physics), example.physics
        if box is None:
            return lambda x: physics.A_adjoint_A(x) / norm
        if example.operator is not None:
            h = example.operator.patch(box)
            return lambda x: h.apply(x) / norm
        patch: Any = physics
        restricted = patch.restrict(box)
        return lambda x: restricted.A_adjoint_A(x) / norm

    # -- steps ----------------------------------------------------------------------------------------------------

    def run(self, resume: bool) -> Iterator[TrainingUpdate]:
        """Take the steps that are left."""
        import torch

        optimisation, validation = self.config.optimisation, self.config.validation
        if resume:
            self._resume()
        loss_of, averaging = self._loss_module()
        parameters = list(self.model.parameters())
        saved = self.step
        try:
            while self.step < optimisation.steps:
                if optimisation.refresh and self.step and self.step % optimisation.refresh == 0:
                    self._refresh()
                rate = self._learning_rate(self.step)
                for group, factor in zip(self.optimiser.param_groups, self.rates, strict=True):
                    group["lr"] = rate * factor
                self.optimiser.zero_grad(set_to_none=True)
                total = 0.0
                for micro in range(optimisation.accumulation):
                    with averaging(micro == optimisation.accumulation - 1):
                        loss = loss_of(micro) / optimisation.accumulation
                        loss.backward()
                    total += float(loss.detach())
                if self.world > 1:  # and what is not finite anywhere stops all
                    mean = torch.tensor(total, device=self.device) / self.world
                    torch.distributed.all_reduce(mean)
                    total = float(mean)
                if not math.isfinite(total):
                    raise ScanError(
                        f"Training diverged at step {self.step + 1}: lower optimisation.learning_rate, or lengthen its "
                        f"warm-up; the best weights so far are kept."
                    )
                torch.nn.utils.clip_grad_norm_(parameters, optimisation.clip)
                self.optimiser.step()
                self.step += 1
                figures: dict[str, float] = {"loss": total, "learning_rate": rate}
                seen = _Seen()
                last = self.step == optimisation.steps
                if self.rank == 0 and (last or self.step % validation.every == 0):
                    found, seen = self._validate()
                    figures |= found
                if self.rank == 0 and not last and self.step % self.config.checkpoint_every == 0:
                    self._checkpoint()
                    saved = self.step
                told = (seen.patch, seen.start, seen.truth, seen.voxel_size)
                yield TrainingUpdate("training", self.step, optimisation.steps, figures, self._seconds(), *told)
        except GeneratorExit:
            # Between two steps: everything is whole.
            if self.rank == 0 and saved < self.step < optimisation.steps:
                if self.best == -math.inf:
                    self._validate()
                self._checkpoint()
            raise
        if self.rank == 0:
            checkpoint_path(self.output).unlink(missing_ok=True)

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to a hundredth."""
        o = self.config.optimisation
        warm = min(1.0, (step + 1) / (o.warm_up + 1))
        return o.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / o.steps)))

    def _loss_module(self) -> tuple[nn.Module, Callable[[bool], AbstractContextManager[None]]]:
        """The loss of a batch as a module, and a context for it, in which True averages gradients over processes.

        DistributedDataParallel hooks into a module's forward; the method's is a reconstruction from projections, hence
        a module whose forward is the loss.
        """
        import torch

        trainer = self

        class Loss(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = trainer.model

            def forward(self, micro: int) -> Tensor:
                return trainer._loss(micro)

        if self.world == 1:
            return Loss(), lambda average: nullcontext()
        module = torch.nn.parallel.DistributedDataParallel(Loss(), broadcast_buffers=False)
        return module, lambda average: nullcontext() if average else module.no_sync()

    def _loss(self, micro: int) -> Tensor:
        """The mean error of a batch of random patches, in units of the volumes' brightness."""
        import torch

        from napari_recon.reconstruction.unrolled import UnrolledPGD

        # Drawn afresh from what identifies the batch: resuming needs no generator's state.
        rng = np.random.default_rng([self.config.seed, self.step, micro, self.rank])
        if self.splitting:
            return self._splitting_loss(rng)
        drawn = [self._draw(rng) for _ in range(self.config.optimisation.batch)]
        starts, truths = torch.cat([d.start for d in drawn]), torch.cat([d.truth for d in drawn])
        scale = torch.tensor([d.scale for d in drawn], device=self.device).reshape(-1, 1, 1, 1, 1)
        self.mirror.axes = self._mirrored(rng)
        if isinstance(self.model, UnrolledPGD):

            def gradient(x: Tensor) -> Tensor:
                return torch.cat([d.gradient(part) for d, part in zip(drawn, x.split(1), strict=True)])

            found = starts
            for found in self.model.unroll(starts, gradient, scale):  # noqa: B007
                pass
        else:
            found = self.model.denoise(starts, scale)
        self.mirror.axes = []
        error, loss = (found - truths) / scale, self.config.optimisation.loss
        if loss == "relative":
            usual = torch.tensor([d.error for d in drawn], device=self.device)
            return (error.square().mean((1, 2, 3, 4)) / usual).mean()
        return error.abs().mean() if loss == "l1" else error.square().mean()

    def _mirrored(self, rng: np.random.Generator) -> list[int]:
        """Axes in which the network is to see its volumes mirrored."""
        mirrored = rng.random(3) < 0.5 if self.config.optimisation.flips else np.zeros(3, bool)
        return [axis for axis, flip in zip((2, 3, 4), mirrored, strict=True) if flip]

    def _splitting_loss(self, rng: np.random.Generator) -> Tensor:
        """How well reconstructions from a part of the views explain the views that were left out, over their starts."""
        import torch

        losses = []
        for _ in range(self.config.optimisation.batch):
            split = self.splits[int(rng.integers(len(self.splits)))]
            error = split.residual(self._of_split(split, self._mirrored(rng)))
            if self.config.optimisation.loss == "l1":
                losses.append(error.abs().mean() / math.sqrt(split.error))
            else:
                losses.append(error.square().mean() / split.error)
        return torch.stack(losses).mean()

    def _of_split(self, split: Split, mirrored: Sequence[int] = ()) -> Tensor:
        """The whole volume from the views that are seen; differentiable, with one network's features at a time."""
        from torch.utils.checkpoint import checkpoint

        from napari_recon.reconstruction.unrolled import UnrolledPGD

        model, x = self.model, split.start

        def denoise(v: Tensor, iteration: int, before: Tensor) -> Tensor:
            self.mirror.axes = list(mirrored)  # here, since it is run again on the way back
            if isinstance(model, UnrolledPGD):
                out = model.denoise(v, iteration, split.scale, before)
            else:
                out = model.denoise(v, split.scale)
            self.mirror.axes = []
            return out

        if not isinstance(model, UnrolledPGD):
            return denoise(x, 0, x)
        for k in range(model.iterations):
            before = x
            *_, x = model.descend(x, split.gradient, k)
            found: Tensor = checkpoint(denoise, x, k, before, use_reentrant=False)
            x = found
        return x

    def _draw(self, rng: np.random.Generator) -> _Patch:
        """A random patch of a random scan, in one of the contexts."""
        mixed = rng.random() < self.config.optimisation.context_mix
        of_first = mixed and bool(self.with_first) and rng.random() < 0.5
        among = self.with_first if of_first else self.examples
        example = among[int(rng.integers(len(among)))]
        edges = self._edges()
        corner = [int(rng.integers(n - p + 1)) for n, p in zip(example.truth.shape[2:], edges, strict=True)]
        box: Box = tuple(slice(a, a + p) for a, p in zip(corner, edges, strict=True))  # type: ignore[assignment]
        at = (..., *box)
        truth = example.truth[at]
        part, second = 0.0, False
        if mixed:
            # The context of the first pass is the start itself; that of the second is better, and begun from.
            part, second = 1.0 if of_first else rng.uniform(0.5, 1.0), rng.random() < 0.5
        if example.noise_gradient is None or example.start_gradient is None:
            return _Patch(truth, example.start[at], example.scale, example.error)
        at_context = example.noise_gradient[at]
        volume, gradient = example.start, example.start_gradient
        if of_first and example.first is not None and example.first_gradient is not None:
            volume, gradient = example.first, example.first_gradient
        if part:
            at_context = at_context + part * gradient[at]
        context = truth + part * (volume[at] - truth)
        start = context if second else volume[at]
        return _Patch(truth, start, example.scale, example.error, at_context, context, self._normal(example, box))

    def _edges(self) -> tuple[int, ...]:
        return (self.patch,) * 3 if isinstance(self.patch, int) else self.patch

    # -- whole volumes --------------------------------------------------------------------------------------------

    def _first_pass(self, example: _Example) -> Tensor:
        """What the method makes of a scan whose truth is known; no projections are kept for it."""
        import torch

        from napari_recon.reconstruction.partitioned import Partition
        from napari_recon.reconstruction.unrolled import UnrolledPGD, apply_by_patches

        partition = Partition(example.truth.shape[2:], self.patch)
        x = example.start.clone()
        with torch.no_grad():
            if not isinstance(self.model, UnrolledPGD):
                denoise = partial(self.model.denoise, scale=example.scale)
                for _ in apply_by_patches(denoise, example.start, x, partition, self.config.optimisation.batch):
                    pass
                return x
            unrolled, normal = self.model, self._normal(example, None)
            assert example.noise_gradient is not None
            noise = example.noise_gradient
            for k in range(unrolled.iterations):
                before = x
                *_, stepped = unrolled.descend(x, lambda v: normal(v - example.truth) + noise, k)
                x = stepped.clone()
                for _ in unrolled.denoise_by_patches(stepped, x, k, example.scale, before, partition):
                    pass
        return x

    def _refresh(self) -> None:
        """Run the first pass on some of the scans, for its errors as context."""
        if self.config.method.name != "unrolled" or not self.config.optimisation.context_mix:
            return
        self.refreshed = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        for example in self.with_first:
            example.first = example.first_gradient = None
        # Others every time, and the same ones where training goes on after a stop.
        rng = np.random.default_rng([self.config.seed, self.step // self.config.optimisation.refresh, self.rank])
        chosen = rng.permutation(len(self.examples))[:REFRESHED]
        self.with_first = [self.examples[int(i)] for i in chosen]
        for example in self.with_first:
            example.first = self._first_pass(example)
            example.first_gradient = self._normal(example, None)(example.first - example.truth)

    def _validate(self) -> tuple[dict[str, float], _Seen]:
        """Figures of the held-out scans; the weights are written if they are the best so far."""
        import torch

        from napari_recon.learning.networks import save_weights

        found, begun, seen = [], [], _Seen()
        for example in self.validation:
            x = self._first_pass(example)
            found.append(_psnr(x, example.truth, example.inside))
            begun.append(_psnr(example.start, example.truth, example.inside))
            if seen.patch is None:
                seen = self._middle(x, example.start, example.truth, example.voxel_size)
        for split in self.held_out_splits:
            with torch.no_grad():
                x = self._of_split(split)
            found.append(split.psnr(x))
            begun.append(split.psnr(split.start))
            if seen.patch is None:
                seen = self._middle(x, split.start, None, split.left_out.grid.voxel_size)
        figures = {"psnr": float(np.mean(found)), "start_psnr": float(np.mean(begun))}
        if figures["psnr"] > self.best or self.best == -math.inf:
            self.best = figures["psnr"]
            kept = figures | {"steps": float(self.step)}
            save_weights(self.model, self.output, self._card(kept), self.config.model_dump(mode="json"), kept)
        return figures | {"best_psnr": self.best}, seen

    def _middle(self, x: Tensor, start: Tensor, truth: Tensor | None, voxel_size: float) -> _Seen:
        """A patch in the middle of volumes (1, 1, D, H, W)."""
        at: Any = tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(x.shape[2:], self._edges(), strict=True))
        patch, begun = (_magnitude(v)[at].cpu().numpy() for v in (x, start))
        return _Seen(patch, begun, None if truth is None else _magnitude(truth)[at].cpu().numpy(), voxel_size)

    def _card(self, figures: dict[str, float]) -> str:
        data = self.config.data
        source = f"volumes of {data.folder.name}" if data.folder else f"synthetic objects ({', '.join(data.kinds)})"
        noise = "without noise" if data.photons is None else f"{data.photons:g} photons a pixel"
        views = f"with {', '.join(map(str, data.views))} views" if data.views else "with all views"
        if self.mri:
            noise = f"signal to noise {data.signal_to_noise:g}"
            views = f"of {data.coils} coils, accelerations {', '.join(f'{a:g}' for a in data.accelerations)}"
        beam = "multi-coil k-space" if self.mri else "cone beam"
        what = f"{data.count} {source} of {data.size} voxels an edge, {beam} {views}, {noise}"
        if data.scans is not None:
            how = "without references, by leaving views out" if self.splitting else "with reference volumes"
            what = f"{len(self.objects)} scans of {data.scans.name} {views}, {how}"
        edge = self.patch if isinstance(self.patch, int) else " x ".join(map(str, self.patch))
        each = "whole volumes" if self.splitting else f"patches of {edge} voxels an edge"
        lines = [
            self.config.card,
            f"{self.config.method.name} with the network {self.config.network.name!r}, trained for {self.step} steps "
            f"of {self.config.optimisation.batch * self.config.optimisation.accumulation * self.world} {each}, on "
            f"{what}.",
            f"Validation{' (projections left out)' if self.splitting else ''}: {figures['psnr']:.2f} dB (its start "
            f"{figures['start_psnr']:.2f} dB).",
        ]
        return "\n".join(line for line in lines if line)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        import torch

        path = checkpoint_path(self.output)
        unfinished = path.with_name(path.name + ".partial")
        state = {
            "config": self.config.model_dump_json(),
            "world": self.world,
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "refreshed": self.refreshed,
        }
        try:
            torch.save(state, unfinished)
            unfinished.replace(path)
        except OSError as error:
            raise ScanError(f"The checkpoint {path} cannot be written ({error.strerror}): make room.") from None
        finally:
            unfinished.unlink(missing_ok=True)

    def _resume(self) -> None:
        """Go on from the checkpoint that the first process finds, which may be on another machine."""
        import torch

        wrong = ""
        found: list[dict[str, Any] | None] = [None]
        try:
            if self.rank == 0:
                found = [self._checkpointed()]
        except ScanError as error:
            wrong = str(error)
        self._all_hear(wrong)
        if self.world > 1:
            torch.distributed.broadcast_object_list(found)
        if (state := found[0]) is None:
            return
        self.step, self.best = state["step"], state["best"]
        if state["refreshed"] is not None:
            self.model.load_state_dict(state["refreshed"])
            self._refresh()
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])

    def _checkpointed(self) -> dict[str, Any] | None:
        """The state in the checkpoint, its tensors on the CPU, where there is one."""
        import torch

        path = checkpoint_path(self.output)
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            # Entries that came with a later version are then at their defaults.
            kept = TrainingConfig.model_validate_json(state["config"]).model_dump(mode="json")
        except Exception as error:  # whatever a damaged file makes torch raise
            reason = str(error).partition("\n")[0]
            raise ScanError(f"The checkpoint {path} cannot be read ({reason}): delete it to begin anew.") from None
        wanted = self.config.model_dump(mode="json")
        differing = [name for name in wanted if name != "device" and kept.get(name) != wanted[name]]
        if differing or state["world"] != self.world:
            what = ", ".join(differing) or "number of processes"
            raise ScanError(
                f"The checkpoint {path} belongs to another configuration (its {what} differs): delete it, give another "
                "output, or use the configuration that it was begun with."
            )
        return state

    def _seconds(self) -> float:
        return time.perf_counter() - self.started


@dataclass(frozen=True)
class _Seen:
    """What is to be seen of a validation."""

    patch: NDArray[np.float32] | None = None
    start: NDArray[np.float32] | None = None
    truth: NDArray[np.float32] | None = None
    voxel_size: float = 1.0


def _begin_with(model: Method, weights: str) -> None:
    """Give a method the weights of a trained one.

    Raises
    ------
    ScanError
        If they are of another network or method.
    """
    import torch

    from napari_recon.learning.networks import load_weights
    from napari_recon.learning.weights import find_weights

    file = find_weights(weights)
    kept = load_weights(file).model.state_dict()
    own = model.state_dict()
    for name, tensor in kept.items():  # from a network without memory: its first convolution is to see one volume more
        if name in own and name.endswith("head.weight") and tensor.shape[1] < own[name].shape[1]:
            room = torch.zeros_like(own[name])
            room[:, : tensor.shape[1]] = tensor
            kept[name] = room
    try:
        model.load_state_dict(kept)
    except RuntimeError:
        raise ScanError(
            f"Training cannot begin with the weights {weights}, which are of another network or method: give [network] "
            "and [method] as they were trained with, or leave network.weights out."
        ) from None


class _Mirror:
    """Shows a network its volumes mirrored in ``axes``, and turns back what it says."""

    def __init__(self) -> None:
        self.axes: list[int] = []

    def before(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (inputs[0].flip(self.axes), *inputs[1:]) if self.axes else None

    def after(self, network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return output.flip(self.axes) if self.axes else None


@dataclass
class _Patch:
    """A patch to train on, (1, 1, p, p, p), and what its gradient is made of."""

    truth: Tensor
    start: Tensor
    scale: float
    error: float
    at_context: Tensor | float = 0.0
    context: Tensor | float = 0.0
    normal: Callable[[Tensor], Tensor] | None = None

    def gradient(self, x: Tensor) -> Tensor:
        """S g + S AᵀA Sᵀ (x − S x_c)."""
        assert self.normal is not None
        return self.at_context + self.normal(x - self.context)


def _norm(physics: LinearPhysics) -> float:
    from napari_recon.reconstruction.start import operator_sqnorm

    return operator_sqnorm(physics)


def _seen(xray: XRayTransform) -> NDArray[np.bool_]:
    """The columns of voxels that a scan sees, (H, W)."""
    grid, radius = xray.grid, xray.geometry.field_of_view_radius
    _, y0, x0 = grid.translate
    y, x = (start + grid.voxel_size * np.arange(n) for start, n in zip((y0, x0), grid.shape[1:], strict=True))
    inside: NDArray[np.bool_] = np.hypot(y[:, None], x[None]) <= radius
    return inside if inside.any() else np.ones_like(inside)


def _expect_for_mri(config: TrainingConfig) -> None:
    """Refuse what only X-rays have."""
    method, data = config.method, config.data
    if data.scans is not None or data.folder is not None:
        raise ScanError("data.modality = 'mri' trains on simulated k-space only: leave data.scans and data.folder out.")
    if method.start in ("fdk", "least-squares"):
        raise ScanError(f"method.start = {method.start!r} is of X-rays: use 'zero-filled', 'sense' or 'tv' for 'mri'.")
    if method.name == "unrolled" and method.step != "gradient":
        raise ScanError("method.step = 'ramp' is of X-rays: use 'gradient' for 'mri'.")


def _magnitude(x: Tensor) -> Tensor:
    """(D, H, W) of (1, 1, D, H, W), or the magnitude of the two parts of complex values."""
    return x[0, 0] if x.shape[1] == 1 else x[0].square().sum(0).sqrt()


def _psnr(x: Tensor, truth: Tensor, inside: NDArray[np.bool_]) -> float:
    """In dB, of values above zero, where the last two axes are ``inside``; its range is the truth's."""
    import torch

    x, truth = _magnitude(x), _magnitude(truth)
    error = (x.clamp(min=0) - truth)[..., torch.from_numpy(inside).to(x.device)].square().mean()
    return 10 * math.log10(float(truth.max()) ** 2 / max(float(error), 1e-30))
