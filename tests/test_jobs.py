"""A job: its messages, its control, its memory, and the volumes that it writes."""

import errno
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tifffile
from pydantic import ValidationError

from napari_recon.jobs import Control, ReconstructionJob, run_job
from napari_recon.jobs.job import FDKParameters, PADMMParameters, SIRTParameters, TVParameters
from napari_recon.jobs.memory import _cgroups_free, plan_memory, readable
from napari_recon.jobs.messages import Cancelled, Failed, Finished, Notice, Progress, Stage, VolumeReady
from napari_recon.jobs.stages import Prepared
from napari_recon.jobs.volumes import check_output, read_volume, write_volume
from napari_recon.learning.simulate import simulate
from napari_recon.scans import Grid, ScanError

SIZE = 24


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate("shepp-logan", tmp_path_factory.mktemp("scans") / "phantom", size=SIZE, views=30, seed=1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An operator cache of the test's own."""
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


def make_job(scan, parameters, **fields):
    return ReconstructionJob(scan=scan, parameters=parameters, device="cpu", **fields)


TV = TVParameters(iterations=3, patch=16)
ALL = [
    FDKParameters(),
    SIRTParameters(iterations=3),
    TVParameters(iterations=3, patch=None),
    TV,
    TVParameters(iterations=2, patch=16, operator="exact"),
    PADMMParameters(iterations=3, start="fdk"),
]


# -- the job as a value --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ALL, ids=lambda p: p.method)
def test_a_job_survives_json(parameters):
    job = make_job("somewhere", parameters, shape=(4, 5, 6), output="out.tif")
    assert ReconstructionJob.model_validate_json(job.model_dump_json()) == job


def test_a_job_is_frozen_and_refuses_unknown_fields():
    job = make_job("somewhere", TV)
    with pytest.raises(ValidationError):
        job.device = "cuda"
    with pytest.raises(ValidationError):
        ReconstructionJob(scan="somewhere", colour="red")


def test_making_jobs_does_not_cost_torch_or_qt():
    code = "import sys, napari_recon.jobs, napari_recon.jobs.worker, napari_recon.cli\n"
    code += "print([m for m in ('torch', 'qtpy', 'napari', 'deepinv') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# -- the stream of messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ALL, ids=lambda p: f"{p.method}-{getattr(p, 'patch', '')}")
def test_every_method_tells_its_story_in_order(scan, parameters):
    control = Control()
    messages = list(run_job(make_job(scan, parameters), control))
    finished = messages[-1]
    assert isinstance(finished, Finished), finished
    assert finished.complete
    assert sum(isinstance(m, Finished | Failed | Cancelled) for m in messages) == 1
    stages = [m.name for m in messages if isinstance(m, Stage)]
    assert stages[:2] == ["reading", "fdk"]
    ready = [m.name for m in messages if isinstance(m, VolumeReady)]
    assert ready == (["fdk"] if parameters.method == "fdk" else ["fdk", "result"])
    grid = finished.provenance and read_grid(scan)
    for message in messages:
        if isinstance(message, VolumeReady):
            assert message.shape == control.volumes[message.name].shape == grid.shape
            assert message.scale == pytest.approx((grid.voxel_size,) * 3)
            assert message.translate == pytest.approx(grid.translate)
    steps = [m for m in messages if isinstance(m, Progress) and m.name == "result"]
    assert [m.step for m in steps] == list(range(1, len(steps) + 1))
    assert all(0 <= s.start < s.stop <= n for m in steps for s, n in zip(m.box, grid.shape, strict=True))
    if steps:
        assert steps[-1].step == steps[-1].total
        assert steps[-1].remaining == pytest.approx(0)
        assert len(steps) > 1
    assert finished.figures["residual"] < 0.5
    assert finished.figures["data_range"] > 0
    assert finished.seconds > 0
    assert finished.peak_memory > 2**20
    assert np.isfinite(control.volumes["result"]).all()


def read_grid(scan):
    from napari_recon.scans import open_scan

    return open_scan(scan).default_grid()


def test_volumes_grow_in_place_and_only_in_the_boxes_that_are_told(scan):
    control, before = Control(), None
    for message in run_job(make_job(scan, TV), control):
        if isinstance(message, VolumeReady) and message.name == "result":
            array = control.volumes["result"]
            np.testing.assert_array_equal(array, control.volumes["fdk"])  # the start
            before = array.copy()
        elif isinstance(message, Progress) and message.name == "result":
            assert control.volumes["result"] is array
            outside = np.ones(array.shape, bool)
            outside[message.box] = False
            np.testing.assert_array_equal(array[outside], before[outside])
            before = array.copy()


def test_iterations_beat_fdk(scan):
    def psnr(parameters):
        return list(run_job(make_job(scan, parameters)))[-1].figures["psnr"]

    assert psnr(TVParameters(iterations=10, patch=16)) > psnr(FDKParameters()) + 1


def test_the_layer_tells_how_it_was_made_and_can_be_made_again(scan):
    job = make_job(scan, SIRTParameters(iterations=2))
    control = Control()
    finished = list(run_job(job, control))[-1]
    again = ReconstructionJob.model_validate(finished.provenance["job"])
    assert again == job
    other = Control()
    list(run_job(again, other))
    np.testing.assert_array_equal(control.volumes["result"], other.volumes["result"])


# -- control -------------------------------------------------------------------------------------------------------


def run_until(stream, wanted):
    for message in stream:
        if wanted(message):
            return message
    raise AssertionError("the job ended first")


def is_step(number):
    return lambda m: isinstance(m, Progress) and m.name == "result" and m.step == number


def test_finish_keeps_what_there_is_and_writes_it(scan, tmp_path):
    control = Control()
    stream = run_job(make_job(scan, SIRTParameters(iterations=500), output=tmp_path / "x.tif"), control)
    run_until(stream, is_step(2))
    control.finish()
    rest = list(stream)
    assert not any(isinstance(m, Progress) for m in rest)
    assert isinstance(rest[-1], Finished)
    assert not rest[-1].complete
    np.testing.assert_array_equal(read_volume(tmp_path / "x.tif").data, control.volumes["result"])
    assert read_volume(tmp_path / "x.tif").provenance["complete"] is False


def test_finish_before_the_method_began_keeps_fdk(scan):
    control = Control()
    stream = run_job(make_job(scan, TV), control)
    run_until(stream, lambda m: isinstance(m, VolumeReady))
    control.finish()
    finished = list(stream)[-1]
    assert isinstance(finished, Finished)
    assert not finished.complete
    np.testing.assert_array_equal(control.volumes["result"], control.volumes["fdk"])


@pytest.mark.parametrize("stage", ["fdk", "fitting the normal operator", "reconstructing", "writing"])
def test_cancel_leaves_nothing(scan, tmp_path, stage):
    control, prepared = Control(), Prepared()
    stream = run_job(make_job(scan, TV, output=tmp_path / "x.tif"), control, prepared)
    run_until(stream, lambda m: isinstance(m, Stage) and m.name == stage)
    control.cancel()
    assert isinstance(list(stream)[-1], Cancelled)
    assert not control.volumes
    assert not prepared.things
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


def test_pause_holds_the_job_and_its_clock_between_steps(scan):
    control = Control()
    stream = run_job(make_job(scan, SIRTParameters(iterations=6)), control)
    first = run_until(stream, is_step(1))
    control.pause()
    threading.Timer(0.5, control.resume).start()
    second = next(stream)
    assert second.step == 2
    assert second.seconds - first.seconds < 0.4
    assert isinstance(list(stream)[-1], Finished)


def test_cancel_answers_during_a_pause(scan):
    control = Control()
    stream = run_job(make_job(scan, SIRTParameters(iterations=6)), control)
    run_until(stream, is_step(1))
    control.pause()
    threading.Timer(0.1, control.cancel).start()
    assert isinstance(list(stream)[-1], Cancelled)


def test_focus_steers_the_order_of_patches_while_it_runs(scan):
    control = Control()
    corner = (float(SIZE - 1),) * 3
    stream = run_job(make_job(scan, TVParameters(iterations=1, patch=8)), control)
    run_until(stream, is_step(1))
    control.focus(corner)
    next(stream)  # its box was chosen before
    box = next(stream).box
    n = control.volumes["result"].shape
    assert all(s.stop == size for s, size in zip(box, n, strict=True))


def test_dropping_the_stream_writes_nothing(scan, tmp_path):
    stream = run_job(make_job(scan, SIRTParameters(iterations=50), output=tmp_path / "x.tif"))
    run_until(stream, is_step(1))
    stream.close()
    assert not (tmp_path / "x.tif").exists()


# -- what a job leaves for the next --------------------------------------------------------------------------------


def fits(messages):
    return sum(isinstance(m, Stage) and m.name == "fitting the normal operator" for m in messages)


def test_the_operator_is_fitted_once_for_a_scan_and_grid(scan, cache):
    first = list(run_job(make_job(scan, TV)))
    assert fits(first) > 1
    assert len(list(cache.rglob("*.safetensors"))) == 1
    assert fits(run_job(make_job(scan, TVParameters(iterations=1, patch=12)))) == 0  # from the disk
    assert fits(run_job(make_job(scan, TV, options={"views": 15}))) > 1  # another scan


def test_a_damaged_operator_on_disk_is_fitted_again(scan, cache):
    list(run_job(make_job(scan, TV)))
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    messages = list(run_job(make_job(scan, TV)))
    assert isinstance(messages[-1], Finished)
    assert fits(messages) > 1


def test_the_next_job_on_the_same_scan_reads_nothing(scan, monkeypatch):
    from napari_recon.scans import Scan

    prepared, parameters = Prepared(), SIRTParameters(iterations=1)
    list(run_job(make_job(scan, parameters), prepared=prepared))
    monkeypatch.setattr(Scan, "corrected_chunks", lambda *_: pytest.fail("read again"))
    assert isinstance(list(run_job(make_job(scan, FDKParameters()), prepared=prepared))[-1], Finished)


def test_a_scan_that_changed_on_disk_is_read_again(scan, tmp_path):
    import shutil

    own, prepared, parameters = tmp_path / "scan", Prepared(), FDKParameters()
    shutil.copytree(scan, own)
    before, after = Control(), Control()
    list(run_job(make_job(own, parameters), before, prepared))
    image = tifffile.imread(own / "scan_000004.tif")
    tifffile.imwrite(own / "scan_000004.tif", image // 2)
    list(run_job(make_job(own, parameters), after, prepared))
    assert (before.volumes["fdk"] != after.volumes["fdk"]).any()


# -- what goes wrong -----------------------------------------------------------------------------------------------


def sentence(message):
    assert isinstance(message, Failed), message
    assert message.text.endswith(".")
    assert "\n" not in message.text
    return message


def test_a_volume_that_does_not_fit_is_refused_before_anything_is_allocated(scan, monkeypatch):
    monkeypatch.setattr(Control, "allocate", lambda *_: pytest.fail("allocated"))
    failed = sentence(list(run_job(make_job(scan, TV, shape=(20_000,) * 3)))[-1])
    assert failed.kind == "input"
    assert "voxel size of at least" in failed.text


def test_bad_input_is_one_sentence(tmp_path, scan):
    assert sentence(list(run_job(make_job(tmp_path / "nothing", TV)))[-1]).kind == "input"
    job = ReconstructionJob(scan=scan, device="abacus")
    assert "abacus" in sentence(list(run_job(job))[-1]).text


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_a_queue_count_and_files_kept_in_memory_do_not(tmp_path, version):
    said, names = {
        1: ("4:memory:/queue/job_7\n2:cpu:/\n", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_{}_file")),
        2: ("0::/queue/job_7\n", ("memory.max", "memory.current", "{}_file")),
    }[version]
    (tmp_path / "said").write_text(said)
    root = tmp_path / "groups"
    job = root / ("memory" if version == 1 else "") / "queue" / "job_7"
    job.mkdir(parents=True)
    limit, used, cached = names
    assert _cgroups_free(root, tmp_path / "said") == []  # none is seen
    (job / limit).write_text("4000\n")
    (job / used).write_text("3500\n")
    assert _cgroups_free(root, tmp_path / "said") == [500]
    (job / "memory.stat").write_text(f"{cached.format('active')} 1000\n{cached.format('inactive')} 2000\nother 5\n")
    (job.parent / limit).write_text("max\n")
    (job.parent / used).write_text("9000\n")
    assert _cgroups_free(root, tmp_path / "said") == [3500]
    assert _cgroups_free(root, tmp_path / "nothing") == []


def test_out_of_memory_halves_the_patch_once_and_goes_on(scan, monkeypatch):
    import torch

    from napari_recon.reconstruction import PartitionedReconstructor

    whole_stream, patches = PartitionedReconstructor.stream, []

    def stream(self, *args, **options):
        updates = whole_stream(self, *args, **options)
        patches.append(self)
        yield next(updates)
        yield next(updates)
        if len(patches) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        yield from updates

    monkeypatch.setattr(PartitionedReconstructor, "stream", stream)
    messages = list(run_job(make_job(scan, TVParameters(iterations=1, patch=32))))
    assert isinstance(messages[-1], Finished)
    assert any(isinstance(m, Notice) and "halved to 16" in m.text for m in messages)
    assert len(patches) == 2


@pytest.mark.parametrize("error", [MemoryError(), "CUDA out of memory. Tried to allocate 20 GiB"])
def test_out_of_memory_halves_the_batches_of_views_and_tells_once(scan, monkeypatch, error):
    import torch

    from napari_recon.physics.projectors import NumbaProjector

    job = make_job(scan, TVParameters(iterations=3, patch=None))
    expected = Control()
    list(run_job(job, expected))
    back = NumbaProjector.adjoint

    def adjoint(self, projections, out=None):
        if out is not None and projections.shape[1] > 9:  # of 30 views, and once something was added
            out += 1
            raise torch.OutOfMemoryError(error) if isinstance(error, str) else error
        return back(self, projections, out)

    monkeypatch.setattr(NumbaProjector, "adjoint", adjoint)
    control = Control()
    messages = list(run_job(job, control))
    assert isinstance(messages[-1], Finished)
    assert sum(isinstance(m, Notice) and "views are now taken" in m.text for m in messages) == 1
    np.testing.assert_allclose(control.volumes["result"], expected.volumes["result"], atol=1e-5)


def test_out_of_memory_without_a_remedy_is_told(scan, monkeypatch):
    from napari_recon.reconstruction import SIRT

    def stream(self, *args, **options):
        raise MemoryError
        yield

    monkeypatch.setattr(SIRT, "stream", stream)
    control = Control()
    failed = sentence(list(run_job(make_job(scan, SIRTParameters()), control))[-1])
    assert failed.kind == "memory"
    assert "voxel size" in failed.text
    assert control.volumes["fdk"].any()  # kept


def test_a_bug_is_one_sentence_with_its_traceback_apart(scan, monkeypatch):
    from napari_recon.scans import Scan

    monkeypatch.setattr(Scan, "measurements", lambda *_: 1 / 0)
    failed = sentence(list(run_job(make_job(scan, TV)))[-1])
    assert failed.kind == "bug"
    assert "Traceback" in failed.detail


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ALL, ids=lambda p: p.method)
def test_a_plan_grows_with_the_volume_and_shrinks_with_views(scan, parameters):
    def needed(**fields):
        return plan_memory(make_job(scan, parameters, **fields)).host_bytes

    assert needed(shape=(32,) * 3) < needed(shape=(64,) * 3) < needed(shape=(128,) * 3)
    assert needed(options={"views": 10}) < needed()
    plan = plan_memory(make_job(scan, parameters))
    assert plan.fits
    assert plan.device_bytes == 0
    assert sum(plan.items.values()) == plan.host_bytes
    assert readable(plan.host_bytes) in plan.sentence


MEASURE = """
import sys
from napari_recon.jobs import ReconstructionJob, run_job
from napari_recon.jobs.memory import peak_memory, plan_memory, release_memory, reset_peak
job = ReconstructionJob.model_validate_json(sys.argv[1])
list(run_job(job.model_copy(update={"shape": (8, 8, 8)})))  # libraries and kernels are no part of the plan
release_memory()
reset_peak()
before = peak_memory()
list(run_job(job))
print((peak_memory() - before) / plan_memory(job).host_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ALL, ids=lambda p: f"{p.method}-{getattr(p, 'patch', '')}")
def test_the_plan_is_what_it_takes(scan, parameters, tmp_path):
    if getattr(parameters, "patch", None):
        parameters = parameters.model_copy(update={"patch": 48})
    job = make_job(scan, parameters, shape=(96,) * 3)
    # As large blocks do, small ones go back to the system when they are freed: what is resident is what is used.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}  # where no operator is kept yet
    called = [sys.executable, "-c", MEASURE, job.model_dump_json()]
    taken = float(subprocess.check_output(called, text=True, env=environment))
    assert 0.8 < taken < 1.15


def test_following_the_plans_advice_makes_it_fit(scan, monkeypatch):
    monkeypatch.setattr("napari_recon.jobs.memory.available_memory", lambda: 2 * 10**9)
    job = make_job(scan, TV, voxel_size=0.02)
    plan = plan_memory(job)
    assert not plan.fits
    advised = float(plan.sentence.split("voxel size of at least ")[1].split(" mm")[0])
    assert plan_memory(make_job(scan, TV, voxel_size=advised)).fits


def test_planning_reads_no_frames(scan, monkeypatch):
    from napari_recon.scans.recording import Frames

    monkeypatch.setattr(Frames, "__getitem__", lambda *_: pytest.fail("read"))
    assert plan_memory(make_job(scan, TV)).fits


# -- volumes on disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v.tif", "v.tiff", "v.ome.zarr"])
@pytest.mark.parametrize("shape", [(5, 140, 6), (1, 9, 7)])
def test_a_volume_comes_back_as_it_was(tmp_path, name, shape):
    data = np.random.default_rng(0).normal(0.02, 1, shape).astype(np.float32)
    grid = Grid(shape, 0.137, (1.5, -2.0, 40.0))
    made_by = {"job": {"scan": "Wörk µ", "seed": 3}}
    for _ in range(2):  # the second time over the first
        write_volume(tmp_path / name, data, grid, made_by)
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.data, data)
    assert volume.data.dtype == np.float32
    assert volume.voxel_size == pytest.approx(0.137)
    assert volume.center == pytest.approx(grid.center)
    assert volume.grid.translate == pytest.approx(grid.translate)
    assert volume.provenance == made_by
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_large_volumes_become_ome_tiff(tmp_path, monkeypatch):
    monkeypatch.setattr("napari_recon.jobs.volumes._IMAGEJ_LIMIT", 100)
    data, grid = np.ones((3, 4, 5), np.float32), Grid((3, 4, 5), 0.2, (1, 2, 3))
    write_volume(tmp_path / "v.tif", data, grid, {"job": {}})
    volume = read_volume(tmp_path / "v.tif")
    assert volume.voxel_size == pytest.approx(0.2)
    assert volume.center == pytest.approx((1, 2, 3))
    with tifffile.TiffFile(tmp_path / "v.tif") as file:
        assert file.is_ome
        assert file.is_bigtiff


def test_other_programs_see_the_voxel_size(tmp_path):
    import zarr

    data, grid = np.ones((130, 4, 5), np.float32), Grid((130, 4, 5), 0.25)
    write_volume(tmp_path / "v.tif", data, grid)
    write_volume(tmp_path / "v.ome.zarr", data, grid)
    with tifffile.TiffFile(tmp_path / "v.tif") as file:
        assert file.imagej_metadata["spacing"] == 0.25
        assert file.imagej_metadata["unit"] == "mm"
        assert file.series[0].axes == "ZYX"
    (scales,) = zarr.open_group(str(tmp_path / "v.ome.zarr"), mode="r").attrs["ome"]["multiscales"]
    assert [axis["unit"] for axis in scales["axes"]] == ["millimeter"] * 3
    sizes = [level["coordinateTransformations"][0]["scale"][0] for level in scales["datasets"]]
    assert sizes == [0.25, 0.5]


@pytest.mark.parametrize(("name", "writer"), [("v.tif", "_write_tiff"), ("v.ome.zarr", "_write_zarr")])
def test_a_full_disk_leaves_the_old_volume_and_nothing_else(tmp_path, monkeypatch, name, writer):
    from napari_recon.jobs import volumes

    grid, old = Grid((2, 3, 4), 1.0), np.ones((2, 3, 4), np.float32)
    write_volume(tmp_path / name, old, grid)
    write = getattr(volumes, writer)

    def half(*args):
        write(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(volumes, writer, half)
    with pytest.raises(ScanError, match="No space left"):
        write_volume(tmp_path / name, 2 * old, grid)
    monkeypatch.undo()
    np.testing.assert_array_equal(read_volume(tmp_path / name).data, old)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_outputs_that_will_not_do_are_refused_at_once(tmp_path):
    (tmp_path / "folder.ome.zarr").mkdir()
    (tmp_path / "folder.ome.zarr" / "thesis.txt").write_text("mine")
    (tmp_path / "folder.tif").mkdir()
    for name in ("x.png", ".tif", "nowhere/x.tif", "folder.ome.zarr", "folder.tif"):
        with pytest.raises(ScanError, match=r"\.$"):
            check_output(tmp_path / name)
    assert (tmp_path / "folder.ome.zarr" / "thesis.txt").read_text() == "mine"


def test_damaged_and_foreign_volumes_are_told(tmp_path):
    write_volume(tmp_path / "v.tif", np.ones((9, 9, 9), np.float32), Grid((9, 9, 9), 1.0))
    (tmp_path / "short.tif").write_bytes((tmp_path / "v.tif").read_bytes()[:2000])
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.ome.zarr").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("missing.tif", "short.tif", "notes.txt", "empty.ome.zarr", "empty"):
        with pytest.raises(ScanError, match=name):
            read_volume(tmp_path / name)


def test_a_folder_of_slices_is_a_volume(tmp_path):
    data = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    for k, plane in enumerate(data):
        tifffile.imwrite(tmp_path / f"slice_{k:03d}.tif", plane)
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.data, data)
    assert volume.voxel_size is None
