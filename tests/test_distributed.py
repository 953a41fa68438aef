"""Several processes: what torchrun starts trains one network, shares out the views of a transform, and ends together.

Run as a script this file is what each of two processes does (gloo, on the CPU); the tests look at what they left.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from napari_recon.cli import app
from napari_recon.jobs import ReconstructionJob, run_job
from napari_recon.jobs.job import TVParameters
from napari_recon.jobs.messages import Finished
from napari_recon.jobs.volumes import read_volume
from napari_recon.learning.networks import load_weights
from napari_recon.learning.simulate import simulate
from napari_recon.learning.training import TrainingConfig, _Trainer, checkpoint_path, stream_training
from napari_recon.physics.devices import resolve_device
from napari_recon.physics.xray import XRayTransform
from napari_recon.scans import Geometry, Grid, ScanError

WORLD = 2
TABLES = {
    "data": {"kinds": ["ellipsoids", "blobs"], "count": 3, "size": 12, "views": [6, 9]},
    "network": {"options": {"width": 4, "scales": 2}},
    "method": {"iterations": 2},
    "optimisation": {"steps": 6, "patch": 8, "warm_up": 1, "refresh": 2, "flips": False},
    "validation": {"every": 3, "count": 1},
    "device": "cpu",
}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def config(**changes):
    """The tiny configuration with some entries of its tables changed."""
    return TrainingConfig.model_validate(
        {name: {**t, **changes.pop(name, {})} if isinstance(t, dict) else t for name, t in TABLES.items()} | changes
    )


def transform():
    """Eleven views, which two processes cannot share alike, and a volume."""
    geometry = Geometry.cone(np.arange(11) * 360 / 11, (10, 14), 1.2, 60.0, 90.0)
    x = torch.rand((1, 1, 6, 8, 8), generator=torch.Generator().manual_seed(0))
    return XRayTransform(geometry, Grid((6, 8, 8), 1.0), device="cpu"), x


# -- what each of the processes does -------------------------------------------------------------------------------


def each_process(folder: Path):
    from deepinv.distributed import DistributedContext

    with DistributedContext(device_mode="cpu") as context:
        found = {
            "through": trained(folder / "through.safetensors", stop=None),
            "resumed": trained(folder / "resumed.safetensors", stop=3),
            "gradients": gradients(folder),
            "refused": refusal(folder),
            "transform": shared_views(context),
            "slabs": slabs(folder / "scan", folder / "two.ome.zarr"),
        }
        torch.save(found, folder / f"{context.rank}.pt")


def trained(output, stop):
    """All weights at the end, in one go or in two."""
    if stop is not None:
        updates = stream_training(config(), output)
        next(u for u in updates if u.stage == "training" and u.step == stop)
        updates.close()
        torch.distributed.barrier()
        assert checkpoint_path(output).exists()
    trainer = _Trainer(config(), output)
    list(trainer.prepare())
    updates = list(trainer.run(resume=True))
    assert [u.step for u in updates] == list(range(1 if stop is None else stop + 1, 7))
    return {"weights": trainer.model.state_dict(), "losses": [u.figures["loss"] for u in updates]}


def gradients(folder):
    """Those of the first step, after they were averaged; two batches are accumulated."""
    trainer = _Trainer(config(), folder / "gradients.safetensors")
    list(trainer.prepare())
    loss_of, averaging = trainer._loss_module()
    for micro in range(2):
        with averaging(micro == 1):
            (loss_of(micro) / 2).backward()
    return [parameter.grad for parameter in trainer.model.parameters()]


def refusal(folder):
    """What every process says of a volume that only one of them reads."""
    chosen = config(data={"folder": folder / "volumes"})
    try:
        list(stream_training(chosen, folder / "refused.safetensors"))
    except ScanError as error:
        return str(error)
    return ""


def shared_views(context):
    """A stack of transforms of some of the views, distributed by deepinv; every process has projections of its own."""
    from deepinv.distributed import distribute
    from deepinv.utils import TensorList

    whole, x = transform()
    views = [slice(first, None, 3) for first in range(3)]
    physics = distribute([whole.subset(v) for v in views], context)
    y = whole.A(x)
    parts = [y[:, :, :, v] for v in views]
    own = [parts[i] for i in physics.local_indexes]
    return {
        "A": [part.clone() for part in physics.A(x)],
        "adjoint": physics.A_adjoint(own),
        "normal": physics.A_adjoint_A(x),
        "least squares": physics.A_dagger(TensorList(parts), max_iter=5, local_only=False),
    }


def slabs(scan, output):
    """A volume that is written by all of them; what the run said last."""
    *_, last = run_job(
        ReconstructionJob(
            scan=scan, parameters=TVParameters(iterations=4, patch=None), device="cpu", slab=4, output=output
        )
    )
    assert isinstance(last, Finished), last
    return last.figures


# -- what they left ------------------------------------------------------------------------------------------------


class Processes(list):
    """What each process found, by its rank, and where they wrote."""

    def __init__(self, folder, found):
        super().__init__(found)
        self.folder = folder


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process found, by its rank."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "volumes").mkdir()
    rng = np.random.default_rng(0)
    for i, edge in enumerate((9, 4, 9, 9)):  # the second is too small, and falls to the second process
        np.save(folder / "volumes" / f"{i}.npy", rng.random((edge,) * 3, np.float32))
    simulate("ellipsoids", folder / "scan", size=16, views=12)
    done = subprocess.run(
        [*LAUNCH, __file__, str(folder)], capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return Processes(folder, [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)])


def test_all_processes_end_with_the_same_weights(processes):
    first, second = (found["through"] for found in processes)
    assert first["losses"] == second["losses"]
    for name, values in first["weights"].items():
        assert torch.equal(values, second["weights"][name]), name


def test_training_on_several_processes_goes_on_as_if_it_had_not_been_stopped(processes):
    for found in processes:
        for name, values in found["through"]["weights"].items():
            assert torch.equal(values, found["resumed"]["weights"][name]), name
        assert found["resumed"]["losses"] == found["through"]["losses"][3:]


def test_averaged_gradients_are_those_of_the_joint_batch(processes, tmp_path):
    """Of the same patches, to rounding: a step of two processes is that of one with twice the batch."""
    alone = _Trainer(config(optimisation={"batch": 4}), tmp_path / "w.safetensors")
    list(alone.prepare())
    examples, drawn = alone.examples, []
    for micro in range(2):
        for rank in range(WORLD):
            scans = alone.config.data.views
            alone.examples = [e for i, e in enumerate(examples) if i // len(scans) % WORLD == rank]
            rng = np.random.default_rng([alone.config.seed, 0, micro, rank])
            drawn += [alone._draw(rng) for _ in range(TrainingConfig().optimisation.batch)]
    following = iter(drawn)
    alone._draw = lambda rng: next(following)
    for micro in range(2):
        (alone._loss(micro) / 2).backward()
    for found in processes:
        for parameter, averaged in zip(alone.model.parameters(), found["gradients"], strict=True):
            assert torch.allclose(parameter.grad, averaged, rtol=1e-4, atol=1e-5 * float(averaged.abs().max()))
    assert sum(float(g.abs().sum()) for g in processes[0]["gradients"]) > 0


def test_what_one_process_cannot_read_is_told_by_all(processes):
    sentences = {found["refused"] for found in processes}
    assert len(sentences) == 1
    assert "1.npy" in sentences.pop()


def test_deepinv_shares_out_the_views(processes):
    """The transform of all views, its adjoint and five steps of CG, from parts that lie in other processes."""
    whole, x = transform()
    y = whole.A(x)
    normal, scale = whole.A_adjoint(y), float(whole.A_adjoint(y).abs().max())
    expected = whole.A_dagger(y, solver="CG", max_iter=5)
    for found in (each["transform"] for each in processes):
        for first, part in enumerate(found["A"]):
            assert torch.allclose(part, y[:, :, :, first::3], atol=1e-5)
        for name in ("adjoint", "normal"):
            assert torch.allclose(found[name], normal, atol=1e-5 * scale), name
        assert torch.allclose(found["least squares"], expected, atol=1e-4 * float(expected.abs().max()))


def test_slabs_of_several_processes_make_the_volume_of_one(processes):
    """Bit for bit, in every file of the store; only its description tells of another run."""
    two, one = processes.folder / "two.ome.zarr", processes.folder / "one.ome.zarr"
    figures = slabs(processes.folder / "scan", one)
    files = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(two) for file in two.rglob("*") if file.is_file())
    for file in files:
        if file.name != "zarr.json":
            assert (one / file).read_bytes() == (two / file).read_bytes(), file
    assert np.abs(read_volume(two).data).max() > 0
    told = json.loads((two / "zarr.json").read_text())["attributes"]["napari_recon"]
    assert told["complete"] is True
    assert processes[0]["slabs"] == figures
    assert not list(processes.folder.glob(".*.work"))


def test_the_plan_on_paper_can_be_computed(capsys):
    """The script whose numbers stand in docs/scale.md goes with the code as it is."""
    script = Path(__file__).parent.parent / "docs" / "examples" / "scale.py"
    runpy.run_path(str(script))["main"]()
    assert "8 slabs of 250 slices" in capsys.readouterr().out


# -- devices, and the command line ---------------------------------------------------------------------------------


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank, gpu in ((0, 0), (1, 1), (2, 0)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", gpu)
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.fixture
def command(tmp_path):
    """The command line, with the launcher in front."""
    import tomli_w

    tables = TABLES | {"optimisation": TABLES["optimisation"] | {"steps": 300}, "validation": {"every": 300}}
    for name, chosen in (("short", TABLES), ("long", tables)):
        (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(chosen))
    return lambda name: [
        *[*LAUNCH, "-m", "napari_recon", "train", str(tmp_path / f"{name}.toml")],
        *["-o", str(tmp_path / "w.safetensors"), "--json"],
    ]


@pytest.mark.slow
def test_the_command_is_the_same_with_a_launcher_in_front(command, tmp_path):
    done = subprocess.run(command("short"), capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6  # the first process alone speaks
    assert done.stderr.count("step 3:") == 1
    assert load_weights(tmp_path / "w.safetensors").figures["psnr"] > 0


@pytest.mark.slow
def test_a_volume_is_reconstructed_with_a_launcher_in_front(processes, tmp_path):
    output = tmp_path / "v.ome.zarr"
    command = [*LAUNCH, "-m", "napari_recon", "reconstruct", str(processes.folder / "scan"), "-o", str(output)]
    command += ["--method", "tv", "--iterations", "4", "--patch", "0", "--device", "cpu", "--json"]
    done = subprocess.run([*command, "--slab", "4"], capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(output)
    expected = read_volume(processes.folder / "two.ome.zarr").data
    np.testing.assert_array_equal(read_volume(output).data, expected)


def test_several_processes_do_not_write_one_volume_each(processes, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["reconstruct", str(processes.folder / "scan"), "-o", str(tmp_path / "v.tif"), "--method", "fdk"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "--slab N" in result.stderr
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(app, command).stderr.splitlines()[-1].startswith("Process 1: ")


@pytest.mark.slow
def test_stopped_processes_leave_a_checkpoint_together(command, tmp_path):
    output = tmp_path / "w.safetensors"
    tables = (tmp_path / "long.toml").read_text()
    (tmp_path / "long.toml").write_text("checkpoint_every = 2\n" + tables)
    with subprocess.Popen(
        command("long"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        end = time.monotonic() + 200
        while not checkpoint_path(output).exists() and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        told, said = process.communicate(timeout=100)
    assert json.loads(told)["stopped"] is True, said
    assert said.count("Stopped after step") == 1
    assert "[rank" not in said  # how torch begins the lines of a process that fails
    kept = torch.load(checkpoint_path(output), weights_only=True)
    assert kept["step"] == json.loads(told)["steps"] > 0
    assert output.exists()


if __name__ == "__main__":
    each_process(Path(sys.argv[1]))
