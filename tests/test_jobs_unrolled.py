"""Reconstructions by trained networks, as jobs and on the command line; and what is said where weights do not suit."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from napari_recon.cli import app
from napari_recon.jobs import Control, ReconstructionJob, run_job
from napari_recon.jobs.job import TVParameters, UnrolledParameters
from napari_recon.jobs.memory import plan_memory
from napari_recon.jobs.messages import Cancelled, Failed, Finished, Notice, Progress, Stage, VolumeReady
from napari_recon.jobs.volumes import read_volume
from napari_recon.learning import weights as weights_module
from napari_recon.learning.networks import load_weights, make_network, save_weights
from napari_recon.learning.simulate import simulate
from napari_recon.learning.training import DataConfig, TrainingConfig
from napari_recon.learning.weights import find_weights, outside_training, read_header, shipped_weights
from napari_recon.physics import NormalOperator, XRayTransform, fit_normal_operator
from napari_recon.physics.ramp_filtered import RampFiltered
from napari_recon.reconstruction.unrolled import PostProcessing, UnrolledPGD
from napari_recon.scans import Geometry, Grid, ScanError, ScanOptions, open_scan

SIZE = 24
TRAINING = TrainingConfig(data=DataConfig(size=SIZE, views=(20, 30))).model_dump(mode="json")


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate("shepp-logan", tmp_path_factory.mktemp("scans") / "phantom", size=SIZE, views=30, seed=1)


@pytest.fixture(scope="module")
def physics(scan):
    return XRayTransform.from_scan(open_scan(scan), device="cpu")


@pytest.fixture(scope="module")
def y(scan):
    return open_scan(scan).measurements()


def tiny_network():
    torch.manual_seed(0)
    network = make_network("light", width=4, scales=2)
    with torch.no_grad():  # far enough from the identity to matter
        for parameter in network.parameters():
            parameter.mul_(1.3)
    return network


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of untrained networks: name -> file."""
    folder = tmp_path_factory.mktemp("weights")
    models = {
        "ramp": UnrolledPGD(tiny_network(), 2, step_size=1.0, data_steps=2),
        "gradient": UnrolledPGD(tiny_network(), 2, step="gradient"),
        "untied": UnrolledPGD(tiny_network(), 2, tied=False),
        "from-tv": UnrolledPGD(tiny_network(), 1, init="tv"),
        "post": PostProcessing(tiny_network()),
    }
    for name, model in models.items():
        save_weights(model, folder / f"{name}.safetensors", card=f"The {name} card.", training=TRAINING)
    return {name: folder / f"{name}.safetensors" for name in models}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An operator cache of the test's own."""
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


def make_job(scan, weights, output=None, **parameters):
    parameters = {"patch": 16, "operator": "exact", "passes": 2, "precision": "float32"} | parameters
    return ReconstructionJob(
        scan=scan, parameters=UnrolledParameters(weights=str(weights), **parameters), device="cpu", output=output
    )


def result_of(job):
    control = Control()
    messages = list(run_job(job, control))
    assert isinstance(messages[-1], Finished), messages[-1]
    return control.volumes["result"], messages


def failure_of(job):
    *_, failed = run_job(job)
    assert isinstance(failed, Failed), failed
    assert failed.kind == "input", failed.detail
    assert failed.text.endswith(".")
    assert "\n" not in failed.text
    return failed.text


def difference(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def run_until(stream, wanted):
    for message in stream:
        if wanted(message):
            return message
    raise AssertionError("the job ended first")


def is_step(number):
    return lambda m: isinstance(m, Progress) and m.name == "result" and m.step == number


# -- a job is the library's call -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["ramp", "gradient", "untied", "from-tv", "post"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_job_makes_what_the_library_makes(scan, physics, y, files, name, passes):
    found, messages = result_of(make_job(scan, files[name], passes=passes))
    model = load_weights(files[name]).model
    model.patch_size = 16
    if name != "post":
        model.passes = passes
    expected = model(y, physics)[0, 0].numpy()
    assert difference(found, expected) < 1e-5
    assert not [m for m in messages if isinstance(m, Notice)]
    figures = messages[-1].figures
    residual = float(torch.linalg.vector_norm(physics.A(torch.from_numpy(found)[None, None]) - y))
    assert figures["residual"] == pytest.approx(residual / float(torch.linalg.vector_norm(y)), rel=1e-3)
    assert {"psnr", "ssim"} <= figures.keys()


@torch.no_grad()
def test_an_operator_is_fitted_to_the_steps_and_kept_apart(scan, physics, y, files, cache):
    found, messages = result_of(make_job(scan, files["ramp"], operator="fit"))
    assert [m for m in messages if isinstance(m, Stage) and m.name == "fitting the normal operator"]
    exact, _ = result_of(make_job(scan, files["ramp"]))
    assert 0 < difference(found, exact) < 0.2
    (kept,) = cache.rglob("*.safetensors")
    NormalOperator.load(kept, RampFiltered(physics))
    with pytest.raises(ScanError):
        NormalOperator.load(kept, physics)
    _, again = result_of(make_job(scan, files["ramp"], operator="fit"))
    assert not [m for m in again if isinstance(m, Stage) and m.name == "fitting the normal operator"]
    _, tv = result_of(ReconstructionJob(scan=scan, parameters=TVParameters(iterations=2, patch=16), device="cpu"))
    assert [m for m in tv if isinstance(m, Stage) and m.name == "fitting the normal operator"]
    assert len(list(cache.rglob("*.safetensors"))) == 2


def test_one_pass_needs_no_operator(scan, files):
    _, messages = result_of(make_job(scan, files["ramp"], operator="fit", passes=1))
    assert not [m for m in messages if isinstance(m, Stage) and m.name == "fitting the normal operator"]


def test_an_operator_file_is_used_where_it_stands_for_the_steps(scan, physics, files, tmp_path):
    plain, filtered = tmp_path / "plain.safetensors", tmp_path / "filtered.safetensors"
    fit_normal_operator(physics, probes=2, iterations=1).save(plain, physics)
    fit_normal_operator(RampFiltered(physics), probes=2, iterations=1).save(filtered, RampFiltered(physics))
    for name, file in (("gradient", plain), ("ramp", filtered)):
        found, _ = result_of(make_job(scan, files[name], operator=str(file)))
        exact, _ = result_of(make_job(scan, files[name]))
        assert 0 < difference(found, exact) < 0.2
    assert "ramp-filtered steps" in failure_of(make_job(scan, files["ramp"], operator=str(plain)))
    assert "does not exist" in failure_of(make_job(scan, files["ramp"], operator=str(tmp_path / "none.safetensors")))


@torch.no_grad()
def test_without_patches_the_network_sees_the_whole_volume(scan, physics, y, files):
    found, _ = result_of(make_job(scan, files["ramp"], patch=None, passes=1))
    assert difference(found, load_weights(files["ramp"]).model(y, physics)[0, 0].numpy()) < 1e-5
    result_of(make_job(scan, files["ramp"], patch=None, passes=2))


@torch.no_grad()
def test_iterations_are_the_weights_own_or_as_many_as_asked_for(scan, physics, y, files):
    def iterate(count):
        return result_of(make_job(scan, files["ramp"], patch=None, passes=1, iterations=count))[0]

    model = load_weights(files["ramp"]).model
    np.testing.assert_array_equal(iterate(2), iterate(None))
    model.iterations = 1
    assert difference(iterate(1), model(y, physics)[0, 0].numpy()) < 1e-5
    first, last = (float(t) for t in model.step_sizes)
    model.iterations, model.step_sizes = 4, torch.nn.Parameter(torch.tensor([first, last, last, last]))
    assert difference(iterate(4), model(y, physics)[0, 0].numpy()) < 1e-5
    assert "2 at most" in failure_of(make_job(scan, files["untied"], iterations=3))
    assert "no iterations" in failure_of(make_job(scan, files["post"], iterations=3))


def test_the_unit_of_the_attenuation_does_not_matter(scan, files, monkeypatch):
    from napari_recon.scans import Scan

    before, _ = result_of(make_job(scan, files["from-tv"]))
    measurements = Scan.measurements
    monkeypatch.setattr(Scan, "measurements", lambda self, device="cpu": 1000 * measurements(self, device))
    after, messages = result_of(make_job(scan, files["from-tv"]))
    assert difference(after, 1000 * before) < 1e-3
    assert not [m for m in messages if isinstance(m, Notice)]


def test_the_volume_tells_by_which_weights_it_was_made(scan, files, tmp_path):
    import hashlib

    job = make_job(scan, files["ramp"], output=tmp_path / "v.tif")
    _, messages = result_of(job)
    told = read_volume(tmp_path / "v.tif").provenance
    assert told == messages[-1].provenance
    assert ReconstructionJob.model_validate(told["job"]) == job
    assert told["weights"]["sha256"] == hashlib.sha256(files["ramp"].read_bytes()).hexdigest()
    assert told["weights"]["card"] == "The ramp card."


# -- it streams, and is steered ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ramp", "from-tv", "post"])
def test_every_step_and_patch_is_told_where_it_changes_the_volume(scan, files, name):
    control, steps = Control(), []
    for message in run_job(make_job(scan, files[name]), control):
        if isinstance(message, VolumeReady) and message.name == "result":
            before = control.volumes["result"].copy()
        elif isinstance(message, Progress) and message.name == "result":
            volume, outside = control.volumes["result"], np.ones(before.shape, bool)
            outside[message.box] = False
            np.testing.assert_array_equal(volume[outside], before[outside])
            before = volume.copy()
            steps.append(message)
    assert [m.step for m in steps] == list(range(1, steps[-1].total + 1))
    whole = [m for m in steps if all(s.stop - s.start == n for s, n in zip(m.box, before.shape, strict=True))]
    assert len(whole) >= {"ramp": 4, "from-tv": 5, "post": 0}[name]
    assert len(steps) - len(whole) >= 8


@pytest.mark.parametrize("step", [1, 3, 8, 24])
def test_cancel_leaves_nothing(scan, files, tmp_path, step):
    control = Control()
    stream = run_job(make_job(scan, files["ramp"], output=tmp_path / "v.tif"), control)
    run_until(stream, is_step(step))
    control.cancel()
    assert isinstance(list(stream)[-1], Cancelled)
    assert not control.volumes
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


def test_finish_keeps_what_there_is(scan, files):
    control = Control()
    stream = run_job(make_job(scan, files["ramp"]), control)
    run_until(stream, is_step(5))
    control.finish()
    finished = list(stream)[-1]
    assert isinstance(finished, Finished)
    assert not finished.complete
    assert finished.figures["residual"] > 0
    assert control.volumes["result"].any()


def test_patches_come_where_the_person_looks(scan, files):
    control = Control()
    stream = run_job(make_job(scan, files["ramp"], patch=8), control)
    run_until(stream, is_step(3))
    control.focus((float(SIZE - 1),) * 3)
    assert all(s.stop == n for s, n in zip(next(stream).box, control.volumes["result"].shape, strict=True))


@torch.no_grad()
def test_out_of_memory_halves_the_patch_and_goes_on(scan, physics, y, files, monkeypatch):
    whole_stream, edges = UnrolledPGD.stream, []

    def stream(self, *args, **options):
        updates = whole_stream(self, *args, **options)
        edges.append(self.patch_size)
        yield next(updates)
        yield next(updates)
        if len(edges) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        yield from updates

    monkeypatch.setattr(UnrolledPGD, "stream", stream)
    found, messages = result_of(make_job(scan, files["ramp"], patch=32))
    assert any(isinstance(m, Notice) and "halved to 16" in m.text for m in messages)
    assert edges == [32, 16]
    monkeypatch.undo()
    assert difference(found, result_of(make_job(scan, files["ramp"], patch=16))[0]) < 1e-5


# -- weights by name and by file -----------------------------------------------------------------------------------


def test_weights_are_found_by_name_and_by_path(files, monkeypatch):
    monkeypatch.setattr(weights_module, "shipped_weights", lambda: {"unrolled": files["ramp"]})
    assert find_weights("unrolled") == files["ramp"]
    assert find_weights(files["post"]) == files["post"]
    with pytest.raises(ScanError, match=r"^[^\n]*'unrooled'[^\n]*\(unrolled\)[^\n]*\.$"):
        find_weights("unrooled")


def test_weights_that_are_not_there_are_one_sentence(scan, files, tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "shipped_weights", dict)
    job = make_job(scan, "unrolled")
    assert "no weights ship" in failure_of(job)
    with pytest.raises(ScanError, match="no weights ship"):
        plan_memory(job)
    (tmp_path / "torn.safetensors").write_bytes(files["ramp"].read_bytes()[:300])
    assert "torn" in failure_of(make_job(scan, tmp_path / "torn.safetensors"))


def test_bad_weights_are_refused_before_anything_is_computed(scan, tmp_path):
    messages = list(run_job(make_job(scan, tmp_path / "none.safetensors")))
    assert [m.name for m in messages if isinstance(m, Stage)] == ["reading"]


def test_the_shipped_weights_say_what_they_are():
    shipped = shipped_weights()
    assert "unrolled" in shipped
    assert sum(file.stat().st_size for file in shipped.values()) < 10e6
    for file in shipped.values():
        header = read_header(file)
        assert header.card
        assert header.training["data"]["views"]
        load_weights(file)


def test_the_default_weights_beat_fdk(tmp_path):
    scan = simulate("ellipsoids", tmp_path / "scan", size=48, views=6, seed=5)
    job = ReconstructionJob(scan=scan, parameters=UnrolledParameters(passes=1), device="cpu")
    fdk = ReconstructionJob(scan=scan, parameters={"method": "fdk"}, device="cpu")
    assert result_of(job)[1][-1].figures["psnr"] > result_of(fdk)[1][-1].figures["psnr"] + 3


def test_describing_weights_does_not_cost_torch(scan, files):
    code = (
        "import sys\n"
        "from napari_recon.learning.weights import read_header, shipped_weights\n"
        "from napari_recon.jobs import ReconstructionJob\n"
        "from napari_recon.jobs.memory import plan_memory\n"
        f"shipped_weights(); header = read_header({str(files['ramp'])!r})\n"
        f"parameters = {{'method': 'unrolled', 'weights': {str(files['ramp'])!r}}}\n"
        f"plan_memory(ReconstructionJob(scan={str(scan)!r}, parameters=parameters, device='cpu'))\n"
        "print(header.model['iterations'], 'torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["2", "False"]


# -- scans unlike those of the training ----------------------------------------------------------------------------


def trained_on(**data):
    return {"data": {"size": 96, "views": [6, 10, 19]} | data}


def circle(views=10, size=96, start=0.0, arc=360.0, **more):
    """A scan as the training's: a cube of ``size`` voxels, each as large as a pixel at the axis."""
    pitch = 34.0 / size * 199.0 / 66.0
    columns = round(size * 1.06)
    angles = start + np.arange(views) * arc / views
    geometry = Geometry.cone(angles, (round(size * 1.4), columns), pitch, 66.0, 199.0, **more)
    return geometry, Grid((size,) * 3, 34.0 / size)


@pytest.mark.parametrize(("size", "views"), [(96, 6), (96, 10), (96, 19), (501, 30), (501, 100), (128, 26)])
def test_the_trainings_regime_is_inside_at_every_size(size, views):
    assert outside_training(trained_on(), *circle(views, size)) == []


@pytest.mark.parametrize("size", [12, 96, 100])
def test_training_scans_are_inside_their_own_training(size):
    from napari_recon.learning.training import _circle

    grid = Grid((size,) * 3, 34.0 / size)
    for views in (size // 16 + 1, size // 5):
        training = trained_on(size=size, views=[size // 16 + 1, size // 5])
        assert outside_training(training, _circle(grid, views), grid) == []


def test_any_order_of_the_views_is_a_circle():
    geometry, grid = circle(19)
    shuffled = geometry.select(np.random.default_rng(0).permutation(19))
    assert outside_training(trained_on(), shuffled, grid) == []
    golden = Geometry.cone(np.arange(16) * 137.508, geometry.detector_shape, geometry.pixel_size, 66.0, 199.0)
    assert outside_training(trained_on(), golden, grid) == []


def unlike():
    geometry, grid = circle(10)
    angles, shape, pitch = np.arange(10) * 36.0, geometry.detector_shape, geometry.pixel_size
    yield "parallel beam", Geometry.parallel(angles, shape, pitch[0] / 3), grid
    yield "fan beam", Geometry.cone(angles, (1, shape[1]), pitch, 66.0, 199.0), Grid((1, 96, 96), grid.voxel_size)
    yield r"views = \[40\] at size = 96", *circle(40)
    yield r"views = \[3\] at size = 96", *circle(3)
    yield "without a view", *circle(10, arc=200.0)
    yield "bin the detector 2 × 2", *(circle(19, 192)[0], Grid((96,) * 3, grid.voxel_size))
    yield "voxel size of 0.354 mm", geometry, Grid((96,) * 3, grid.voxel_size / 2)
    yield "every view sees", geometry, Grid((96, 120, 120), grid.voxel_size)
    yield "every view sees", Geometry.cone(angles, (50, shape[1]), pitch, 66.0, 199.0), grid
    yield "every view sees", *circle(10, axis_offset=30.0)


@pytest.mark.parametrize(("needed", "geometry", "grid"), unlike())
def test_what_is_outside_the_training_is_said_in_a_sentence(needed, geometry, grid):
    import re

    (sentence,) = outside_training(trained_on(), geometry, grid)
    assert re.search(needed, sentence), sentence
    assert re.fullmatch(r"[^\n]+[:,] [^\n]+\.", sentence)


def test_weights_that_tell_nothing_of_their_training_are_said_to():
    (sentence,) = outside_training({}, *circle())
    assert "do not say" in sentence
    assert outside_training({"data": {"scans": "mine"}}, *circle(3)) == []  # measured ones, maybe like this


def test_a_job_says_where_weights_do_not_suit_and_goes_on(scan, files):
    job = make_job(scan, files["ramp"], passes=1).model_copy(update={"options": ScanOptions(views=5)})
    _, messages = result_of(job)
    (notice,) = [m.text for m in messages if isinstance(m, Notice)]
    assert "train with [data] views = [5]" in notice


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_a_network_computes_in_bfloat16_where_the_machine_does(scan, files, monkeypatch, has_bfloat16):
    from napari_recon.reconstruction import unrolled

    monkeypatch.setattr(unrolled, "computes_in_bfloat16", lambda device: has_bfloat16)
    exact, _ = result_of(make_job(scan, files["ramp"], passes=1))
    auto, messages = result_of(make_job(scan, files["ramp"], passes=1, precision="auto"))
    asked, _ = result_of(make_job(scan, files["ramp"], passes=1, precision="bfloat16"))
    assert messages[-1].provenance["precision"] == ("bfloat16" if has_bfloat16 else "float32")
    np.testing.assert_array_equal(auto, asked if has_bfloat16 else exact)
    assert 0 < difference(asked, exact) < 1e-2


# -- memory --------------------------------------------------------------------------------------------------------


def test_the_plan_knows_the_networks_step(scan, files, tmp_path):
    def needed(weights=files["ramp"], shape=(64,) * 3, **parameters):
        job = make_job(scan, weights, **parameters).model_copy(update={"shape": shape})
        plan = plan_memory(job)
        assert sum(plan.items.values()) == plan.host_bytes
        return plan

    wide = tmp_path / "wide.safetensors"
    save_weights(UnrolledPGD(make_network("light", width=64, scales=1), 1), wide)
    at_once = needed(wide, patch=None)
    assert "patches" in at_once.items
    assert at_once.host_bytes > needed(wide, patch=32).host_bytes
    assert at_once.host_bytes > needed(files["ramp"], patch=None).host_bytes
    assert needed(operator="fit").host_bytes > needed().host_bytes
    assert needed(operator="fit", passes=1).host_bytes == needed(passes=1).host_bytes
    assert needed(shape=(128,) * 3).host_bytes > needed().host_bytes


def test_where_the_whole_volume_does_not_fit_patches_are_advised(scan, files, monkeypatch):
    monkeypatch.setattr("napari_recon.jobs.memory.available_memory", lambda: 100 * 10**6)
    plan = plan_memory(make_job(scan, files["post"], patch=None).model_copy(update={"shape": (80,) * 3}))
    assert not plan.fits
    assert "a patch of 48" in plan.sentence


MEASURE = """
import sys
from napari_recon.jobs import ReconstructionJob, run_job
from napari_recon.jobs.memory import peak_memory, plan_memory, release_memory, reset_peak
job = ReconstructionJob.model_validate_json(sys.argv[1])
list(run_job(job.model_copy(update={"shape": (16, 16, 16)})))  # libraries and kernels are no part of the plan
release_memory()
reset_peak()
before = peak_memory()
list(run_job(job))
print((peak_memory() - before) / plan_memory(job).host_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters",
    [
        {"passes": 1, "patch": 48},
        {"passes": 1, "patch": None},
        {"patch": 32},
        {"patch": 32, "operator": "fit"},
        {"weights": "post", "patch": 48},
    ],
)
def test_the_plan_is_what_it_takes(scan, files, tmp_path, parameters):
    file, network = tmp_path / "w.safetensors", make_network("light", scales=2)
    parameters = dict(parameters)
    post = parameters.pop("weights", None) == "post"
    save_weights(PostProcessing(network) if post else UnrolledPGD(network, 1), file)
    job = make_job(scan, file, **parameters).model_copy(update={"shape": (96,) * 3})
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}  # where no operator is kept yet
    environment |= {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}  # as of large volumes
    called = [sys.executable, "-c", MEASURE, job.model_dump_json()]
    taken = float(subprocess.check_output(called, text=True, env=environment))
    assert 0.55 < taken < 1.15


# -- the job as a value, and the command line ----------------------------------------------------------------------


def test_a_job_survives_json():
    job = make_job("somewhere", "mine.safetensors", iterations=4, passes=1)
    assert ReconstructionJob.model_validate_json(job.model_dump_json()) == job
    with pytest.raises(ValidationError):
        UnrolledParameters(passes=3)


def call(*arguments, status=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.stderr
    return json.loads(result.stdout), result.stderr


def reconstruct(scan, output, *more, **kwargs):
    return call("reconstruct", scan, "-o", output, "--method", "unrolled", "--device", "cpu", "--json", *more, **kwargs)


def test_the_command_line_runs_weights(scan, files, tmp_path, monkeypatch):
    shutil.copy(files["ramp"], tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    asked = ("--weights", "mine.safetensors", "--iterations", 1, "--operator", "exact", "--patch", 16)
    told, _ = reconstruct(scan, "v.tif", *asked)
    parameters = told["job"]["parameters"]
    assert parameters["weights"] == str(tmp_path / "mine.safetensors")  # found from anywhere
    assert parameters["iterations"] == 1
    assert parameters["operator"] == "exact"
    assert parameters["passes"] == 2  # an operator is for the second
    assert told["figures"]["psnr"] > 0
    expected, _ = result_of(ReconstructionJob.model_validate(told["job"] | {"output": None}))
    np.testing.assert_array_equal(read_volume(tmp_path / "v.tif").data, expected)


def test_the_command_line_warns_outside_the_training(scan, files, tmp_path):
    asked = ("--weights", files["ramp"], "--passes", 1, "--patch", 16, "--views", 5)
    _, said = reconstruct(scan, tmp_path / "v.tif", *asked)
    assert "train with [data] views = [5]" in said


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        (("--weights", "nothing"), "nothing"),
        (("--passes", 3), "--passes"),
        (("--regularization", 1e-3), "--regularization"),
    ],
)
def test_the_command_line_refuses_in_a_sentence(scan, files, tmp_path, asked, option):
    more = () if "--weights" in asked else ("--weights", files["ramp"])
    told, _ = reconstruct(scan, tmp_path / "v.tif", *more, *asked, status=2)
    assert option in told["error"]
    assert not list(tmp_path.glob("*.tif"))
