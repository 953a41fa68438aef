"""The worker process, as a viewer uses it."""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from napari_recon.jobs import OperatorJob, PatchJob, ReconstructionJob
from napari_recon.jobs.job import FDKParameters, SIRTParameters, TVParameters
from napari_recon.jobs.messages import Cancelled, Failed, Finished, Progress, VolumeReady
from napari_recon.jobs.worker import Worker
from napari_recon.learning.simulate import simulate

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")
ENDLESS = SIRTParameters(iterations=10_000)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate("shepp-logan", tmp_path_factory.mktemp("scans") / "phantom", size=24, views=30)


@pytest.fixture(scope="module")
def shared_worker():
    with Worker() as worker:
        yield worker


@pytest.fixture
def worker(shared_worker):
    """The module's worker, with nothing of an earlier test in it."""
    shared_worker.cancel()
    wait_for(lambda: not shared_worker.running)
    shared_worker.poll()
    return shared_worker


def make_job(scan, parameters, **fields):
    return ReconstructionJob(scan=scan, parameters=parameters, device="cpu", **fields)


def wait_for(what, seconds=90.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.005)
    raise AssertionError("nothing came in time")


def messages_until(worker, *kinds):
    heard = []

    def listen():
        heard.extend(worker.poll())
        return any(isinstance(m, kinds) for m in heard)

    wait_for(listen)
    return heard


def until_step(worker):
    """Wait for the method's own first step from now on (FDK's come before)."""
    wait_for(lambda: any(isinstance(m, Progress) and m.name == "result" for m in worker.poll()))


def last(worker):
    return messages_until(worker, Finished, Failed, Cancelled)[-1]


def leftovers(pid):
    return list(Path("/dev/shm").glob(f"napari-recon-{pid}-*"))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_job_runs_and_its_volumes_are_the_ones_of_this_process(worker, scan, tmp_path):
    from napari_recon.jobs import Control, run_job

    job = make_job(scan, TVParameters(iterations=2, patch=16, operator="exact"), output=tmp_path / "x.tif")
    worker.submit(job)
    heard = messages_until(worker, Finished, Failed)
    assert isinstance(heard[-1], Finished), heard[-1]
    assert not worker.running
    assert [m.name for m in heard if isinstance(m, VolumeReady)] == ["fdk", "result"]
    assert heard[-1].output == str(tmp_path / "x.tif")
    control = Control()
    list(run_job(job, control))
    for name in ("fdk", "result"):
        volume = worker.volume(name)
        assert volume.dtype == np.float32
        np.testing.assert_allclose(volume, control.volumes[name], atol=1e-6)
    assert not leftovers(worker.pid)


def test_a_failure_is_a_message_and_the_next_job_runs(worker, scan, tmp_path):
    worker.submit(make_job(tmp_path / "nothing", FDKParameters()))
    assert last(worker).kind == "input"
    worker.submit(make_job(scan, FDKParameters()))
    assert isinstance(last(worker), Finished)


def test_pause_resume_finish_answer_within_a_step(worker, scan):
    worker.submit(make_job(scan, ENDLESS))
    until_step(worker)
    worker.pause()
    time.sleep(0.3)
    worker.poll()
    before = worker.volume("result").copy()
    time.sleep(0.3)
    assert worker.poll() == []
    np.testing.assert_array_equal(worker.volume("result"), before)
    worker.resume()
    until_step(worker)
    worker.finish()
    finished = last(worker)
    assert isinstance(finished, Finished)
    assert not finished.complete
    assert (worker.volume("result") != before).any()


def test_cancel_answers_and_the_memory_is_freed(worker, scan):
    psutil = pytest.importorskip("psutil")
    process = psutil.Process(worker.pid)
    worker.submit(make_job(scan, SIRTParameters(iterations=1)))
    last(worker)
    before = process.memory_info().rss
    worker.submit(make_job(scan, ENDLESS, shape=(160,) * 3))
    until_step(worker)
    during = process.memory_info().rss
    worker.cancel()
    assert isinstance(last(worker), Cancelled)
    wait_for(lambda: process.memory_info().rss - before < (during - before) / 4, 10)


def test_a_new_job_takes_over_and_nothing_is_heard_of_the_old(worker, scan):
    worker.submit(make_job(scan, ENDLESS))
    until_step(worker)
    worker.submit(make_job(scan, SIRTParameters(iterations=2)))
    heard = messages_until(worker, Finished, Failed, Cancelled)
    assert isinstance(heard[-1], Finished)
    assert {m.total for m in heard if isinstance(m, Progress) and m.name == "result"} == {2}


def test_volumes_outlive_their_job_and_are_not_touched_by_the_next(worker, scan):
    worker.submit(make_job(scan, FDKParameters()))
    last(worker)
    first = worker.volume("fdk")
    values = first.copy()
    worker.submit(make_job(scan, FDKParameters(window="hann")))
    last(worker)
    np.testing.assert_array_equal(first, values)
    assert (worker.volume("fdk") != values).any()


def test_no_call_holds_the_viewer_up(worker, scan):
    worker.submit(make_job(scan, SIRTParameters(iterations=200)))
    calls = [worker.poll, worker.pause, worker.resume, lambda: worker.focus((1.0, 2.0, 3.0)), lambda: worker.running]
    longest = 0.0
    while worker.running:
        for call in calls:
            start = time.thread_time()  # what the call takes, not what the system gives to others meanwhile
            call()
            longest = max(longest, time.thread_time() - start)
        time.sleep(0.002)
    assert longest < 0.02


@posix
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_leaves_the_volume_a_remedy_and_a_way_on(worker, scan, how):
    worker.submit(make_job(scan, ENDLESS))
    until_step(worker)
    volume = worker.volume("result")
    pid = worker.pid
    os.kill(pid, how)
    failed = last(worker)
    assert failed.kind == "killed"
    assert f"signal {how.value}" in failed.text
    assert "choose a smaller patch" in failed.text
    assert np.isfinite(volume).all()
    assert volume.any()
    assert not worker.running
    assert worker.pid is None
    worker.submit(make_job(scan, FDKParameters()))
    assert isinstance(last(worker), Finished)
    assert not leftovers(pid)


@posix
def test_a_process_killed_while_it_waits_is_replaced_in_silence(worker, scan):
    os.kill(worker.pid, signal.SIGKILL)
    wait_for(lambda: worker.pid is None)
    assert worker.poll() == []
    worker.submit(make_job(scan, FDKParameters()))
    assert isinstance(last(worker), Finished)


@posix
def test_an_end_that_is_noticed_late_does_not_end_the_successor(worker, scan):
    wait_for(lambda: worker.pid is not None)
    dead, noticed = worker._process, threading.Event()
    wait = dead.wait
    dead.wait = lambda: (noticed.wait(60), wait())[1]  # the thread that listens to it wakes late
    os.kill(dead.pid, signal.SIGKILL)
    wait_for(lambda: worker.pid is None)
    for _ in range(2):
        worker.submit(make_job(scan, FDKParameters()))
        noticed.set()
        assert isinstance(last(worker), Finished)


def test_the_operator_and_its_steps_on_a_patch_cross_too(worker, scan, tmp_path):
    from napari_recon.physics import XRayTransform, fit_normal_operator
    from napari_recon.scans import open_scan

    shape, file = (12, 14, 16), tmp_path / "h.safetensors"
    physics = XRayTransform.from_scan(open_scan(scan), shape, device="cpu")
    fit_normal_operator(physics, probes=1, iterations=0, positions=1).save(file, physics)
    worker.submit(OperatorJob(scan=scan, shape=shape, operator=str(file), device="cpu"))
    heard = messages_until(worker, Finished, Failed)
    assert isinstance(heard[-1], Finished), heard[-1]
    ready = [m for m in heard if isinstance(m, VolumeReady)]
    assert [m.name for m in ready] == ["x", "mask", "filter", "exact", "approximate", "error", "regions"]
    assert all(worker.volume(m.name).shape == m.shape for m in ready)
    np.testing.assert_allclose(
        worker.volume("error"), (worker.volume("exact") - worker.volume("approximate")) ** 2, rtol=1e-5
    )
    worker.submit(
        PatchJob(scan=scan, shape=shape, operator=str(file), center=(5, 6, 7), patch=8, steps=3, device="cpu")
    )
    heard = messages_until(worker, Finished, Failed)
    assert isinstance(heard[-1], Finished), heard[-1]
    exact = worker.volume("patch exact")
    assert exact.shape == (4, 8, 8, 8)
    assert all((a != b).any() for a, b in pairwise(exact))
    assert not leftovers(worker.pid)


@posix
@pytest.mark.parametrize("kind", ["volume", "operator"])
def test_killed_while_writing_leaves_no_half_file(worker, tmp_path, kind):
    from napari_recon.jobs.volumes import partial_path

    worker.start()
    wait_for(lambda: worker.pid)
    if kind == "volume":
        job = make_job(tmp_path / "nothing", FDKParameters(), output=tmp_path / "x.ome.zarr")
    else:
        job = OperatorJob(scan=tmp_path / "nothing", output=tmp_path / "h.safetensors")
    worker.submit(job)
    last(worker)
    if kind == "volume":
        partial_path(job.output, worker.pid).mkdir()
    else:
        (tmp_path / "h.safetensors.partial").write_text("half")
    os.kill(worker.pid, signal.SIGKILL)
    wait_for(lambda: not list(tmp_path.iterdir()), 10)


def test_close_ends_the_process_even_amid_a_job(scan):
    worker = Worker()
    worker.submit(make_job(scan, ENDLESS))
    until_step(worker)
    pid = worker.pid
    start = time.monotonic()
    worker.close()
    assert time.monotonic() - start < 2.5
    assert worker.pid is None
    assert not alive(pid)
    assert not leftovers(pid)
    worker.close()
    worker.cancel()
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(make_job(scan, FDKParameters()))


SCRIPT = """
import sys, time
from napari_recon.jobs import ReconstructionJob
from napari_recon.jobs.job import SIRTParameters
from napari_recon.jobs.messages import Failed, Progress
from napari_recon.jobs.worker import Worker
# No guard with __name__: a script that opens a viewer has none either.
worker = Worker()
worker.submit(ReconstructionJob(scan=sys.argv[1], parameters=SIRTParameters(iterations=10_000), device="cpu"))
heard = []
while not any(isinstance(m, Failed) or getattr(m, "step", 0) > 2 for m in heard):
    heard += worker.poll()
    time.sleep(0.01)
print("computing" if any(isinstance(m, Progress) for m in heard) else heard, worker.pid, flush=True)
{end}
"""


@posix
@pytest.mark.parametrize(
    "end", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], ids=["exits", "killed"]
)
def test_the_process_ends_with_its_viewer_however_that_ends(scan, tmp_path, end):
    script = tmp_path / "viewer.py"
    script.write_text(SCRIPT.format(end=end))
    ran = subprocess.run([sys.executable, script, scan], capture_output=True, text=True, timeout=120)
    said, pid = ran.stdout.split()
    assert said == "computing"
    assert ran.stderr == ""
    wait_for(lambda: not alive(int(pid)), 10)
    assert not leftovers(int(pid))


def test_room_is_claimed_before_it_is_used(monkeypatch, tmp_path):
    from napari_recon.jobs import worker

    array, handle = worker._allocate_shared("x", (3, 4, 5))
    seen = worker._map_shared(handle, (3, 4, 5))
    array[1, 2, 3] = 7
    assert seen[1, 2, 3] == 7
    assert not Path(handle).exists()

    def full(file, start, size):
        raise OSError(28, "No space left on device")

    if hasattr(os, "posix_fallocate"):
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(MemoryError):
            worker._allocate_shared("x", (3, 4, 5))
        assert not leftovers(os.getpid())
