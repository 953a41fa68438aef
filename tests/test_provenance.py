"""What a result tells of how it was made can be done again: as a job, as a command line, as Python."""

import shlex
import string
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from napari_recon import cli
from napari_recon.jobs import Control, DataConsistencyJob, OperatorJob, ReconstructionJob, run_job
from napari_recon.jobs.job import (
    FDKParameters,
    FitParameters,
    PADMMParameters,
    ResolutionJob,
    SENSEParameters,
    SIRTParameters,
    TrainJob,
    TVParameters,
    UnrolledParameters,
    ZeroFilledParameters,
)
from napari_recon.jobs.messages import Finished
from napari_recon.jobs.provenance import command_line, not_repeated, python_code, reconstruction_of
from napari_recon.jobs.volumes import read_volume
from napari_recon.learning.simulate import simulate
from napari_recon.learning.simulate_mri import write_mri
from napari_recon.scans import KSpaceOptions, ScanError, ScanOptions

VIEWS, COILS = 12, 4


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A scan of each kind, at paths that a shell would stumble over."""
    folder = tmp_path_factory.mktemp("it's a $HOME for scans")
    made = {"x-ray": simulate("shepp-logan", folder / "-- x", size=16, views=VIEWS)}
    made["mri"] = write_mri("head", folder / "k space", size=16, acceleration=2.0, coils=COILS)
    return made


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    import platformdirs

    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: folder)


# -- any job, as a command line and as Python ----------------------------------------------------------------------

maybe = st.none() | st.booleans()
size = st.floats(1e-9, 1e9)
weight = st.floats(0, 100)
names = st.text(string.printable + "µ", min_size=1).map(lambda text: "/nowhere/" + text.replace("/", "_"))
operators = st.sampled_from(["fit", "exact"]) | names
many = st.integers(1, 10_000)
patches = st.none() | st.integers(8, 500)

FIELDS = {
    ScanOptions: {
        "views": st.none() | st.integers(2, VIEWS),
        "half": st.sampled_from([None, "even", "odd"]),
        "binning": st.integers(1, 2),
        "axis_offset": st.none() | st.floats(-3, 3),
        "air_normalisation": maybe,
    },
    KSpaceOptions: {
        "slice": st.none(),  # the scan at hand is no stack
        "coils": st.none() | st.integers(1, COILS),
        "prewhiten": st.booleans(),
        "acceleration": st.none() | st.floats(1, 20),
        "pattern": st.sampled_from(["poisson", "gaussian"]),
        "calibration": st.integers(1, 64),
        "seed": st.integers(0, 2**31),
    },
    FDKParameters: {"window": st.sampled_from(["ram-lak", "hann", "cosine", "shepp-logan"])},
    SIRTParameters: {"iterations": many, "nonnegative": st.booleans()},
    TVParameters: {
        "iterations": many,
        "regularization": weight,
        "patch": patches,
        "operator": operators,
        "passes": st.integers(1, 10),
    },
    PADMMParameters: {
        "start": st.sampled_from(["network", "fdk", "tv", "zeros", "unrolled", __file__]),
        "preconditioner": st.sampled_from(["scalar", "diagonal", "circulant", "operator"]),
        "iterations": many,
        "regularization": weight,
        "rho": size.filter(lambda value: value <= 1e6),
        "adaptive": st.booleans(),
        "tolerance": st.floats(0, 1),
        "weighted": st.booleans(),
        "keep_iterates": st.just(False),  # which only the viewer shows
    },
    UnrolledParameters: {
        "weights": st.sampled_from(["unrolled", "mri", __file__]),
        "iterations": st.none() | st.integers(1, 100),
        "patch": patches,
        "operator": operators,
        "passes": st.sampled_from([1, 2]),
        "precision": st.sampled_from(["auto", "float32", "bfloat16"]),
    },
    ZeroFilledParameters: {},
    SENSEParameters: {"iterations": many, "regularization": weight},
}
KINDS = {
    "x-ray": (ScanOptions, (FDKParameters, SIRTParameters, TVParameters, PADMMParameters, UnrolledParameters)),
    "mri": (KSpaceOptions, (ZeroFilledParameters, SENSEParameters, PADMMParameters, UnrolledParameters)),
}


def any_job(kind):
    """Jobs of a kind of scan, whose path comes later."""
    options, methods = KINDS[kind]
    return st.fixed_dictionaries(
        {
            "options": st.builds(options, **FIELDS[options]),
            "shape": st.none() | st.tuples(*[st.integers(1, 999)] * 3),
            "voxel_size": st.none() | size,
            "device": st.sampled_from(["auto", "cpu", "cuda"]),
            "seed": st.integers(-(2**31), 2**31),
            "parameters": st.one_of(*(st.builds(model, **FIELDS[model]) for model in methods)),
            "output": st.sampled_from([Path("/tmp/v.tif"), Path("/tmp/a volume.ome.zarr")]),
            "bits": st.sampled_from([None, 16, 32]),
            "slices": st.none() | st.tuples(st.integers(0, 99), st.integers(100, 999)),
            "slab": st.sampled_from(["auto", None]) | st.integers(1, 999),
        }
    )


def test_every_field_is_tried():
    for model, fields in FIELDS.items():
        assert set(fields) == set(model.model_fields) - {"method"}, model


def jobs_of(arguments):
    """The jobs that the command line would run."""
    heard = []

    def catch(job, volumes=None):
        heard.append(job)
        raise typer.Exit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_run", catch)
        patch.setattr("napari_recon.scans.checks.look", lambda scan: [])
        result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return heard


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_command_line_says_the_job(scans, kind, data):
    job = ReconstructionJob(scan=scans[kind], **data.draw(any_job(kind)))
    program, *arguments = shlex.split(command_line(job))
    assert program == "napari-recon"
    assert jobs_of(arguments) == [job]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_python_says_the_job(kind, data):
    job = ReconstructionJob(scan=Path("/nowhere/it's"), **data.draw(any_job(kind)))
    described, _ = python_code(job).split("control = ")
    found = {}
    exec(described, found)
    assert found["job"] == job


def test_what_is_as_by_default_is_left_out():
    line = command_line(ReconstructionJob(scan=Path("/data/scan"), parameters=FDKParameters()))
    assert line == "napari-recon reconstruct /data/scan --output scan-fdk.tif --method fdk"


@settings(max_examples=30, deadline=None)
@given(
    job=st.builds(
        OperatorJob,
        scan=st.just(Path("/nowhere/scan")),
        parameters=st.builds(FitParameters, symmetric=st.booleans(), probes=st.integers(1, 256)),
        volume=st.none() | st.just(Path("/x.tif")),
        output=st.just(Path("/tmp/h.safetensors")),
    )
)
def test_other_jobs_are_said_as_python(job):
    described, _ = python_code(job).split("control = ")
    found = {}
    exec(described, found)
    assert found["job"] == job


def test_a_fit_is_a_command_too(scans):
    fit = FitParameters(terms=3, symmetric=False, real_filter=False, probes=2, distribution="white")
    job = OperatorJob(scan=scans["x-ray"], parameters=fit, seed=3, output=Path("/tmp/h.safetensors"))
    assert jobs_of(shlex.split(command_line(job))[1:]) == [job]


def test_what_no_command_does_is_told():
    for job in (
        DataConsistencyJob(scan=Path("s")),
        OperatorJob(scan=Path("s"), operator="h.safetensors"),
        TrainJob(output=Path("w.safetensors")),
        ReconstructionJob(scan=Path("s"), parameters=PADMMParameters(start="last")),
        ReconstructionJob(scan=Path("s"), parameters=PADMMParameters(start="layer: TV")),
    ):
        with pytest.raises(ScanError, match=r"\.$"):
            command_line(job)


# -- done again ----------------------------------------------------------------------------------------------------

METHODS = {
    "fdk": FDKParameters(),
    "tv by patches": TVParameters(iterations=4, patch=8, passes=2),
    "padmm": PADMMParameters(iterations=2, start="fdk"),
    "network": UnrolledParameters(patch=12, iterations=2),
}


def made(job):
    control = Control()
    *_, last = run_job(job, control)
    assert isinstance(last, Finished), last
    return control.volumes["result"], last.provenance


@pytest.mark.parametrize("method", METHODS)
def test_again_is_the_same_bit_for_bit(scans, method, tmp_path, monkeypatch):
    job = ReconstructionJob(
        scan=scans["x-ray"], options=ScanOptions(views=9), parameters=METHODS[method], device="cpu", seed=5
    )
    first, told = made(job)
    assert reconstruction_of(told) == job
    assert not_repeated(told) == []
    np.testing.assert_array_equal(made(reconstruction_of(told))[0], first)
    found = {"print": lambda message: None}
    exec(python_code(job), found)
    np.testing.assert_array_equal(found["volume"], first)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, shlex.split(command_line(job))[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    (file,) = tmp_path.iterdir()
    volume = read_volume(file)
    np.testing.assert_array_equal(volume.data, first)
    assert reconstruction_of(volume.provenance).parameters == job.parameters  # the file tells as much


def test_what_is_not_done_again_is_told(scans, tmp_path):
    job = ReconstructionJob(scan=scans["x-ray"], parameters=TVParameters(iterations=2, patch=8, passes=1), device="cpu")
    control = Control()
    control.focus((2.0, 3.0, 4.0))
    *_, last = run_job(job, control)
    assert "order" in " ".join(not_repeated(last.provenance))
    assert (
        len(not_repeated({"complete": False, "changes": [{"step": 2, "rho": 1.0}], "program": "napari-recon 0"})) == 3
    )
    assert "last" in not_repeated({"job": {"parameters": {"start": "last"}}})[0]
    other = {"weights": {"name": "unrolled", "sha256": "0", "card": ""}}
    assert "others" in not_repeated(other)[0]
    gone = {"weights": {"name": str(tmp_path / "w.safetensors"), "sha256": "0"}}
    assert "not there" in not_repeated(gone)[0]


def test_metadata_of_others_is_of_no_reconstruction():
    unknown = {"scan": "s", "parameters": {"method": "magic"}, "output": None}
    halves = ResolutionJob(scan=Path("s")).model_dump(mode="json")
    for told in ({}, {"job": None}, {"job": {"scan": "s"}}, {"job": unknown}, {"job": halves}):
        assert reconstruction_of(told) is None
