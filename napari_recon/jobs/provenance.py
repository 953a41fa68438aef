"""What a result tells of how it was made, as something to do: its job again, as a command line, or as Python."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from napari_recon.jobs.job import STARTS, Job, OperatorJob, PADMMParameters, ReconstructionJob, TrainJob
from napari_recon.learning.weights import find_weights, read_header, shipped_weights
from napari_recon.scans.errors import ScanError

_SCAN = {"seed": "pattern_seed"}
"""Options of scans that the command line calls otherwise."""


def reconstruction_of(told: Mapping[str, Any]) -> ReconstructionJob | None:
    """The reconstruction that a layer's metadata, or a volume's provenance, tells of; None where it is of none."""
    job = told.get("job")
    # Other jobs have a method too; an output is a reconstruction's.
    if not isinstance(job, dict) or "output" not in job or "method" not in (job.get("parameters") or {}):
        return None
    try:
        return ReconstructionJob.model_validate(job)
    except ValidationError:  # of another version
        return None


def command_line(job: Job) -> str:
    """The command that runs a job, for a POSIX shell; it says what is not as by default.

    What decides the result's values is always said where the default is the scan's affair: method, weights, and the
    regularisation of PADMM. A job without an output gets one in the current folder.

    Raises
    ------
    ScanError
        If no command does the same: the job is of another kind, or begins from a volume that is in no file.
    """
    if isinstance(job, ReconstructionJob):
        _expect_start(job)
        parameters = job.parameters
        always = {"padmm": ["regularization"], "unrolled": ["weights"]}.get(parameters.method, [])
        if getattr(parameters, "operator", "fit") != "fit":  # which asks for two passes of a network by itself
            always = [*always, "passes"]
        name = f"{job.scan.stem or 'volume'}-{parameters.method}.tif"
        said = ["reconstruct", str(job.scan.absolute()), "--output", str(Path(job.output or name).absolute())]
        if job.output is None:
            said[-1] = name
        said += ["--method", parameters.method]
        said += _flags(parameters, skip=("method", "keep_iterates"), always=always)  # iterates are the viewer's
        said += _flags(job.options, _SCAN)
        said += _flags(job, skip=("scan", "options", "parameters", "output", "slab"))
        said += [] if job.slab == "auto" else ["--slab", str(job.slab or "none")]
    elif isinstance(job, OperatorJob) and job.operator == "fit":
        output = str(job.output.absolute()) if job.output is not None else f"{job.scan.stem or 'scan'}.safetensors"
        said = ["fit-operator", str(job.scan.absolute()), "--output", output]
        said += [] if job.parameters.symmetric else ["--nonsymmetric"]
        said += [] if job.parameters.real_filter else ["--complex-filter"]
        said += _flags(job.parameters, skip=("symmetric", "real_filter"))
        said += _flags(job.options, _SCAN) + _flags(job, skip=("scan", "options", "parameters", "operator", "output"))
    else:
        raise ScanError("There is no command that does this: copy it as Python instead.")
    return shlex.join(["napari-recon", *said])


def python_code(job: Job) -> str:
    """A script that runs a job by the public interface, its volumes in NumPy arrays at the end.

    Raises
    ------
    ScanError
        If the job begins from a volume that is in no file, or is a training, which a CONFIG.toml says better.
    """
    if isinstance(job, TrainJob):
        raise ScanError("A training is said by its CONFIG.toml: save that instead.")
    if isinstance(job, ReconstructionJob):
        _expect_start(job)
    kind = type(job).__name__
    public = isinstance(job, ReconstructionJob)
    lines = ["import napari_recon as nr", f"from napari_recon.jobs import Control{'' if public else ', ' + kind}", ""]
    lines += [f"job = {'nr.' if public else ''}{kind}(", f"    scan={str(job.scan.absolute())!r},"]
    if changed := _changed(job.options):
        arguments = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        lines.append(f"    options=nr.{type(job.options).__name__}({arguments}),")
    parameters: BaseModel | None = getattr(job, "parameters", None)
    if parameters is not None and (told := _changed(parameters, always=("method",))):
        lines += ["    parameters={", *(f"        {name!r}: {value!r}," for name, value in told.items()), "    },"]
    for name, value in _changed(job, skip=("scan", "options", "parameters")).items():
        lines.append(f"    {name}={str(value) if isinstance(value, Path) else value!r},")
    lines += [")", "control = Control()", "for message in nr.run_job(job, control):", "    print(message)"]
    lines.append("volumes = control.volumes  # by name; (D, H, W) = (z, y, x), float32")
    if isinstance(job, ReconstructionJob):
        lines.append('volume = volumes["result"]')
    return "\n".join(lines) + "\n"


def not_repeated(told: Mapping[str, Any]) -> list[str]:
    """What of a result's making its job does not repeat, a sentence each.

    Parameters
    ----------
    told
        A volume's provenance.
    """
    from napari_recon import __version__

    sentences = []
    if not told.get("complete", True):
        sentences.append("It was finished early; its job goes on to the end.")
    if told.get("changes"):
        sentences.append("Its parameters were changed while it ran; its job keeps those that it began with.")
    if ((told.get("job") or {}).get("parameters") or {}).get("start") == "last":
        sentences.append("It began from what was then the last result; its job begins from what is now.")
    if told.get("steered"):
        sentences.append("Its patches came in the order in which you looked; in another, rounding differs.")
    program = f"napari-recon {__version__}"
    if told.get("program", program) != program:
        sentences.append(f"It was made by {told['program']}, and this is {program}.")
    for name in ("weights", "start"):
        made_with = told.get(name)
        if isinstance(made_with, dict) and "sha256" in made_with:
            weights = made_with.get("name") or made_with.get("weights", "")
            if weights == "network":
                continue
            try:
                same = read_header(find_weights(weights)).digest() == made_with["sha256"]
            except ScanError:
                sentences.append(f"The weights {weights} are not there any more.")
            else:
                if not same:
                    sentences.append(f"The weights {weights} are others now than when it was made.")
    return sentences


def _expect_start(job: ReconstructionJob) -> None:
    """Refuse a PADMM whose start nobody else has."""
    if not isinstance(job.parameters, PADMMParameters):
        return
    start = job.parameters.start
    if start == "last":
        raise ScanError("It began from the last result, which another program does not have: start from its file.")
    if start not in STARTS and start not in shipped_weights() and not Path(start).expanduser().exists():
        raise ScanError(
            f"It began from {start!r}, which is no file that is there: export that, and start from the file."
        )


def _changed(model: BaseModel, skip: Collection[str] = (), always: Collection[str] = ()) -> dict[str, Any]:
    """The fields that are not as by default, and those that are always told."""
    fields = ((name, getattr(model, name), field) for name, field in type(model).model_fields.items())
    return {n: value for n, value, field in fields if n not in skip and (n in always or value != field.default)}


def _flags(
    model: BaseModel, names: Mapping[str, str] = {}, skip: Collection[str] = (), always: Collection[str] = ()
) -> list[str]:
    """Fields as options of the command line: --name value, --name or --no-name; no patch is a patch of 0."""
    said: list[str] = []
    for name, value in _changed(model, skip, always).items():
        option = names.get(name, name).replace("_", "-")
        if isinstance(value, bool):
            said.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple) else ["0" if value is None else value]
            said += [f"--{option}", *map(str, values)]
    return said
