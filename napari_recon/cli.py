"""The command line: ``napari-recon`` and ``python -m napari_recon``.

Heavy imports stand inside the commands, so that ``--help`` is quick. Results go to standard output (with ``--json`` as
exactly one JSON object), everything else to standard error. Exit status 2 means bad input, 1 that something failed,
130 that it was interrupted. Of several processes under torchrun the first one speaks, the others of their errors only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    from napari_recon.jobs import Job, OperatorJob, ReconstructionJob, SweepJob
    from napari_recon.jobs.messages import Finished
    from napari_recon.scans import KSpaceScan, Scan

SomeJob = TypeVar("SomeJob", "ReconstructionJob", "OperatorJob", "SweepJob")

app = typer.Typer(
    name="napari-recon",
    help="3D reconstruction from X-ray projections and multi-coil MRI, classical or learned, seen in napari or not.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

ScanPath = Annotated[Path, typer.Argument(metavar="SCAN", help="A scan: folder, .toml, .h5, .nxs, .mat, .cfl or .npy.")]
VolumeOutput = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        metavar="VOLUME",
        help="A .tif, .ome.zarr, .nii, .nii.gz, .mrc or .dcm (a folder) to write.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Views = Annotated[int | None, typer.Option(metavar="N", help="Evenly spaced views to keep.")]
Binning = Annotated[int, typer.Option(metavar="N", help="N x N detector pixels become one.")]
AxisOffset = Annotated[
    float | None,
    typer.Option(metavar="PX", help="Rotation axis, in unbinned pixels to the right of the detector's centre."),
]
Air = Annotated[
    bool | None,
    typer.Option("--air-normalisation/--no-air-normalisation", help="Bring the air beside the object to zero."),
]
Shape = Annotated[tuple[int, int, int] | None, typer.Option(metavar="D H W", help="Voxels along z, y, x.")]
VoxelSize = Annotated[float | None, typer.Option(metavar="MM", help="Edge of a voxel in mm.")]
Iterations = Annotated[
    int | None,
    typer.Option(metavar="N", help="Iterations, of sirt, sense, tv, padmm or unrolled (by default as trained)."),
]
Regularization = Annotated[
    float | None,
    typer.Option(metavar="R", help="Weight of the TV: 0.0003 keeps detail, 0.003 is smooth; of sense, of |x|^2."),
]
Rho = Annotated[float | None, typer.Option(metavar="R", help="Penalty of padmm: a matter of speed only.")]
Preconditioner = Annotated[
    Literal["scalar", "diagonal", "circulant", "operator"] | None,
    typer.Option(help="What stands for AtA in padmm's steps; operator fits H first."),
]
Start = Annotated[
    str | None,
    typer.Option(
        metavar="network|fdk|tv|zeros|FILE", help="Where padmm begins; a file is a volume, or weights of a network."
    ),
]
Patch = Annotated[int | None, typer.Option(metavar="P", help="Edge of a patch in voxels; 0: the whole volume at once.")]
Weights = Annotated[
    str | None,
    typer.Option(metavar="WEIGHTS", help="Of unrolled: the name of weights that ship, or a file from train."),
]
Operator = Annotated[
    str | None,
    typer.Option(
        metavar="fit|exact|FILE",
        help="The data step on patches: by a normal operator that is fitted, or from fit-operator; or projected.",
    ),
]
Passes = Annotated[
    int | None, typer.Option(metavar="N", help="Sweeps over the patches; of unrolled, 1 or 2 (2 with --operator).")
]
Bits = Annotated[
    Literal["16", "32"] | None,
    typer.Option(help="Of the volume's numbers: 32 (floats) unless 16 are asked for, with a scale; DICOM has 16."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Of whatever is random.")]


@app.command()
def demo(
    screenshot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Run to the end, save a picture of the window, and leave.")
    ] = None,
    compared: Annotated[bool, typer.Option("--compare", help="Then compare both with the truth.")] = False,
    as_json: AsJson = False,
) -> None:
    """A scan with few views in napari: FDK at once, then the learned reconstruction live, patch by patch."""
    with _told(as_json) as say:
        start = time.perf_counter()
        from napari_recon.scans.errors import ScanError

        if screenshot is not None and not screenshot.absolute().parent.is_dir():
            raise ScanError(f"The folder of {screenshot} does not exist: create it, or choose another.")
        try:
            from napari_recon.widgets.demo import run_demo
        except ImportError as error:
            raise ScanError(
                f"napari cannot open a window here ({error}): install it with pip install 'napari[pyqt6]'."
            ) from error
        status = run_demo(screenshot, compared)
        say({"screenshot": None if screenshot is None else str(screenshot), "seconds": time.perf_counter() - start})
        if status:
            raise typer.Exit(status)


@app.command()
def info(
    scan: ScanPath,
    views: Views = None,
    binning: Binning = 1,
    axis_offset: AxisOffset = None,
    air_normalisation: Air = None,
    as_json: AsJson = False,
) -> None:
    """What a scan is, and what looks wrong with it."""
    with _told(as_json) as say:
        opened = _open(scan, views, binning, axis_offset, air_normalisation)
        summary, warnings = opened.summary(), opened.checks()
        if as_json:
            found: dict[str, Any] = {
                "scan": str(scan),
                "name": opened.name,
                "kind": opened.kind,
                "summary": summary,
                "warnings": warnings,
                "notes": opened.notes,
            }
            if opened.kind == "mri":
                found |= {
                    "coils": opened.coils,
                    "matrix": opened.grid.shape,
                    "acceleration": opened.acceleration,
                    "calibration": opened.calibration,
                    "voxel_size": opened.voxel_size,
                }
            say(found)
            return
        print(opened.name)
        width = max(map(len, summary))
        for name, value in summary.items():
            print(f"  {name:<{width}}  {value}")
        for name, value in opened.notes.items():
            print(f"  note: {name}: {value}")
        for sentence in warnings:
            print(f"  warning: {sentence}")


@app.command()
def reconstruct(
    scan: ScanPath,
    output: VolumeOutput,
    method: Annotated[
        Literal["fdk", "sirt", "tv", "padmm", "unrolled", "zero-filled", "sense"] | None,
        typer.Option(
            help="tv and unrolled (a trained network) work patch by patch, see --patch; padmm is TV from any --start. "
            "K-space: zero-filled, sense, padmm, unrolled. By default tv, of k-space padmm."
        ),
    ] = None,
    views: Views = None,
    binning: Binning = 1,
    axis_offset: AxisOffset = None,
    air_normalisation: Air = None,
    coils: Annotated[int | None, typer.Option(metavar="N", help="Of k-space: virtual coils to compress to.")] = None,
    acceleration: Annotated[
        float | None, typer.Option(metavar="R", help="Of k-space: leave samples out, one of R is kept.")
    ] = None,
    pattern: Annotated[
        Literal["poisson", "gaussian"] | None, typer.Option(help="Which samples --acceleration keeps.")
    ] = None,
    pattern_seed: Annotated[int | None, typer.Option(metavar="N", help="Of that pattern.")] = None,
    calibration: Annotated[
        int | None, typer.Option(metavar="N", help="Edge of the centre of k-space that --acceleration keeps.")
    ] = None,
    slice_: Annotated[
        int | None, typer.Option("--slice", metavar="N", help="Of k-space: one of a stack of slices, from 0.")
    ] = None,
    prewhiten: Annotated[
        bool | None, typer.Option("--prewhiten/--no-prewhiten", help="Of k-space: by its noise scan, where it has one.")
    ] = None,
    half: Annotated[
        Literal["even", "odd"] | None, typer.Option(help="Every second view only, for compare --halves.")
    ] = None,
    shape: Shape = None,
    voxel_size: VoxelSize = None,
    slices: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="A B", help="Only slices A up to (not with) B, from all rays that see them."),
    ] = None,
    slab: Annotated[
        str,
        typer.Option(
            metavar="auto|none|N",
            help="Slices at a time, into an .ome.zarr that can be read meanwhile; stopped, it goes on when called "
            "again. By default where memory has no room for the whole.",
        ),
    ] = "auto",
    iterations: Iterations = None,
    regularization: Regularization = None,
    rho: Rho = None,
    preconditioner: Preconditioner = None,
    start: Start = None,
    weighted: Annotated[
        bool, typer.Option("--weighted", help="padmm weighs pixels by the photons that reached them, exp(-y).")
    ] = False,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="padmm doubles or halves rho where its residuals differ tenfold.")
    ] = False,
    tolerance: Annotated[
        float | None, typer.Option(metavar="E", help="padmm ends sooner where both residuals are below this.")
    ] = None,
    nonnegative: Annotated[
        bool | None, typer.Option("--nonnegative/--no-nonnegative", help="sirt sets attenuation below zero to zero.")
    ] = None,
    patch: Patch = None,
    weights: Weights = None,
    exact: Annotated[bool, typer.Option("--exact", help="The same as --operator exact.")] = False,
    operator: Operator = None,
    passes: Passes = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"] | None,
        typer.Option(help="Of an unrolled method's network; by default bfloat16 where the machine computes with it."),
    ] = None,
    window: Annotated[
        Literal["ram-lak", "shepp-logan", "cosine", "hann"] | None, typer.Option(help="Ramp window, of fdk.")
    ] = None,
    bits: Bits = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Reconstruct a scan into a volume.

    On several GPUs: torchrun --nproc-per-node N -m napari_recon reconstruct SCAN -o VOLUME.ome.zarr --slab N.
    """
    with _told(as_json) as say:
        from napari_recon.jobs.job import ReconstructionJob
        from napari_recon.jobs.volumes import check_output
        from napari_recon.scans.errors import ScanError

        if exact and operator is not None:
            raise ScanError("--exact and --operator exclude each other: give one of them.")
        if slab not in ("auto", "none") and not (slab.isdecimal() and int(slab)):
            raise ScanError(f"--slab {slab} will not do: give a number of slices, auto or none.")
        more: dict[str, Any] = {"coils": coils, "acceleration": acceleration, "half": half}
        more |= {"pattern": pattern, "seed": pattern_seed, "calibration": calibration}
        more |= {"slice": slice_, "prewhiten": prewhiten}
        opened = _open(scan, views, binning, axis_offset, air_normalisation, **more)
        given = {
            "iterations": iterations,
            "regularization": regularization,
            "rho": rho,
            "preconditioner": preconditioner,
            "start": start,
            "weighted": weighted or None,
            "adaptive": adaptive or None,
            "tolerance": tolerance,
            "nonnegative": nonnegative,
            "weights": weights,
            "patch": patch,
            "operator": "exact" if exact else operator,
            "passes": passes,
            "precision": precision,
            "window": window,
        }
        parameters = _parameters(opened.kind, method, given)
        check_output(output)
        job = _validated(
            ReconstructionJob,
            scan=scan.expanduser().absolute(),  # so that the volume's provenance can be run from anywhere
            options=opened.options,
            shape=shape,
            voxel_size=voxel_size,
            parameters=parameters,
            device=device,
            output=output,
            bits=_bits(bits),
            slices=slices,
            slab={"auto": "auto", "none": None}[slab] if not slab.isdecimal() else int(slab),
            seed=seed,
        )
        if os.environ.get("WORLD_SIZE", "1") != "1" and not isinstance(job.slab, int):
            raise ScanError(
                "Several processes share a volume slab by slab: give --slab N, and an output that ends in .ome.zarr."
            )
        for sentence in opened.checks():
            _note(f"warning: {sentence}")
        try:
            finished = _run(job)
        except KeyboardInterrupt:
            from napari_recon.jobs.slabs import work_folder

            if not work_folder(output).exists():
                raise
            raise KeyboardInterrupt("Interrupted; what is finished is kept: the same command goes on.") from None
        _report(finished, as_json, say)


@app.command()
def sweep(
    scan: ScanPath,
    parameter: Annotated[
        Literal["regularization", "iterations", "rho", "passes", "patch", "views"],
        typer.Option(help="What is varied; all else is as reconstruct has it."),
    ],
    values: Annotated[str, typer.Option(metavar="V,V,...", help="Two to twelve, with commas between them.")],
    method: Annotated[
        Literal["fdk", "sirt", "tv", "padmm", "unrolled"] | None, typer.Option(help="By default tv.")
    ] = None,
    binning: Annotated[
        int | None, typer.Option(metavar="N", help="Coarser than reconstruct: by default 2, of --slices 1.")
    ] = None,
    slices: Annotated[
        tuple[int, int] | None, typer.Option(metavar="A B", help="Only slices A up to (not with) B of the volume.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="VOLUME", help="What they are compared with; by default the scan's truth, if it has one."),
    ] = None,
    views: Views = None,
    axis_offset: AxisOffset = None,
    air_normalisation: Air = None,
    shape: Shape = None,
    voxel_size: VoxelSize = None,
    iterations: Iterations = None,
    regularization: Regularization = None,
    rho: Rho = None,
    preconditioner: Preconditioner = None,
    start: Start = None,
    patch: Patch = None,
    weights: Weights = None,
    operator: Operator = None,
    passes: Passes = None,
    csv: Annotated[Path | None, typer.Option(metavar="CSV", help="The table as a file.")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Reconstruct with several values of a parameter, on coarser voxels or some slices, and compare."""
    with _told(as_json) as say:
        from napari_recon.jobs.job import SweepJob
        from napari_recon.measures import table
        from napari_recon.scans.errors import ScanError

        if csv is not None:
            table.check_path(csv, ".csv")
        try:
            numbers = [float(word) for word in values.split(",") if word.strip()]
        except ValueError:
            raise ScanError(f"--values {values} are no numbers with commas between them: give 0.001,0.002.") from None
        opened = _open(scan, views, 1, axis_offset, air_normalisation)
        if opened.kind == "mri":
            raise ScanError(f"{scan} holds k-space (MRI), and sweeps are made of X-ray projections only.")
        grid = opened.default_grid(shape, voxel_size)
        given = {
            "iterations": iterations,
            "regularization": regularization,
            "rho": rho,
            "preconditioner": preconditioner,
            "start": start,
            "weights": weights,
            "patch": patch,
            "operator": operator,
            "passes": passes,
        }
        job = _validated(
            SweepJob,
            scan=scan.expanduser().absolute(),
            options=opened.options,
            shape=grid.shape,
            voxel_size=grid.voxel_size,
            parameters=_parameters(opened.kind, method, given),
            parameter=parameter,
            values=numbers,
            binning=binning if binning is not None else 2 if slices is None else 1,
            slices=slices,
            reference=reference,
            device=device,
            seed=seed,
        )
        for sentence in opened.checks():
            _note(f"warning: {sentence}")
        finished = _run(job)
        rows = finished.provenance["sweep"]["rows"]
        if csv is not None:
            table.write_csv(csv, [{"volume": f"{parameter} {row['value']:g}"} | row for row in rows])
        if as_json:
            told = {"parameter": parameter, "rows": rows, "best": finished.figures.get("best")}
            made = {"seconds": finished.seconds, "peak_memory": finished.peak_memory, "job": finished.provenance["job"]}
            say(told | made)
            return
        columns = [key for key in rows[0] if key != "value"]
        print(f"{parameter:>14} " + " ".join(f"{table.COLUMNS.get(key, key).split()[0]:>10}" for key in columns))
        for row in rows:
            best = " best" if row["value"] == finished.figures.get("best") else ""
            print(f"{row['value']:>14g} " + " ".join(f"{row.get(key, math.nan):>10.4g}" for key in columns) + best)


@app.command()
def export(
    volume: Annotated[Path, typer.Argument(metavar="VOLUME", help="A volume in any format that is read.")],
    output: VolumeOutput,
    bits: Bits = None,
    as_json: AsJson = False,
) -> None:
    """Write a volume in another format, where it lies and with what it tells of how it was made."""
    with _told(as_json) as say:
        from napari_recon.jobs.volumes import check_output, read_volume, write_volume

        check_output(output)
        read = read_volume(volume)
        if read.voxel_size is None and read.scale is None:
            _note(f"{volume} does not tell its voxel size: 1 mm is written.")
        write_volume(output, read.data, read.grid, read.provenance, bits=_bits(bits))
        if as_json:
            say({"output": str(output), "shape": read.data.shape, "scale": read.grid.scale})
        else:
            print(f"{output}: {' x '.join(map(str, read.data.shape))} voxels")


@app.command("fit-operator")
def fit_operator(
    scan: ScanPath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="A .safetensors file to write.")],
    terms: Annotated[
        int | None, typer.Option(metavar="1|3", help="Kernels: 1, or 3 that vary with height and radius.")
    ] = None,
    nonsymmetric: Annotated[
        bool, typer.Option("--nonsymmetric", help="The paper's form for CT: m on one side.")
    ] = False,
    complex_filter: Annotated[
        bool, typer.Option("--complex-filter", help="With --nonsymmetric: a kernel that is not its own mirror image.")
    ] = False,
    distribution: Annotated[
        Literal["white", "image", "residual"] | None, typer.Option(help="Random volumes that H is fitted on.")
    ] = None,
    probes: Annotated[int | None, typer.Option(metavar="N", help="Random volumes.")] = None,
    iterations: Annotated[int | None, typer.Option(metavar="N", help="Rounds of lambda and m.")] = None,
    positions: Annotated[int | None, typer.Option(metavar="N", help="Point-spread functions of the start.")] = None,
    support: Annotated[
        int | None, typer.Option(metavar="N", help="Largest offset of the kernel in voxels; by default all.")
    ] = None,
    mask_step: Annotated[
        int | None, typer.Option(metavar="N", help="m is piecewise linear on a grid of so many voxels.")
    ] = None,
    volume: Annotated[
        Path | None, typer.Option(metavar="VOLUME", help="What to see the operator on; by default the scan's FDK.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="PNG", help="x, AtA x, H x, lambda, m and the squared error as a picture.")
    ] = None,
    views: Views = None,
    binning: Binning = 1,
    axis_offset: AxisOffset = None,
    air_normalisation: Air = None,
    shape: Shape = None,
    voxel_size: VoxelSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit the normal operator of a scan: m and lambda, which stand for projecting to and fro."""
    with _told(as_json) as say:
        from napari_recon.jobs.job import OperatorJob

        if figure is not None:
            from napari_recon.jobs.figure import check_figure

            check_figure(figure)
        given = {
            "terms": terms,
            "symmetric": not nonsymmetric,
            "real_filter": not complex_filter,
            "distribution": distribution,
            "probes": probes,
            "iterations": iterations,
            "positions": positions,
            "support": support,
            "mask_step": mask_step,
        }
        opened = _open(scan, views, binning, axis_offset, air_normalisation)
        job = _validated(
            OperatorJob,
            scan=scan.expanduser().absolute(),
            options=opened.options,
            shape=shape,
            voxel_size=voxel_size,
            parameters={name: value for name, value in given.items() if value is not None},
            volume=volume,
            device=device,
            output=output,
            seed=seed,
        )
        for sentence in opened.checks():
            _note(f"warning: {sentence}")
        shown: dict[str, Any] = {}
        finished = _run(job, shown)
        if figure is not None:
            from napari_recon.jobs.figure import operator_figure

            size = opened.default_grid(shape, voxel_size).voxel_size
            operator_figure(shown, size, finished.figures, figure, opened.name)
        _report(finished, as_json, say, {} if figure is None else {"figure": str(figure)})


@app.command()
def simulate(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="Phantom: walnut, shepp-logan, ellipsoids, blobs; anatomy: head, thorax, limb, vessels, shell, foam; "
            "k-space: mri- and any of these, such as mri-head.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="A folder to make.")],
    size: Annotated[int, typer.Option(metavar="N", help="Voxels along an edge of the true volume.")] = 64,
    views: Annotated[int, typer.Option(metavar="V", help="Projections over the full circle.")] = 90,
    seed: Seed = 0,
    photons: Annotated[
        float | None, typer.Option(metavar="N", help="Photons a pixel without object; 0 for no noise.")
    ] = None,
    read_noise: Annotated[
        float, typer.Option(metavar="COUNTS", help="Standard deviation of the detector's noise.")
    ] = 2.0,
    jitter_mm: Annotated[float, typer.Option(metavar="MM", help="How loose source and detector are.")] = 0.0,
    jitter_degrees: Annotated[float, typer.Option(metavar="DEG", help="How loose angles are.")] = 0.0,
    scatter: Annotated[
        float, typer.Option(metavar="F", help="Scattered over primary photons behind the object.")
    ] = 0.0,
    polychromatic: Annotated[
        bool, typer.Option("--polychromatic", help="Three energies: the beam hardens (anatomies).")
    ] = False,
    metal: Annotated[bool, typer.Option("--metal", help="Titanium implants (head, thorax, limb).")] = False,
    acceleration: Annotated[float, typer.Option(metavar="R", help="Of k-space: one of R samples is taken.")] = 5.0,
    coils: Annotated[int, typer.Option(metavar="N", help="Of k-space.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Simulate a scan of a phantom or an anatomy: noise, and the true volume beside it."""
    with _told(as_json) as say:
        from napari_recon.learning.simulate import simulate as make

        start = time.perf_counter()
        if kind.startswith("mri-"):
            from napari_recon.learning.simulate_mri import write_mri

            options: dict[str, Any] = {"size": size, "seed": seed, "acceleration": acceleration, "coils": coils}
            written = write_mri(kind.removeprefix("mri-"), output, **options)
            seconds = time.perf_counter() - start
            if as_json:
                say({"output": str(written), "seconds": seconds})
            else:
                print(f"{written}: {kind}, {coils} coils, {acceleration:g} times undersampled, {seconds:.1f} s")
            return
        more: dict[str, Any] = {} if photons is None else {"photons": photons or None}
        more |= {"read_noise": read_noise, "jitter_mm": jitter_mm, "jitter_degrees": jitter_degrees}
        more |= {"scatter": scatter, "polychromatic": polychromatic, "metal": metal}
        make(kind, output, size=size, views=views, seed=seed, **more)
        seconds = time.perf_counter() - start
        if as_json:
            say({"output": str(output), "seconds": seconds})
        else:
            print(f"{output}: {views} views of {kind}, {seconds:.1f} s")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What is trained on, what, how, how long.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="WEIGHTS", help="A .safetensors file to write.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew where there is a checkpoint.")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; by default what CONFIG says.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a learned method; the best weights so far are kept, and stopped training goes on when called again.

    On several GPUs or machines: torchrun --nproc-per-node N -m napari_recon train CONFIG.toml -o WEIGHTS.
    """
    with _told(as_json) as say:
        from napari_recon.jobs.memory import peak_memory, readable
        from napari_recon.learning.training import checkpoint_path, read_config, stops_anywhere, stream_training

        chosen = read_config(config)
        if device is not None:
            chosen = chosen.model_copy(update={"device": device})
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        figures: dict[str, float] = {}
        step, seconds, stage, asked = 0, 0.0, "", False
        with (
            _asked_to_stop() as stopped,
            contextlib.closing(stream_training(chosen, output, resume=not fresh)) as updates,
            _bar() as bar,
        ):
            for update in updates:
                figures, seconds = figures | update.figures, update.seconds
                if update.stage == "training":
                    step = update.step
                shown = [f"{name} {figures[name]:.4g}" for name in ("loss", "psnr") if name in figures]
                bar(update.stage if update.stage != stage else None, ", ".join(shown), update.step / update.total)
                stage = update.stage
                if "psnr" in update.figures:
                    _note(
                        f"step {step}: loss {figures['loss']:.4g}, PSNR {figures['psnr']:.2f} dB "
                        f"(start {figures['start_psnr']:.2f}, best {figures['best_psnr']:.2f})"
                    )
                # Between two steps, so that the checkpoint is whole; of several processes none leaves the preparations,
                # after which the others wait for it.
                asked = stops_anywhere(bool(stopped)) if update.stage == "training" else alone and bool(stopped)
                if asked:
                    break
        if asked:
            kept = [str(path) for path in (output, checkpoint_path(output)) if path.exists()]
            _note(f"Stopped after step {step}; kept: {', '.join(kept) or 'nothing yet'}.")
            say({"output": str(output) if output.exists() else None, "steps": step, "stopped": True})
            raise typer.Exit(130)
        peak = peak_memory()
        if as_json:
            say({"output": str(output), "steps": step, "seconds": seconds, "peak_memory": peak, "figures": figures})
        elif _first():
            print(
                f"{output}: best PSNR {figures.get('best_psnr', math.nan):.2f} dB after {step} steps; "
                f"{seconds:.1f} s, at most {readable(peak)}"
            )


@app.command()
def compare(
    volumes: Annotated[list[Path] | None, typer.Argument(metavar="VOLUME...", help="Volumes to judge.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="REFERENCE", help="What they are compared with; without one, what needs none is told."),
    ] = None,
    halves: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A B", help="Volumes of odd and even views (reconstruct --half): the resolution that they agree to."
        ),
    ] = None,
    box: Annotated[
        tuple[float, float, float, float, float, float] | None,
        typer.Option(metavar="Z Y X Z Y X", help="A region beside the field of view: two corners in mm."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="VOLUME", help="Regions beside the field of view: 1, 2, ...; 0 is none.")
    ] = None,
    radius: Annotated[
        float | None,
        typer.Option(metavar="MM", help="Field of view about the axis; by default half the width."),
    ] = None,
    data_range: Annotated[
        float | None,
        typer.Option(help="Range of values of PSNR and SSIM; by default the reference's."),
    ] = None,
    ssim_3d: Annotated[bool, typer.Option("--ssim-3d", help="SSIM of neighbourhoods in 3D too.")] = False,
    scan: Annotated[
        Path | None,
        typer.Option(metavar="SCAN", help="Project each volume: what it leaves of this scan, ||Ax - y||/||y||."),
    ] = None,
    scale_fitted: Annotated[
        bool, typer.Option("--fit-scale", help="Fit scale and offset to the reference first, for units that differ.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(metavar="CSV", help="The table as a file.")] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="PNG", help="The table as a picture; of --halves, their correlation.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """PSNR, SSIM and normalised error of volumes against a reference; without one noise, cupping, resolution.

    All is told inside a field of view, and in the regions of --box and --labels, which are taken to be uniform. Volumes
    on other grids are resampled onto that of the reference, or of the first.
    """
    with _told(as_json) as say:
        from napari_recon.jobs.job import DataConsistencyJob
        from napari_recon.jobs.volumes import read_volume
        from napari_recon.measures import table
        from napari_recon.measures.comparison import (
            box_region,
            field_of_view_region,
            fit_scale,
            is_on_grid,
            label_regions,
            on_grid,
            reference_range,
        )
        from napari_recon.measures.resolution import fourier_shell_correlation
        from napari_recon.scans import open_scan
        from napari_recon.scans.errors import ScanError

        paths = list(dict.fromkeys(volumes or []))
        if not paths and halves is None:
            raise ScanError("There is nothing to compare: give at least one volume, or two as --halves.")
        if scale_fitted and reference is None:
            raise ScanError("--fit-scale brings volumes to a reference's unit: give a --reference.")
        if csv is not None:
            table.check_path(csv, ".csv")
            if not paths:
                raise ScanError("--csv holds the table of volumes: give at least one volume.")
        if figure is not None:
            table.check_path(figure, ".png")
        first = reference if reference is not None else halves[0] if not paths and halves else paths[0]
        base = read_volume(first)
        grid, edges = base.grid, base.grid.scale
        notes: list[str] = []
        if base.voxel_size is None and base.scale is None:
            notes.append(f"{first} tells no voxel size, so all lengths are in voxels, not in mm.")

        def placed(path: Path, order: Literal[0, 1] = 1) -> tuple[Any, bool, Any]:
            """The values of a volume's file on the grid, whether they were resampled, and the volume as it was."""
            volume = base if path == first else read_volume(path)
            resampled = not is_on_grid(volume, grid)
            if resampled:
                shape = " x ".join(map(str, grid.shape))
                notes.append(f"{path} was resampled onto the {shape} voxels of {grid.voxel_size:.4g} mm of {first}.")
            return on_grid(volume, grid, order), resampled, volume

        view = field_of_view_region(grid, radius)
        regions = [view]
        if box is not None:
            regions.append(box_region(grid, box[:3], box[3:]))
        if labels is not None:
            regions += label_regions(placed(labels, order=0)[0])
        uniform = [region.name for region in regions if region.uniform]
        background = uniform[0] if len(uniform) > 1 else None

        rows: list[dict[str, Any]] = []
        measured = None if scan is None else open_scan(scan)
        if reference is not None and data_range is None and paths:
            data_range = reference_range(base.data, view.mask)  # once for all volumes
        for path in paths:
            values, resampled, volume = placed(path)
            more: dict[str, Any] = {"resampled": resampled}
            if scale_fitted:
                more["scale"], more["offset"] = scale, offset = fit_scale(values, base.data, view.mask)
                values = (scale * values + offset).astype("float32")
                notes.append(f"{path} was brought to the reference's unit: times {scale:.4g}, plus {offset:.4g}.")
            residual = volume.provenance.get("figures", {}).get("residual")
            if isinstance(residual, float):
                more["residual"] = residual
            if measured is not None:
                placed_as: dict[str, Any] = {} if measured.kind == "mri" else {"shape": volume.data.shape}
                if volume.voxel_size is not None and placed_as:
                    placed_as["voxel_size"] = volume.voxel_size
                left = _run(DataConsistencyJob(scan=measured.path, volume=path, **placed_as)).figures
                more |= {key: left[key] for key in ("residual", "residual_to_noise") if key in left}
            judged = {str(path): values} | ({} if reference is None else {"": base.data})  # which is no path's name
            found = table.table(
                judged,
                None if reference is None else "",
                regions,
                data_range,
                ssim=("2d", "3d") if ssim_3d else ("2d",),
                voxel_size=edges,
                background=background,
            )
            rows += [row | more for row in found if row["volume"]]
        told: dict[str, Any] = {"reference": None if reference is None else str(reference)}
        told["field_of_view_radius_mm"] = radius if radius is not None else min(grid.extent[1:]) / 2
        told["field_of_view_voxels"] = int(view.mask.sum()) * grid.shape[0]
        told |= {"background": background} if background else {}
        told["volumes"] = rows
        if halves is not None:
            both = [placed(path)[0] for path in halves]
            shells = fourier_shell_correlation(both[0], both[1], edges, view.mask)
            told["resolution"] = {
                "halves": [str(path) for path in halves],
                "half_bit_mm": shells.resolution_half_bit,
                "one_seventh_mm": shells.resolution_one_seventh,
                "sentence": shells.sentence,
                "frequency_per_mm": shells.frequency.tolist(),
                "correlation": shells.correlation.tolist(),
                "half_bit": shells.half_bit.tolist(),
            }
        told |= {"resampled": any("resampled" in note for note in notes), "notes": notes}
        if csv is not None:
            table.write_csv(csv, rows)
        if figure is not None and rows:
            short = len({path.name for path in paths}) == len(paths)
            table.write_figure(figure, [row | {"volume": Path(row["volume"]).name} if short else row for row in rows])
        elif figure is not None:
            table.write_correlation(figure, shells)
        if as_json:
            say(told)
            return
        for sentence in notes:
            _note(sentence)
        for row in rows:
            shown = [key for key in table.COLUMNS if key in row and key not in ("volume", "region", "data_range")]
            place = "" if len(regions) == 1 else f", {row['region']}"
            print(f"{row['volume']}{place}: " + ", ".join(f"{table.COLUMNS[key]} {row[key]:.4g}" for key in shown))
        if halves is not None:
            print(shells.sentence)
        said = [f"data range {data_range:.4g}"] if data_range is not None and reference is not None else []
        print(", ".join([*said, f"field of view of radius {told['field_of_view_radius_mm']:.4g} mm"]))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A benchmark, or 'all'.")],
    as_json: AsJson = False,
) -> None:
    """Run a benchmark of a source checkout."""
    with _told(as_json) as say:
        import importlib

        import napari_recon
        from napari_recon.scans.errors import ScanError

        name = name.replace("-", "_")
        folder = Path(napari_recon.__file__).parent.parent / "benchmarks"
        names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
        if not names:
            raise ScanError("The benchmarks are part of a source checkout, not of the installed package: clone it.")
        if name != "all" and name not in names:
            raise ScanError(f"There is no benchmark {name!r}: choose one of {', '.join(names)}, or all.")
        sys.path.insert(0, str(folder.parent))
        results = {}
        for chosen in names if name == "all" else [name]:
            # A benchmark prints its own table, which with --json would be in the way of the one object.
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                try:
                    results[chosen] = importlib.import_module(f"benchmarks.{chosen}").run()
                except ScanError as error:
                    if name != "all":
                        raise
                    print(f"{chosen}: {error}", file=sys.stderr)  # a GPU, say, is not everywhere
        if as_json:
            found = results.get(name)
            found = found if isinstance(found, dict) else {"rows": found}  # some have more to tell than rows
            say(results if name == "all" else {"benchmark": name, **found})


# -- what the commands share ---------------------------------------------------------------------------------------


def _open(
    path: Path,
    views: int | None,
    binning: int,
    axis_offset: float | None,
    air_normalisation: bool | None,
    **more: float | str | None,
) -> Scan | KSpaceScan:
    """The scan, as it is to be read; what is for the other kind of scan is refused by its name."""
    from napari_recon.scans import open_scan

    given = {"views": views, "axis_offset": axis_offset, "air_normalisation": air_normalisation, **more}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if binning != 1:
        changes["binning"] = binning
    return open_scan(path, **changes)


def _parameters(kind: str, method: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """A method and its parameters: those that were given, and what a kind of scan has others by default."""
    from napari_recon.jobs.job import MRI_REGULARIZATION, SHIPPED_WEIGHTS, STARTS

    parameters = {name: value for name, value in given.items() if value is not None}
    mri, weights, start = kind == "mri", parameters.get("weights"), parameters.get("start")
    method = method or ("padmm" if mri else "tv")
    if weights is not None and method == "unrolled":
        from napari_recon.learning.weights import find_weights, shipped_weights

        found = find_weights(weights)  # a file is found again from anywhere
        parameters["weights"] = weights if weights in shipped_weights() else str(found.absolute())
    if start is not None and start not in STARTS and Path(start).expanduser().exists():
        parameters["start"] = str(Path(start).expanduser().absolute())  # a file is found again from anywhere
    if mri and method == "padmm":
        parameters.setdefault("regularization", MRI_REGULARIZATION)
    if mri and method == "unrolled":
        parameters.setdefault("weights", SHIPPED_WEIGHTS["mri"])
    if method == "unrolled" and "operator" in parameters:
        parameters.setdefault("passes", 2)  # the first pass has no use for one
    if parameters.get("patch") == 0:
        parameters["patch"] = None
    return {"method": method, **parameters}


def _bits(asked: str | None) -> Literal[16, 32] | None:
    """What --bits says, as a number."""
    return None if asked is None else 16 if asked == "16" else 32


def _validated(kind: type[SomeJob], **fields: Any) -> SomeJob:
    """The job, or a ScanError that names the option that will not do."""
    from pydantic import ValidationError

    from napari_recon.scans.errors import ScanError

    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = next((part for part in reversed(first["loc"]) if isinstance(part, str)), "slices")
        option = "--" + name.replace("_", "-")
        if first["type"] == "extra_forbidden":
            raise ScanError(
                f"{option} is no option of method {fields['parameters']['method']!r}: leave it out."
            ) from None
        if first["type"] == "value_error":  # one of our own sentences
            raise ScanError(f"{option}: {first['msg'].removeprefix('Value error, ')}.") from None
        problem = first["msg"][0].lower() + first["msg"][1:]
        raise ScanError(f"{option} {first['input']} will not do: {problem}.") from None


def _run(job: Job, volumes: dict[str, Any] | None = None) -> Finished:
    """Run a job with a progress bar; anything but its finish ends the command. ``volumes`` gets the job's."""
    from napari_recon.jobs.messages import Failed, Finished, Notice, Progress, Stage
    from napari_recon.jobs.run import run_job
    from napari_recon.jobs.stages import Control
    from napari_recon.scans.errors import ScanError

    control = Control()
    with _bar() as bar:
        for message in run_job(job, control):
            if isinstance(message, Stage):
                bar(message.name, message.detail, None)
            elif isinstance(message, Progress):
                named = {"residual": "residual", "held_out": "relative error"}
                found = [f"{named[name]} {value:.3g}" for name, value in message.figures.items() if name in named]
                bar(None, "".join(found[:1]), message.step / max(1, message.total))
                if message.name == "slabs" and message.step % 100 == 0:
                    some = message.box[0]
                    of = f"Slab {message.step // 100} of {message.total // 100}"
                    _note(f"{of} is finished: slices {some.start} to {some.stop - 1}.")
            elif isinstance(message, Notice):
                _note(message.text)
            elif isinstance(message, Finished):
                if volumes is not None:
                    volumes |= control.volumes
                return message
            elif isinstance(message, Failed):
                if message.kind == "input":
                    raise ScanError(message.text)
                raise _JobFailed(message.text, message.detail if message.kind == "bug" else "")
    raise _JobFailed("The job was cancelled; nothing was written.", "")


def _report(
    finished: Finished, as_json: bool, say: Callable[[dict[str, Any]], None], more: dict[str, Any] | None = None
) -> None:
    """What a job made and measured: on a line, or with ``more`` as one JSON object."""
    if not _first():
        return
    if as_json:
        say(
            {
                "output": finished.output,
                **(more or {}),
                "seconds": finished.seconds,
                "peak_memory": finished.peak_memory,
                "figures": finished.figures,
                "job": finished.provenance["job"],
            }
        )
        return
    from napari_recon.jobs.memory import readable

    shown = ", ".join(f"{name} {value:.4g}" for name, value in finished.figures.items())
    print(f"{finished.output}: {shown}; {finished.seconds:.1f} s, at most {readable(finished.peak_memory)}")


class _JobFailed(Exception):
    """A job ended in something else than bad input."""


@contextlib.contextmanager
def _told(as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What every command runs inside: errors become one sentence, and results one JSON object."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it comments on damaged files, and we say it ourselves

    def say(result: dict[str, Any]) -> None:
        if as_json and _first():
            print(json.dumps(_plain(result)))

    def leave(sentence: str, status: int) -> NoReturn:
        say({"error": sentence})
        print(sentence if _first() else f"Process {os.environ['RANK']}: {sentence}", file=sys.stderr)
        raise typer.Exit(status)

    from napari_recon.scans.errors import ScanError

    try:
        yield say
    except ScanError as error:
        leave(str(error), 2)
    except _JobFailed as error:
        if error.args[1]:
            _note(error.args[1])
        leave(error.args[0], 1)
    except KeyboardInterrupt as interrupt:
        leave(str(interrupt) or "Interrupted; nothing was written.", 130)


def _plain(value: Any) -> Any:
    """The value as JSON knows it: no NumPy, no NaN."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Interrupts as a list that they are added to, for what ends by itself; the second one interrupts at once.

    Not under torchrun: a queue may signal it and its processes, and it hands on what it hears.
    """
    asked: list[int] = []

    def hear(number: int, frame: Any) -> None:
        if asked and "LOCAL_RANK" not in os.environ:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first() -> bool:
    """Whether this is the process that speaks: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _note(text: str) -> None:
    if _first():
        print(text, file=sys.stderr)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str | None, str, float | None], None]]:
    """A progress bar on standard error where that is a terminal: called with (stage, detail, fraction)."""
    if not (sys.stderr.isatty() and _first()):
        yield lambda stage, detail, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, detail="")

        def show(stage: str | None, detail: str, fraction: float | None) -> None:
            if stage is not None:
                progress.reset(task, description=stage, total=None, detail=detail)
            if fraction is not None:
                progress.update(task, total=1.0, completed=fraction, detail=detail)

        yield show


def main() -> None:
    """Entry point of the command ``napari-recon``."""
    from napari_recon.jobs.job import quiet_threads

    quiet_threads(os.environ)
    # torchrun shares out torch's threads, not numba's.
    if (fellows := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
        os.environ.setdefault("NUMBA_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // fellows)))
    app()


if __name__ == "__main__":
    main()
