"""One parameter over some values."""

import numpy as np
import pytest
from pydantic import ValidationError

from napari_recon.jobs import Control, SweepJob, run_job
from napari_recon.jobs.job import FDKParameters, PADMMParameters, SIRTParameters
from napari_recon.jobs.memory import plan_memory
from napari_recon.jobs.messages import Cancelled, Failed, Finished, Progress, VolumeReady
from napari_recon.jobs.volumes import read_volume, write_volume
from napari_recon.learning.simulate import simulate
from napari_recon.measures.comparison import compare_volumes, field_of_view
from napari_recon.scans import Grid, open_scan

SIZE = 20


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate("walnut", tmp_path_factory.mktemp("scans") / "nut", size=SIZE, views=24, photons=3000, seed=1)


def run(job, control=None):
    control = control or Control()
    return list(run_job(job, control)), control.volumes


def test_each_value_has_its_volume_and_its_figures(scan):
    job = SweepJob(scan=scan, parameters=SIRTParameters(), values=(1, 4, 12), device="cpu")
    messages, volumes = run(job)
    end = messages[-1]
    assert isinstance(end, Finished), end
    names = ["iterations 1", "iterations 4", "iterations 12"]
    ready = [m for m in messages if isinstance(m, VolumeReady)]
    assert [m.name for m in ready] == names
    assert sorted(volumes) == sorted(names)
    whole = open_scan(scan).default_grid()
    assert ready[0].shape == tuple(-(-n // 2) for n in whole.shape)
    assert ready[0].scale == pytest.approx(tuple(2 * s for s in whole.scale))
    rows = end.provenance["sweep"]["rows"]
    assert [row["value"] for row in rows] == [1, 4, 12]
    assert rows[0]["residual"] > rows[1]["residual"] > rows[2]["residual"]
    assert end.figures["best"] == max(rows, key=lambda row: row["psnr"])["value"]  # the scan has a truth
    told = [m for m in messages if isinstance(m, Progress) and m.name == "sweep"]
    assert [m.figures for m in told] == rows
    assert SweepJob.model_validate(end.provenance["job"]) == job


def test_a_value_makes_what_its_own_job_makes(scan):
    job = SweepJob(scan=scan, parameters=FDKParameters(), parameter="views", values=(6, 24), device="cpu")
    _, volumes = run(job)
    grid = job.coarse_grid(open_scan(scan))
    for value in job.values:
        _, alone = run(job.part(value, grid))
        np.testing.assert_array_equal(volumes[f"views {value:g}"], alone["result"])
    assert job.part(6, grid).options.views == 6
    assert plan_memory(job).items["projections"] == plan_memory(job.part(24, grid)).items["projections"]


@pytest.mark.parametrize(("binning", "coarse"), [(1, (7, 12)), (2, (3, 6))])
def test_some_slices_are_what_their_own_jobs_make_of_them(scan, binning, coarse):
    """Slices that a coarser grid cuts through are in it whole."""
    grid = open_scan(scan).default_grid()
    values = {"parameter": "iterations", "values": (1, 3), "slices": (7, 12), "binning": binning}
    job = SweepJob(
        scan=scan, parameters=SIRTParameters(), shape=grid.shape, voxel_size=grid.voxel_size, device="cpu", **values
    )
    messages, volumes = run(job)
    whole = job.coarse_grid(open_scan(scan))
    assert job.part(3, whole).slices == coarse
    _, alone = run(job.part(3, whole))
    np.testing.assert_array_equal(volumes["iterations 3"], alone["result"])
    ready = next(m for m in messages if isinstance(m, VolumeReady))
    first, stop = coarse
    assert ready.shape[0] == stop - first
    assert ready.translate[0] == pytest.approx(whole.translate[0] + first * whole.scale[0])
    assert "psnr" in messages[-1].provenance["sweep"]["rows"][0]


def test_results_are_compared_with_a_reference_on_their_grid(scan, tmp_path):
    grid = open_scan(scan).default_grid()
    rng = np.random.default_rng(0)
    write_volume(tmp_path / "reference.tif", rng.random(grid.shape, np.float32), Grid(grid.shape, grid.voxel_size))
    reference = tmp_path / "reference.tif"
    job = SweepJob(scan=scan, parameters=SIRTParameters(), values=(1, 2), reference=reference, binning=1, device="cpu")
    messages, volumes = run(job)
    found = compare_volumes(volumes["iterations 2"], read_volume(reference).data, field_of_view(grid))
    assert messages[-1].provenance["sweep"]["rows"][1]["psnr"] == found["psnr"]


def test_finish_keeps_the_values_that_are_done_and_cancel_none(scan):
    job = SweepJob(scan=scan, parameters=SIRTParameters(), values=(2, 9, 10), device="cpu")
    for stop in ("finish", "cancel"):
        control, messages = Control(), []
        for message in run_job(job, control):
            messages.append(message)
            if isinstance(message, Progress) and (message.name, message.step) == ("iterations 9", 3):
                getattr(control, stop)()
        if stop == "finish":
            assert not messages[-1].complete
            assert [row["value"] for row in messages[-1].provenance["sweep"]["rows"]] == [2]
        else:
            assert isinstance(messages[-1], Cancelled)
            assert not control.volumes


def test_what_cannot_be_swept_is_said(scan):
    for wrong in (
        {"values": (1,)},
        {"values": (2, 2)},
        {"values": (1.5, 2)},
        {"values": (0, 2)},
        {"parameter": "rho", "values": (1, 2)},
        {"parameter": "views", "values": (0, 2)},
        {"values": (1, 2), "slices": (0, 4)},
        {"values": (1, 2), "slices": (4, 40), "shape": (20, 20, 20), "voxel_size": 1.0},
    ):
        with pytest.raises(ValidationError):
            SweepJob(scan=scan, parameters=SIRTParameters(), **wrong)
    messages, _ = run(SweepJob(scan=scan, parameters=PADMMParameters(start="last"), values=(1, 2), device="cpu"))
    assert isinstance(messages[-1], Failed)
    assert "another start" in messages[-1].text
    messages, _ = run(SweepJob(scan=scan, parameters=FDKParameters(), parameter="views", values=(8, 99), device="cpu"))
    assert messages[-1].kind == "input"
    assert "99" in messages[-1].text
    assert not any(isinstance(m, VolumeReady) for m in messages)
