"""What a job will need of memory, told from shapes before a single frame is read; and what it took."""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_recon.jobs.job import (
    DataConsistencyJob,
    Job,
    OperatorJob,
    PADMMParameters,
    PatchJob,
    ReconstructionJob,
    RegularizationJob,
    ResolutionJob,
    ScanJob,
    SweepJob,
    TrainJob,
    TVParameters,
    UnrolledParameters,
)
from napari_recon.learning.weights import find_weights, read_header
from napari_recon.scans.kspace import KSpaceScan
from napari_recon.scans.scan import ScanOptions

if TYPE_CHECKING:
    from napari_recon.learning.training import TrainingConfig
    from napari_recon.scans import Geometry, Grid, Scan

_FLOAT = 4
_BATCH = 64 * 2**20
"""How much of the projections is read, and filtered, at a time."""
_CUDA_LIBRARIES = 2 * 2**30
_SAMPLES = 2**20
"""Voxels at most that something is told from at a time: a quantile, a picture."""
_ESPIRIT = 200 * 2**20
"""What estimating coil maps takes on its coarse grid, for eight coils."""
_CONVOLUTIONS = 64 * 2**20
"""Compiled convolutions and their scratch, whatever the patch."""
_QUICK_FIT = 15
"""What a job's own fit of H takes, in padded volumes: one kernel and four probes."""
_ITERATES = 2**30
"""What the kept iterates of a run may take."""
_FEWER = "train on fewer or smaller volumes, or with a smaller patch, batch or network"
_FULL = 0.9
"""How much of the free memory a job may plan to take."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a job will need.

    Attributes
    ----------
    host_bytes
        Of the machine's memory, beyond what is in use now.
    device_bytes
        Of the GPU's memory; 0 when the CPU computes.
    available_bytes
        What is free of the memory that is tighter.
    fits
        Whether the job may start.
    items
        Bytes by what they are for; those on the GPU begin with "GPU: ".
    sentence
        The plan for a person: what is needed and free and, where it does not fit, what to change.
    """

    host_bytes: int
    device_bytes: int
    available_bytes: int
    fits: bool
    items: dict[str, int] = field(default_factory=dict)
    sentence: str = ""


def plan_memory(job: Job, scan: Scan | KSpaceScan | None = None, held: bool = False) -> MemoryPlan:
    """Plan a job's memory from shapes; nothing is read and nothing allocated.

    Parameters
    ----------
    job
        The job.
    scan
        The job's scan where it is open already; otherwise it is opened, which reads headers only.
    held
        Whether the slices of a reconstruction are one slab of many, see :mod:`napari_recon.jobs.slabs`.

    Raises
    ------
    ScanError
        If the scan cannot be opened or the grid is impossible.
    """
    on_gpu = _gpu_free(job.device) is not None
    if isinstance(job, TrainJob):
        if job.training.data.scans is not None:  # to open them all for every change of a form takes too long
            free = available_memory()
            sentence = f"What scans of one's own need shows when they are read; {readable(free)} are free."
            return MemoryPlan(0, 0, free, True, {}, sentence)
        return _plan(job, _training_items(job.training, on_gpu), on_gpu, "This training", lambda *_: _FEWER)
    if scan is None:
        scan = job.open_scan()
    grid = scan.default_grid(job.shape, job.voxel_size)
    if isinstance(scan, KSpaceScan):
        items = _mri_items(job, scan, on_gpu)
        what = f"A volume of {' x '.join(map(str, grid.shape))} voxels from k-space of {scan.coils} coils"
        return _plan(job, items, on_gpu, what, lambda *_: "compress to fewer coils")
    other: dict[str, int] = {}
    asked = job
    if isinstance(job, ReconstructionJob) and isinstance(job.slab, int):  # one after the other: the one in the middle
        first = max(0, (grid.shape[0] - job.slab) // 2)
        some = first, min(first + job.slab, grid.shape[0])
        job, held = job.model_copy(update={"slices": some, "slab": None}), True
    if isinstance(job, ResolutionJob):  # one half after the other, the first one's result being kept
        job, scan = job.half("even", grid), scan.with_options(half="even")
        other = {"other half": grid.voxels * _FLOAT}
    elif isinstance(job, SweepJob):  # one value after the other, all results being kept
        grid = job.coarse_grid(scan)
        first, stop = job.coarse_slices(grid) or (0, grid.shape[0])
        shown = grid.voxels * (stop - first) // grid.shape[0]
        other = {"other results": (len(job.values) - 1) * shown * _FLOAT}
        job = job.part(max(job.values), grid)  # views and patches take the more the larger
        assert isinstance(job.options, ScanOptions)
        scan = scan.with_options(views=job.options.views, binning=job.options.binning)
    geometry = scan.geometry
    if isinstance(job, ReconstructionJob) and (slab := job.part_of(geometry, grid, held)) is not None:
        other |= {"slices": 2 * slab.core_grid(grid).voxels * _FLOAT}  # shown of what is reconstructed
        geometry, grid = geometry.with_rows(slab.rows), slab.grid(grid)
    items = _items(job, geometry, grid, on_gpu) | other
    padmm = isinstance(job, ReconstructionJob) and job.parameters.method == "padmm"
    if padmm and not on_gpu and short_of(sum(items.values())):
        items = _items(job, geometry, grid, on_gpu, padmm_files=True) | other
    what = f"A volume of {' x '.join(map(str, grid.shape))} voxels from {geometry.views} projections"
    plan = _plan(job, items, on_gpu, what, lambda needed, free: _remedy(job, geometry, grid, items, needed, free))
    if plan.fits or not isinstance(asked, ReconstructionJob) or asked.slab != "auto" or asked.slices is not None:
        return plan
    if not asked.into_zarr:
        return replace(plan, sentence=f"{plan.sentence[:-1]}; or write an .ome.zarr, which is done in slabs.")
    short = plan.device_bytes if plan.host_bytes <= _FULL * available_memory() else plan.host_bytes
    where = "memory" if short == plan.host_bytes else "GPU memory"
    sentence = (
        f"The whole volume takes about {readable(short)} of {where} and {readable(plan.available_bytes)} are free, so "
        "it is reconstructed in slabs, one after the other."
    )
    return replace(plan, fits=True, sentence=sentence)


def _plan(job: Job, items: dict[str, int], on_gpu: bool, what: str, remedy: Callable[[int, int], str]) -> MemoryPlan:
    """The plan of a job that needs ``items``; ``remedy`` says what to do where too little of what it needs is free."""
    host = sum(n for name, n in items.items() if not name.startswith("GPU: "))
    device = sum(n for name, n in items.items() if name.startswith("GPU: "))
    free_host, free_device = available_memory(), _gpu_free(job.device) or 0
    fits_host, fits_device = host <= _FULL * free_host, device <= _FULL * free_device
    tight = fits_host and on_gpu
    needed, free, where = (device, free_device, "GPU memory") if tight else (host, free_host, "memory")
    if fits_host and (fits_device or not on_gpu):
        sentence = f"Needs about {readable(needed)} of {readable(free)} free {where}."
    else:
        sentence = (
            f"{what} needs about {readable(needed)} of {where} and {readable(free)} are free: {remedy(needed, free)}."
        )
    return MemoryPlan(host, device, free, fits_host and (fits_device or not on_gpu), items, sentence)


def _items(job: ScanJob, geometry: Geometry, grid: Grid, on_gpu: bool, padmm_files: bool = False) -> dict[str, int]:
    """Bytes by purpose: what stays while the job runs, and the one step that takes most beyond that.

    How many volumes and sets of projections a step takes was counted by running it (see the tests).
    ``padmm_files``: whether PADMM keeps its split variables in files.
    """
    rows, columns = geometry.detector_shape
    projections = geometry.views * rows * columns * _FLOAT
    volume = grid.voxels * _FLOAT
    if isinstance(job, ReconstructionJob):
        shown, kept, steps = _reconstruction_needs(job, grid, volume, projections, padmm_files)
    elif isinstance(job, RegularizationJob):
        shown, kept, steps = 0, {}, {"iteration": padmm_bytes(grid, projections)}
    elif isinstance(job, DataConsistencyJob):
        shown, kept, steps = 3 * projections, {}, {"projecting": volume + projections // 4}
    elif isinstance(job, OperatorJob | PatchJob):
        shown, kept, steps = _operator_needs(job, grid, volume, projections)
    else:  # coil maps, which projections have none of
        shown, kept, steps = 0, {}, {}
    stay = {"projections": projections, "scratch": min(grid.voxels, _SAMPLES) * _FLOAT, **kept}
    if on_gpu or not isinstance(job, ReconstructionJob):  # else it is the FDK that is shown
        stay["start"] = volume
    steps["filtering and back projection"] = 2 * min(projections, _BATCH)
    reading = 3 * min(projections, _BATCH)
    if not on_gpu:  # before there is any volume
        steps["reading"] = max(0, reading - volume - shown)
    fullest = max(steps, key=lambda name: steps[name])
    at_work = {**stay, fullest: steps[fullest]}
    if not on_gpu:
        return {"shown volumes": shown, **at_work}
    return {
        "libraries": _CUDA_LIBRARIES,
        "shown volumes": shown,
        "reading": reading + projections + volume,
        **{f"GPU: {name}": n for name, n in at_work.items()},
    }


def _mri_items(job: ScanJob, scan: KSpaceScan, on_gpu: bool) -> dict[str, int]:
    """Bytes by purpose of k-space: all coils' samples and maps stay; a coil at a time is transformed."""
    coils, grid = scan.coils, scan.grid
    volume = 2 * grid.voxels * _FLOAT  # complex
    samples, steps = coils * volume, {"transform": 5 * volume}
    if scan.recording.read_coil_maps is None:
        steps["estimating coil maps"] = _ESPIRIT + 3 * samples
    network = 0
    if isinstance(job, ReconstructionJob):
        if job.parameters.method == "sense":
            steps["iteration"] = 8 * volume
        elif isinstance(job.parameters, PADMMParameters):
            steps["iteration"] = round(1.7 * padmm_bytes(grid, 0)) * 2 + samples
            if (weights := job.parameters.start_weights("mri")) is not None:
                header = read_header(find_weights(weights))
                network = _CONVOLUTIONS + 2 * header.path.stat().st_size
                steps["start"] = 8 * volume + samples + network_bytes(header.model) * min(64**3, grid.voxels)
        elif isinstance(job.parameters, UnrolledParameters):
            header = read_header(find_weights(job.parameters.weights))
            network = _CONVOLUTIONS + 2 * header.path.stat().st_size
            edge = job.parameters.patch or max(grid.shape)
            patch = math.prod(min(edge, n) for n in grid.shape)
            steps["patches"] = 8 * volume + samples + network_bytes(header.model, _in_bfloat16(job)) * patch
            if header.model.get("init") == "tv":  # k-space of its iterates, and both parts' duals
                steps["total variation"] = 5 * samples + 25 * volume
    elif isinstance(job, OperatorJob | PatchJob):
        steps[_FITTING] = 2 * _fit_bytes(grid, terms=1, probes=8) + samples
    elif isinstance(job, RegularizationJob):
        steps["taking a part"] = 3 * samples
    else:  # magnitudes and the like, of every coil
        steps["shown volumes"] = 3 * samples // 2 + 5 * volume
    fullest = max(steps, key=lambda name: steps[name])
    # As measured, as k-space of the physics, the coil maps, and what is left over where residuals are formed.
    stay = {"samples": 3 * samples, "coil maps": samples, "volumes": 4 * volume, fullest: steps[fullest]}
    if network:
        stay["network"] = network
    if not on_gpu:
        return stay
    return {"libraries": _CUDA_LIBRARIES, "reading": 2 * samples, **{f"GPU: {n}": b for n, b in stay.items()}}


def _training_items(training: TrainingConfig, on_gpu: bool) -> dict[str, int]:
    """Bytes by purpose of a training: its scans, which stay, and a patch's way through the network and back.

    The features that a voxel leaves for the way back were counted with torch's saved tensors.
    """
    data, optimisation = training.data, training.optimisation
    volume = data.size**3 * _FLOAT
    scans = (data.count + training.validation.count) * len(data.samplings)
    unrolled = training.method.name == "unrolled"
    a_scan = 6 if unrolled else 2
    if data.modality == "mri":  # each with coil maps and a mask of its own
        a_scan = 2 * (a_scan + data.coils) + 1
    options = training.network.options
    width, blocks = int(options.get("width", 24)), int(options.get("blocks", 1))
    features = {"light": width * (3 + 8 * blocks), "unet": 760, "drunet": 1525}[training.network.name]
    applied = training.method.iterations if unrolled else 1
    patch = min(optimisation.patch, data.size) ** 3 * _FLOAT
    kept = {
        "scans": scans * volume * a_scan,
        "patches": round(1.3 * features * applied * optimisation.batch * patch),
    }
    simulating = 8 * 3 * volume  # twice as fine, with its projections
    if not on_gpu:
        return {"simulating": simulating, **kept}
    return {"libraries": _CUDA_LIBRARIES, "simulating": simulating, **{f"GPU: {n}": b for n, b in kept.items()}}


Needs = tuple[int, dict[str, int], dict[str, int]]
"""Bytes of the volumes that are shown, of what stays, and of the steps."""


def _reconstruction_needs(
    job: ReconstructionJob, grid: Grid, volume: int, projections: int, padmm_files: bool = False
) -> Needs:
    parameters = job.parameters
    stay: dict[str, int] = {}
    steps = {"measuring": round(volume + 0.8 * projections)}
    if parameters.method == "sirt":
        steps["iteration"] = 4 * volume + 3 * projections + min(projections, _BATCH // 4)
    elif parameters.method == "tv" and parameters.patch is None:
        steps["iteration"] = _tv_bytes(volume, projections)
    elif parameters.method == "tv" and parameters.patch is not None:
        patch = math.prod(min(parameters.patch, n) for n in grid.shape) * _FLOAT
        steps["global steps"] = round(6.5 * volume) + 2 * projections
        steps["patches"] = 4 * volume + projections + 30 * patch
        if parameters.operator != "exact":
            stay["normal operator"] = _padded(grid) // 2 + volume
            steps["patches"] += 5 * 8 * patch  # spectra of twice the patch
            if parameters.operator == "fit":
                steps[_FITTING] = _QUICK_FIT * _padded(grid) + 2 * projections - stay["normal operator"]
    elif isinstance(parameters, PADMMParameters):
        spectra = parameters.preconditioner in ("circulant", "operator")
        iteration = padmm_bytes(grid, projections, spectra, padmm_files)
        steps["iteration"] = iteration + (projections if parameters.weighted else 0)
        if parameters.preconditioner == "operator":
            stay["normal operator"] = _padded(grid) // 2 + volume
            steps[_FITTING] = _QUICK_FIT * _padded(grid) + 2 * projections - stay["normal operator"]
        if parameters.start not in ("fdk", "zeros"):
            stay["another start"] = volume
        if (weights := parameters.start_weights()) is not None:
            header = read_header(find_weights(weights))
            network = _CONVOLUTIONS // 2 + network_bytes(header.model) * min(64**3, grid.voxels)  # applied once
            steps["start"] = max(_tv_bytes(volume, projections), 3 * volume + network)
    elif isinstance(parameters, UnrolledParameters):
        header = read_header(find_weights(parameters.weights))
        edge = parameters.patch or max(grid.shape)
        patch = math.prod(min(edge, n) for n in grid.shape)
        stay["network"] = 2 * header.path.stat().st_size
        short = _in_bfloat16(job)
        convolutions = _CONVOLUTIONS // 2 if short else _CONVOLUTIONS  # which are there from the first patch on
        steps["patches"] = 3 * volume + network_bytes(header.model, short) * patch + convolutions
        if header.model.get("init") in ("tv", "least-squares"):
            steps["total variation"] = _tv_bytes(volume, projections)
        if header.model["method"] == "unrolled":
            steps["data step"] = 6 * volume + _batch_bytes(volume, projections) + convolutions
            if parameters.passes > 1:
                steps["patches"] += volume
            if parameters.passes > 1 and parameters.operator != "exact":
                stay["normal operator"] = _padded(grid) // 2 + volume
                steps["patches"] += 5 * 8 * patch * _FLOAT
                if parameters.operator == "fit":
                    fitting = _QUICK_FIT * _padded(grid) + _batch_bytes(volume, projections)
                    steps[_FITTING] = fitting - stay["normal operator"]  # which comes of it
    shown = 1 if parameters.method == "fdk" else 2
    if isinstance(parameters, PADMMParameters):
        shown += parameters.start_is_computed
        if parameters.keep_iterates:
            shown += kept_iterates(parameters.iterations, grid.voxels)
    return volume * shown, stay, steps


def _batch_bytes(volume: int, projections: int) -> int:
    """What a gradient takes of projections, a batch of views at a time: the batch, what was measured, and ray sums."""
    batch = min(projections, max(_BATCH, volume // 2))
    return 2 * batch + min(projections, _BATCH // 4)


def _tv_bytes(volume: int, projections: int) -> int:
    """Of total variation over the whole volume: in its proximal operator, or where the gradient is taken."""
    return max(10 * volume, 8 * volume + _batch_bytes(volume, projections))


def kept_iterates(iterations: int, voxels: int) -> int:
    """How many volumes of ``voxels`` are kept of a run of PADMM and its start: two at least, all at most."""
    return max(2, min(iterations + 1, _ITERATES // (voxels * _FLOAT)))


def network_bytes(model: dict[str, Any], in_bfloat16: bool = False) -> int:
    """What a voxel of a volume takes while a network works on it; see the tests.

    Parameters
    ----------
    model
        Of a :class:`~napari_recon.learning.weights.WeightsHeader`.
    in_bfloat16
        Whether its features have half the bytes; what it is shown and says has not.
    """
    network = model.get("network", {})
    name, options = network.get("name", "light"), network.get("options", {})
    if name == "light":
        sets = 4 if in_bfloat16 else 4.5  # the coarser grids' beside the finest one's
        features, others = round(sets * _FLOAT * int(options.get("width", 24))), 0
    else:
        features = 8 * _FLOAT * int((options.get("channels_per_scale") or options.get("nc") or [64])[0])
        others = 200
    return others + (features // 2 + 5 * _FLOAT if in_bfloat16 else features)


def _in_bfloat16(job: ReconstructionJob) -> bool:
    """Whether a network will compute in bfloat16, as far as can be told without torch: of GPUs it cannot."""
    assert isinstance(job.parameters, UnrolledParameters)
    if job.parameters.precision != "auto" or _gpu_free(job.device) is not None:
        return job.parameters.precision == "bfloat16"
    with contextlib.suppress(OSError):
        return re.search(r"\b(avx512_bf16|amx_bf16)\b", Path("/proc/cpuinfo").read_text()) is not None
    return False


def _operator_needs(job: OperatorJob | PatchJob, grid: Grid, volume: int, projections: int) -> Needs:
    steps: dict[str, int] = {}
    operator = _padded(grid) // 2 + volume
    if job.operator != "fit":
        with contextlib.suppress(OSError):
            operator = Path(job.operator).stat().st_size
    elif isinstance(job, OperatorJob):
        operator = job.parameters.terms * _padded(grid) // 2 + volume
        steps[_FITTING] = _fit_bytes(grid, job.parameters.terms, job.parameters.probes) + 2 * projections
    if isinstance(job, OperatorJob):
        steps["applying H"] = 12 * volume + round(4.5 * operator)
        # x, m, a λ a kernel, AᵀA x, H x and their squared difference.
        return (5 + job.parameters.terms) * volume, {"normal operator": operator}, steps
    patch = math.prod(min(job.patch, n) for n in grid.shape) * _FLOAT
    steps["gradient"] = 5 * volume + 2 * projections
    steps["patch"] = 100 * patch + operator * job.patch // max(grid.shape)  # its filter is cropped axis by axis
    return 3 * (job.steps + 1) * patch, {"normal operator": operator, "gradient": volume}, steps


_FITTING = "fitting the normal operator"


def _padded(grid: Grid) -> int:
    return math.prod(2 * n for n in grid.shape) * _FLOAT


def padmm_bytes(grid: Grid, projections: int, spectra: bool = True, files: bool = False) -> int:
    """What an iteration of PADMM takes: volumes and spectra, split variables unless in files, and what is in between.

    Parameters
    ----------
    grid
        Of the volume.
    projections
        Bytes of the measurements.
    spectra
        Whether the preconditioner is one: its run keeps a copy of the split variables.
    files
        Whether the split variables are in files.
    """
    volumes = (10 if spectra else 16) if files else (17 if spectra else 21)
    return (volumes * grid.voxels + 24 * min(grid.voxels, 2**18)) * _FLOAT + 4 * projections


def short_of(needed: int) -> bool:
    """Whether a step that takes so many bytes of host memory more is better done another way."""
    return needed > _FULL * available_memory()


def _fit_bytes(grid: Grid, terms: int, probes: int) -> int:
    """What a fit takes: spectra and kernels of the padded volume by kernel, and volumes by probe."""
    return round((8.1 + 13.8 * terms + 0.82 * probes) * _padded(grid))


def _remedy(job: Job, geometry: Geometry, grid: Grid, items: dict[str, int], needed: int, free: int) -> str:
    """What to change so that it fits, as the end of a sentence."""
    rows, columns = geometry.detector_shape
    projections = geometry.views * rows * columns * _FLOAT
    advice = []
    fixed = 8 * projections
    if fixed < _FULL * free and needed > fixed:
        factor = ((needed - fixed) / (_FULL * free - fixed)) ** (1 / 3)
        advice.append(f"choose a voxel size of at least {_up(grid.voxel_size * factor):g} mm (or a smaller shape)")
    else:
        advice.append("choose a larger voxel size (or a smaller shape)")
    if projections > 0.1 * needed or fixed >= _FULL * free:
        advice.append("more binning or fewer views")
    fitting = _FITTING in max(items, key=lambda name: items[name])
    if isinstance(job, OperatorJob):
        if fitting and job.parameters.terms > 1:
            advice.append("one kernel")
        if fitting and job.parameters.probes > 8:
            advice.append("fewer probes")
    elif isinstance(job, ReconstructionJob) and isinstance(
        parameters := job.parameters, TVParameters | UnrolledParameters
    ):
        if parameters.patch is None:
            advice.append(f"a patch of {type(parameters).model_fields['patch'].default}")
        elif fitting:
            advice.append("the exact data step")
        elif isinstance(parameters, UnrolledParameters):
            if "patches" in max(items, key=lambda name: items[name]) and parameters.patch > 16:
                advice.append("a smaller patch")
        elif 94 * math.prod(min(parameters.patch, n) for n in grid.shape) * _FLOAT > 0.1 * needed:
            advice.append("a smaller patch")
    if any(name.startswith("GPU: ") for name in items):
        advice.append("the device 'cpu'")
    return advice[0] if len(advice) == 1 else ", ".join(advice[:-1]) + ", or " + advice[-1]


def _up(value: float) -> float:
    """The value rounded up to two digits."""
    scale = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / scale) * scale, 12)


def readable(size: float) -> str:
    """Bytes for a person: 1.3 GB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


# -- what the machine has ------------------------------------------------------------------------------------------


def available_memory() -> int:
    """Free host memory in bytes: the system's, or this container's or queue's job's where that is less."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_cgroups_free()])


def _cgroups_free(root: Path = Path("/sys/fs/cgroup"), said: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that are left of each limit on this process's control group and those that it lies in.

    Files that are kept in memory count towards a limit (``cgroups(7)``), but make room when it is needed.
    """
    groups = []
    with contextlib.suppress(OSError):
        for line in said.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                groups.append((root, root / path.strip("/"), "memory.max", "memory.current", "{}_file"))
            elif "memory" in controllers.split(","):
                top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_{}_file")
                groups.append((top, top / path.strip("/"), *names))
    free = []
    for top, folder, limit, used, cached in groups:
        for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            with contextlib.suppress(OSError, ValueError):  # not seen from inside a container, or no limit ("max")
                left = int((group / limit).read_text()) - int((group / used).read_text())
                with contextlib.suppress(OSError):
                    told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    left += sum(int(told.get(cached.format(kind), 0)) for kind in ("active", "inactive"))
                free.append(max(0, left))
    return free


def _gpu_free(device: str) -> int | None:
    """Free memory in bytes of the GPU that ``device`` stands for, or None where the CPU computes.

    Where torch is not loaded the driver's own ``nvidia-smi`` is asked: the docks want a plan, and loading torch into a
    viewer after its OpenGL brings the viewer down (two LLVMs in one process).
    """
    if device == "cpu":
        return None
    if "torch" in sys.modules:
        import torch

        if not torch.cuda.is_available():
            return None
        return int(torch.cuda.mem_get_info(None if device == "auto" else torch.device(device))[0])
    index = device.partition(":")[2] or "0"
    query = ["nvidia-smi", f"--id={index}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        return int(answer.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


# -- what this process took ----------------------------------------------------------------------------------------


def reset_peak() -> None:
    """Count the peak from now on, where the system allows it (Linux); a warm process runs many jobs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, since :func:`reset_peak` where that worked."""
    try:
        # Not getrusage, which on Linux still counts what the parent had when it forked.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def release_memory() -> None:
    """Give back what the last job freed: glibc and torch keep it otherwise."""
    import gc

    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def drop_frames(error: BaseException) -> None:
    """The frames of a traceback keep alive the very arrays that there was no room for."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__  # type: ignore[assignment]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or on a GPU."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )
