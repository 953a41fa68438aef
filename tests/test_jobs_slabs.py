"""Reconstructions of some slices, and slab by slab into a file: as the whole, readable meanwhile, and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from napari_recon.jobs import Control, ReconstructionJob, memory, run_job
from napari_recon.jobs.job import (
    FDKParameters,
    PADMMParameters,
    SIRTParameters,
    TVParameters,
    UnrolledParameters,
)
from napari_recon.jobs.memory import plan_memory
from napari_recon.jobs.messages import Cancelled, Failed, Finished, Notice, Progress, VolumeReady
from napari_recon.jobs.provenance import command_line, python_code
from napari_recon.jobs.slabs import SlabsRun, work_folder
from napari_recon.jobs.stages import Prepared
from napari_recon.jobs.volumes import ZarrVolume, read_volume, slab_step
from napari_recon.learning.networks import make_network
from napari_recon.learning.simulate import simulate
from napari_recon.learning.weights import read_header
from napari_recon.reconstruction.unrolled import UnrolledPGD
from napari_recon.scans import Grid, open_scan, slabs

SIZE = 24
TV = TVParameters(iterations=12, patch=None)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate("walnut", tmp_path_factory.mktemp("scans") / "phantom", size=SIZE, views=16, seed=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An untrained network after a few TV steps."""
    import torch

    from napari_recon.learning.networks import save_weights

    torch.manual_seed(0)
    network = make_network("light", width=4, scales=2)
    model = UnrolledPGD(network, 1, data_steps=2, step_size=1.0, init="tv")
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(model, file, card="", training={})
    assert read_header(file)
    return str(file)


def job(scan, parameters, **fields):
    return ReconstructionJob(scan=scan, parameters=parameters, device="cpu", **fields)


def run(what, control=None):
    messages = list(run_job(what, control or Control()))
    assert isinstance(messages[-1], Finished), messages[-1]
    return messages


def notices(messages):
    return [m.text for m in messages if isinstance(m, Notice)]


def finished(messages):
    """The slices that were finished, in order."""
    return [(m.box[0].start, m.box[0].stop) for m in messages if is_finished(m)]


def is_finished(message, number=None):
    """Whether it tells of a slab, or that one, that it is finished."""
    if not (isinstance(message, Progress) and message.name == "slabs" and message.step % 100 == 0):
        return False
    return number is None or message.step == 100 * number


def whole(scan, parameters):
    control = Control()
    run(job(scan, parameters), control)
    return control.volumes["result"]


# -- some slices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [FDKParameters(), TV], ids=lambda p: p.method)
def test_slices_come_out_as_in_the_whole_at_their_place(scan, parameters, tmp_path):
    control = Control()
    messages = run(job(scan, parameters, slices=(15, 19), output=tmp_path / "some.tif"), control)
    result, expected = control.volumes["result"], whole(scan, parameters)
    grid = open_scan(scan).default_grid()
    assert {v.shape for v in control.volumes.values()} == {(4, *grid.shape[1:])}
    tolerance = 1e-5 if parameters.method == "fdk" else 0.02
    assert np.abs(result - expected[15:19]).max() <= tolerance * expected.max()
    for message in messages:
        if isinstance(message, VolumeReady):
            assert message.translate[0] == pytest.approx(grid.translate[0] + 15 * grid.voxel_size)
        if isinstance(message, Progress):
            assert 0 <= message.box[0].start < message.box[0].stop <= 4
    written = read_volume(tmp_path / "some.tif")
    np.testing.assert_array_equal(written.data, result)
    assert written.grid.translate == pytest.approx((grid.translate[0] + 15 * grid.voxel_size, *grid.translate[1:]))
    assert written.provenance["job"]["slices"] == [15, 19]


def test_what_slices_need_and_how_they_are_said(scan, tmp_path):
    some = job(scan, TV, slices=(0, 2), output=tmp_path / "v.tif")
    big = {"shape": (400, 80, 80), "voxel_size": 0.02}
    part = plan_memory(some.model_copy(update=big)).host_bytes
    assert part < plan_memory(job(scan, TV, **big)).host_bytes / 2
    assert "--slices 0 2" in command_line(some)
    assert "slices=(0, 2)" in python_code(some)
    assert "--slab 8" in command_line(job(scan, TV, slab=8, output=tmp_path / "v.ome.zarr"))
    assert "--slab none" in command_line(job(scan, TV, slab=None))
    assert "--slab" not in command_line(job(scan, TV))
    last = list(run_job(job(scan, TV, slices=(20, 40))))[-1]
    assert isinstance(last, Failed)
    assert re.search("slices 0 to 23, and those from 20", last.text)


# -- slab by slab --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fdk", "sirt", "tv", "padmm", "unrolled"])
def test_slabs_make_the_same_volume_without_seams(scan, weights, method, tmp_path):
    parameters = {
        "fdk": FDKParameters(window="hann"),
        "sirt": SIRTParameters(iterations=5),
        "tv": TV,
        "padmm": PADMMParameters(iterations=6, start="fdk"),
        "unrolled": UnrolledParameters(weights=weights, patch=None),
    }[method]
    output = tmp_path / "v.ome.zarr"
    control = Control()
    messages = run(job(scan, parameters, slab=6, output=output), control)
    expected, found = whole(scan, parameters), read_volume(output)
    error = (found.data - expected) / expected.max()
    exact = method in ("fdk", "sirt")
    assert np.sqrt(np.mean(error**2)) < (1e-6 if exact else 2e-3)
    jumps = np.sqrt(np.mean(np.diff(error, axis=0) ** 2, axis=(1, 2)))
    at_seams = np.arange(1, 4) * 6 - 1
    assert jumps[at_seams].max() <= 2 * np.delete(jumps, at_seams).max() + 1e-6
    assert "in 4 slabs of 6 slices" in notices(messages)[0]
    assert finished(messages) == [(0, 6), (6, 12), (12, 18), (18, 24)]
    assert not control.volumes  # there is no room for one
    assert not work_folder(output).exists()
    assert found.provenance["complete"]
    assert messages[-1].figures["residual"] < 0.5
    assert found.grid == open_scan(scan).default_grid()


@pytest.mark.parametrize("method", ["sirt", "tv", "padmm", "unrolled"])
def test_what_lies_beyond_a_margin_is_held(scan, weights, method, tmp_path, monkeypatch):
    """With margins far thinner than the volume, so that most of what rays meet is not reconstructed."""
    monkeypatch.setattr(slabs, "MARGIN", 3)
    monkeypatch.setattr(slabs, "CLIMB", 0.0)
    parameters = {
        "sirt": SIRTParameters(iterations=5),
        "tv": TV,
        "padmm": PADMMParameters(iterations=8, start="fdk", weighted=True),
        "unrolled": UnrolledParameters(weights=weights, patch=None),
    }[method]
    expected, output = whole(scan, parameters), tmp_path / "v.ome.zarr"
    run(job(scan, parameters, slab=4, output=output))
    error = (read_volume(output).data - expected) / expected.max()
    assert np.sqrt(np.mean(error**2)) < 0.02
    other = open_scan(scan)
    part = job(scan, parameters, slices=(4, 8)).part_of(other.geometry, other.default_grid(), held=True)
    assert (part.extended.start, part.extended.stop) == (1, 11)


def test_the_projections_of_what_is_held_are_taken_off(scan, tmp_path, monkeypatch):
    """So that a slab's misfit with its FDK is that of the FDK of the whole."""
    import torch

    from napari_recon.physics import XRayTransform
    from napari_recon.reconstruction import FDK

    monkeypatch.setattr(slabs, "MARGIN", 3)
    monkeypatch.setattr(slabs, "CLIMB", 0.0)
    run_ = SlabsRun(job(scan, TV, slab=4, output=tmp_path / "v.ome.zarr"), Control(), Prepared())
    for _ in run_.messages():
        if getattr(run_, "units", None):
            break
    opened = open_scan(scan)
    physics, y = XRayTransform.from_scan(opened, device="cpu"), opened.measurements()
    fdk = FDK()(y, physics)
    misfit = y - physics.A(fdk)
    for core in run_.cores:
        part = run_._run_of(core).prepared.things
        torch.testing.assert_close(part["fdk ram-lak"], fdk[:, :, part["slab"].extended], rtol=1e-3, atol=1e-4)
        found = part["y"] - part["physics"].A(part["fdk ram-lak"])
        torch.testing.assert_close(found, misfit[:, :, part["slab"].rows], rtol=1e-3, atol=2e-4)


def test_slabs_that_no_ray_meets_are_empty(scan, tmp_path):
    fields = {"shape": (120, 12, 12), "voxel_size": 0.6}
    run(job(scan, FDKParameters(), slab=20, output=tmp_path / "v.ome.zarr", **fields))
    control = Control()
    run(job(scan, FDKParameters(), **fields), control)
    expected, found = control.volumes["result"], read_volume(tmp_path / "v.ome.zarr").data
    assert not found[:20].any()
    assert found[60].any()
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


def test_units_of_the_whole_are_measured_without_it(scan, tmp_path):
    from napari_recon.physics import XRayTransform
    from napari_recon.reconstruction.start import brightness, data_volume

    opened = open_scan(scan)
    physics = XRayTransform.from_scan(opened, device="cpu")
    run_ = SlabsRun(job(scan, TV, slab=4, output=tmp_path / "v.ome.zarr"), Control(), Prepared())
    for _ in run_.messages():
        if getattr(run_, "units", None):
            break
    fdk = data_volume(opened.measurements(), physics, physics.sqnorm)
    assert run_.units["brightness"] == pytest.approx(brightness(fdk), rel=1e-5)
    assert run_.units["sqnorm"] == pytest.approx(physics.sqnorm, rel=0.02)


def test_finished_slabs_can_be_read_while_others_are_made(scan, tmp_path):
    output = tmp_path / "v.ome.zarr"
    control = Control()
    seen = None
    for message in run_job(job(scan, SIRTParameters(iterations=3), slab=8, output=output), control):
        if is_finished(message, 2):
            seen = read_volume(output)
            assert ZarrVolume.open(output).provenance["finished_slices"] == [[0, 8], [8, 16]]
            control.finish()
    assert isinstance(message, Finished)
    assert not message.complete
    assert seen.data[:16].any(axis=(1, 2)).all()
    assert not seen.data[16:].any()
    assert not read_volume(output).provenance["complete"]
    later = run(job(scan, SIRTParameters(iterations=3), slab=8, output=output))  # goes on
    assert notices(later)[0] == "Going on where it was stopped: 2 of 3 slabs are finished."
    np.testing.assert_array_equal(read_volume(output).data[:16], seen.data[:16])


def test_a_run_that_was_killed_goes_on_to_the_same_bits(scan, tmp_path):
    wanted, killed = tmp_path / "wanted.ome.zarr", tmp_path / "killed.ome.zarr"
    asked = {"slab": 4}
    run(job(scan, TV, output=wanted, **asked))
    command = [sys.executable, "-m", "napari_recon.cli", "reconstruct", str(scan), "-o", str(killed)]
    command += ["--method", "tv", "--iterations", "12", "--patch", "0", "--device", "cpu", "--slab", "4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if re.match("Slab 2 of 6", line):
                process.send_signal(signal.SIGKILL)
                break
        process.stderr.read()
    done = len(list(work_folder(killed).glob("slab-*.json")))
    assert 2 <= done < 6
    messages = run(job(scan, TV, output=killed, **asked))
    assert notices(messages)[0] == f"Going on where it was stopped: {done} of 6 slabs are finished."
    assert len(finished(messages)) == 6 - done
    files = sorted(file.relative_to(wanted) for file in wanted.rglob("c/**/*") if file.is_file())
    assert files
    for file in files:
        assert (killed / file).read_bytes() == (wanted / file).read_bytes(), file
    assert not work_folder(killed).exists()


def test_another_job_begins_anew(scan, tmp_path):
    output = tmp_path / "v.ome.zarr"
    control = Control()
    for message in run_job(job(scan, SIRTParameters(iterations=2), slab=8, output=output), control):
        if is_finished(message, 1):
            control.finish()
    messages = run(job(scan, SIRTParameters(iterations=4), slab=8, output=output))
    assert not any("Going on" in text for text in notices(messages))
    np.testing.assert_allclose(read_volume(output).data, whole(scan, SIRTParameters(iterations=4)), atol=1e-6)


def test_cancel_leaves_nothing(scan, tmp_path):
    output = tmp_path / "v.ome.zarr"
    control = Control()
    for message in run_job(job(scan, SIRTParameters(iterations=2), slab=8, output=output), control):
        if is_finished(message, 1):
            control.cancel()
    assert isinstance(message, Cancelled)
    assert list(tmp_path.iterdir()) == []


def test_a_volume_that_is_there_stays_until_the_scan_is_read(scan, tmp_path):
    output = tmp_path / "v.ome.zarr"
    run(job(scan, FDKParameters(), output=output))
    before = read_volume(output)
    control = Control()
    for message in run_job(job(scan, SIRTParameters(iterations=2), slab=8, output=output), control):
        if isinstance(message, Notice):  # before the first projection
            control.cancel()
    assert isinstance(message, Cancelled)
    assert list(tmp_path.iterdir()) == [output]
    np.testing.assert_array_equal(read_volume(output).data, before.data)


def test_several_processes_share_the_slabs(scan, tmp_path, monkeypatch):
    output = tmp_path / "v.ome.zarr"
    asked = job(scan, TV, slab=6, output=output)
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = {}

    def work(rank, messages):
        told[rank] = list(messages)

    threads = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        messages = run_job(asked)
        begun = [next(messages), next(messages)]  # by when it knows which it is
        assert begun[0].name == "reading"
        threads.append(threading.Thread(target=work, args=(rank, messages)))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    for rank in (0, 1):
        assert isinstance(told[rank][-1], Finished), told[rank][-1]
        assert finished(told[rank]) == [(6 * n, 6 * n + 6) for n in (rank, rank + 2)]
    alone = tmp_path / "alone.ome.zarr"
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    run(asked.model_copy(update={"output": alone}))
    # Bit for bit in processes; here torch adds up with other threads.
    np.testing.assert_allclose(read_volume(output).data, read_volume(alone).data, atol=1e-6)


def test_slabs_are_chosen_where_memory_has_no_room_for_the_whole(scan, tmp_path, monkeypatch):
    fields = {"shape": (96, 24, 24), "voxel_size": 0.3}
    asked = job(scan, SIRTParameters(iterations=1), output=tmp_path / "v.ome.zarr", **fields)
    need = plan_memory(asked).host_bytes
    monkeypatch.setattr(memory, "available_memory", lambda: int(0.95 * need))
    control, told = Control(), []
    for message in run_job(asked, control):
        told.append(message)
        if is_finished(message):
            control.finish()
    assert re.search("takes about .* free, so it is reconstructed in . slabs of .* slices", notices(told)[0])
    assert not told[-1].complete
    monkeypatch.setattr(memory, "available_memory", lambda: 10 * need)  # it goes on in slabs all the same
    assert notices(run(asked))[0].startswith("Going on where it was stopped: 1 of")
    monkeypatch.setattr(memory, "available_memory", lambda: int(0.95 * need))
    other = list(run_job(job(scan, SIRTParameters(iterations=1), output=tmp_path / "v.tif", **fields)))[-1]
    assert isinstance(other, Failed)
    assert "or write an .ome.zarr, which is done in slabs" in other.text


def test_what_slabs_cannot_do_is_refused_in_a_sentence(scan, tmp_path):
    zarr = tmp_path / "v.ome.zarr"
    for fields, parameters, said in (
        ({"slab": 8, "output": tmp_path / "v.tif"}, TV, "ends in .ome.zarr"),
        ({"slab": 8, "output": zarr, "slices": (0, 8)}, TV, "are a slab already"),
        ({"slab": 8, "output": zarr, "bits": 16}, TV, "write 32"),
        ({"slab": 8, "output": zarr}, TVParameters(operator="h.safetensors"), "use 'fit' or 'exact'"),
        ({"slab": 8, "output": zarr}, PADMMParameters(start="last"), "choose another start"),
    ):
        last = list(run_job(job(scan, parameters, **fields)))[-1]
        assert isinstance(last, Failed)
        assert said in last.text
    assert not zarr.exists()


# -- the file ------------------------------------------------------------------------------------------------------


def test_slabs_share_no_chunk_in_any_resolution(tmp_path):
    """What a process writes, and what is left when it ends amid that, never touches another slab."""
    grid = Grid((74, 300, 140), 0.1)
    step = slab_step(grid.shape)
    assert step == 4
    rng = np.random.default_rng(0)
    values = rng.random(grid.shape, np.float32)
    at_once = ZarrVolume.create(tmp_path / "a.ome.zarr", grid)
    at_once.write(0, values)
    slabs = ZarrVolume.create(tmp_path / "b.ome.zarr", grid, thickness=5 * step)
    files = {}
    for start in (40, 0, 60, 20):
        slabs.write(start, values[start : start + 20])
        now = {file: os.stat(file).st_mtime_ns for file in slabs.path.rglob("c/**/*") if file.is_file()}
        assert {file: now[file] for file in files} == files
        files = now
    for one, other in zip(at_once.levels, slabs.levels, strict=True):
        np.testing.assert_array_equal(one[...], other[...])
    slabs.describe({"complete": True}, more=1)
    said = json.loads((slabs.path / "zarr.json").read_text())["attributes"]
    assert said["napari_recon"] == {"complete": True, "more": 1}
    assert ZarrVolume.open(slabs.path).scale == pytest.approx([0.1] * 3)
