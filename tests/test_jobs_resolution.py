"""What a method resolves, told from both halves of the views."""

import math

import numpy as np
import pytest

from napari_recon.jobs import Control, ReconstructionJob, ResolutionJob, run_job
from napari_recon.jobs.job import FDKParameters, PADMMParameters, SIRTParameters, TVParameters
from napari_recon.jobs.memory import plan_memory
from napari_recon.jobs.messages import Cancelled, Failed, Finished, Notice, Progress, Stage, VolumeReady
from napari_recon.jobs.volumes import write_volume
from napari_recon.learning.simulate import simulate
from napari_recon.learning.simulate_mri import write_mri
from napari_recon.scans import Grid, ScanError, ScanOptions, open_scan

SIZE = 20


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate("walnut", tmp_path_factory.mktemp("scans") / "nut", size=SIZE, views=41, photons=3000, seed=1)


def run(scan, control=None, **fields):
    control = control or Control()
    return list(run_job(ResolutionJob(scan=scan, device="cpu", **fields), control)), control.volumes


@pytest.mark.parametrize(
    "parameters",
    [
        FDKParameters(),
        SIRTParameters(iterations=3),
        TVParameters(iterations=2, passes=1, operator="exact", patch=16),
        PADMMParameters(start="fdk", iterations=2),
    ],
    ids=lambda p: p.method,
)
def test_the_halves_are_the_reconstructions_of_every_second_view(scan, parameters):
    options = ScanOptions(views=25)
    messages, volumes = run(scan, parameters=parameters, options=options)
    end = messages[-1]
    assert isinstance(end, Finished), end
    assert [m.name for m in messages if isinstance(m, VolumeReady)] == ["first half", "second half"]
    assert {m.name for m in messages if isinstance(m, Progress)} <= {"first half", "second half"}
    assert sorted(volumes) == ["first half", "second half"]
    # Each is what the job of the half makes by itself, to the last bit.
    whole = open_scan(scan, options)
    control = Control()
    job = ReconstructionJob(
        scan=scan, device="cpu", parameters=parameters, options=ScanOptions(views=25, half="odd")
    ).model_copy(update={"shape": whole.default_grid().shape, "voxel_size": whole.default_grid().voxel_size})
    assert isinstance(list(run_job(job, control))[-1], Finished)
    np.testing.assert_array_equal(volumes["second half"], control.volumes["result"])
    assert {"resolution_half_bit", "resolution_one_seventh", "noise", "residual_first"} <= end.figures.keys()
    assert end.figures["noise"] > 0
    told = end.provenance["resolution"]
    assert told["sentence"].startswith("Resolution: ")
    assert len(told["frequency"]) == len(told["correlation"]) == len(told["half_bit"]) > 4
    assert told["correlation"][0] > 0.9  # what is largest in the object is in both
    assert ResolutionJob.model_validate(end.provenance["job"]).parameters == parameters


def test_noise_takes_resolution_away(scan, tmp_path):
    noisy = simulate("walnut", tmp_path / "noisy", size=SIZE, views=41, photons=40, seed=1)

    def finest(path):
        figures = run(path, parameters=FDKParameters())[0][-1].figures
        return [figures["resolution_one_seventh"], figures["noise"]]

    (clear, little), (blurred, much) = finest(scan), finest(noisy)
    assert much > 2 * little
    assert math.isnan(clear) or blurred > clear


def test_finish_and_cancel_are_heard_in_either_half(scan):
    job = ResolutionJob(scan=scan, parameters=SIRTParameters(iterations=6), device="cpu")
    for stop, ended in (("finish", Failed), ("cancel", Cancelled)):
        for half in ("first half", "second half"):
            control = Control()
            messages = []
            for message in run_job(job, control):
                messages.append(message)
                if isinstance(message, Progress) and (message.name, message.step) == (half, 2):
                    getattr(control, stop)()
            assert isinstance(messages[-1], ended)
            assert max(m.step for m in messages if isinstance(m, Progress) and m.name == half) == 2
    assert not control.volumes


def test_what_has_no_halves_is_said(scan, tmp_path):
    def sentence(**fields):
        messages, _ = run(scan, **fields)
        assert isinstance(messages[-1], Failed)
        assert messages[-1].kind == "input"
        return messages[-1].text

    assert "leaves no halves" in sentence(options=ScanOptions(half="odd"))
    assert "no halves" in sentence(options=ScanOptions(views=1), parameters=FDKParameters())
    assert "another start" in sentence(parameters=PADMMParameters(start="last"))
    mri = write_mri("head", tmp_path / "head", size=16, coils=2, acceleration=2)
    with pytest.raises(ScanError, match="k-space"):
        ResolutionJob(scan=mri, parameters=PADMMParameters()).open_scan()


def test_a_start_that_both_halves_share_is_said(scan, tmp_path):
    grid = open_scan(scan).default_grid()
    write_volume(tmp_path / "start.tif", np.zeros(grid.shape, np.float32), Grid(grid.shape, grid.voxel_size))
    parameters = PADMMParameters(start=str(tmp_path / "start.tif"), iterations=1)
    messages, _ = run(scan, parameters=parameters)
    assert isinstance(messages[-1], Finished)
    assert sum("begin at the same volume" in m.text for m in messages if isinstance(m, Notice)) == 1


def test_stages_say_which_half_and_memory_is_that_of_a_half(scan):
    job = ResolutionJob(scan=scan, parameters=SIRTParameters(iterations=1), device="cpu")
    stages = [m for m in run_job(job) if isinstance(m, Stage)]
    assert [m.name for m in stages].count("fdk") == 2
    assert stages[-1].name == "measuring"
    assert all(m.detail.startswith(("first half", "second half")) for m in stages[:-1])
    whole = ReconstructionJob(scan=scan, parameters=job.parameters, device="cpu")
    plan, of_all = plan_memory(job), plan_memory(whole)
    assert plan.items["projections"] < 0.6 * of_all.items["projections"]
    assert plan.fits
