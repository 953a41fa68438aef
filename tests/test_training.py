"""Training: what a patch is taught, resuming, stopping, and configurations."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
from typer.testing import CliRunner

from napari_recon.cli import app
from napari_recon.learning.networks import load_weights
from napari_recon.learning.simulate_mri import simulate_mri
from napari_recon.learning.training import (
    TrainingConfig,
    _simulate,
    _Trainer,
    checkpoint_path,
    read_config,
    stream_training,
    train,
)
from napari_recon.physics.mri import MultiCoilMRI
from napari_recon.physics.normal import fit_normal_operator
from napari_recon.physics.ramp_filtered import RampFiltered
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction.padmm import PADMM
from napari_recon.reconstruction.unrolled import PostProcessing, UnrolledPGD
from napari_recon.scans import Grid, ScanError

TABLES = {
    "data": {"kinds": ["ellipsoids", "blobs"], "count": 3, "size": 12, "views": [6, 9]},
    "network": {"options": {"width": 4, "scales": 2}},
    "method": {"iterations": 2},
    "optimisation": {"steps": 6, "patch": 8, "warm_up": 1, "refresh": 2},
    "validation": {"every": 3, "count": 1},
    "device": "cpu",
}


def config(**changes):
    """The tiny configuration with some entries of its tables changed."""
    tables = {
        name: {**value, **changes.pop(name, {})} if isinstance(value, dict) else value for name, value in TABLES.items()
    }
    return TrainingConfig.model_validate(tables | changes)


def steps_of(updates):
    return [u for u in updates if u.stage == "training"]


def as_toml(tables):
    import tomli_w

    return tomli_w.dumps(tables)


# -- what is learned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["ramp", "gradient"])
@torch.no_grad()
def test_the_gradient_of_a_training_patch_is_that_of_the_data(step, tmp_path):
    """In every kind of context: the gradient of ½‖Ax − y‖² at the volume with the patch in it."""
    trainer = _Trainer(
        config(data={"count": 1, "views": [7]}, method={"step": step}, optimisation={"context_mix": 0.6}),
        tmp_path / "w.safetensors",
    )
    list(trainer.prepare())
    (example,) = trainer.examples
    trainer._refresh()
    ((truth, y),) = _simulate(*trainer.objects[0], trainer.config.data, [7])
    assert torch.equal(truth, example.truth)
    physics = trainer.physics[7]
    if isinstance(physics, RampFiltered):
        y = physics.measurement(y)
    contexts = set()
    for seed in range(12):
        patch = trainer._draw(np.random.default_rng(seed))
        place = np.argwhere(
            [
                torch.equal(truth[..., i : i + 8, j : j + 8, k : k + 8], patch.truth)
                for i in range(5)
                for j in range(5)
                for k in range(5)
            ]
        )[0, 0]
        corner = np.unravel_index(place, (5, 5, 5))
        box = (..., *(slice(int(a), int(a) + 8) for a in corner))
        # The context's error, seen in the patch, tells which volume it is of.
        found = None
        for name, volume in (("start", example.start), ("first", example.first)):
            error = volume - truth
            part = float(((patch.context - patch.truth) * error[box]).sum() / error[box].square().sum())
            if torch.allclose(patch.context, patch.truth + part * error[box], atol=1e-5):
                found = name if part else "truth"
                whole = truth + part * error
                break
        assert found is not None
        contexts.add(found)
        patched = whole.clone()
        patched[box] = patch.start
        norm = physics.sqnorm
        expected = physics.A_adjoint(physics.A(patched) - y)[box] / norm
        assert torch.allclose(patch.gradient(patch.start), expected, atol=1e-3 * float(expected.abs().max()) + 1e-7)
    assert contexts == {"truth", "start", "first"}


def test_a_few_steps_reduce_the_loss(tmp_path):
    losses = [
        u.figures["loss"]
        for u in stream_training(
            config(
                data={"count": 1},
                optimisation={"steps": 25, "patch": 12, "context_mix": 0, "batch": 1, "loss": "l2"},
                validation={"every": 100},
            ),
            tmp_path / "w.safetensors",
        )
        if u.stage == "training"
    ]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])


@pytest.mark.parametrize("method", ["unrolled", "post-processing"])
def test_training_tells_and_writes_what_it_found(method, tmp_path):
    output = tmp_path / "w.safetensors"
    updates = list(stream_training(config(method={"name": method}, card="A test."), output))
    assert [u.step for u in steps_of(updates)] == list(range(1, 7))
    assert {u.stage for u in updates} == {"preparing", "training"}
    validated = [u for u in updates if u.patch is not None]
    assert [u.step for u in validated] == [3, 6]
    for update in validated:
        assert update.patch.shape == update.truth.shape == (8, 8, 8)
        assert {"loss", "learning_rate", "psnr", "start_psnr", "best_psnr"} <= set(update.figures)
    kept = load_weights(output)
    assert isinstance(kept.model, UnrolledPGD if method == "unrolled" else PostProcessing)
    assert kept.figures["psnr"] == max(u.figures["psnr"] for u in validated)
    assert kept.card.startswith("A test.")
    assert TrainingConfig.model_validate(kept.training).data.size == 12
    assert [f.name for f in tmp_path.iterdir()] == [output.name]


def test_a_trained_method_reconstructs_what_validation_saw(tmp_path):
    """The weights give on the scan itself, through projections, what the validation's gradients gave."""
    output = tmp_path / "w.safetensors"
    *_, last = stream_training(config(validation={"every": 6}), output)
    trainer = _Trainer(config(), output)
    ((truth, y),) = _simulate(*trainer.held_out[0], trainer.config.data, [6])
    (example,) = trainer._examples(*trainer.held_out[0], [6])
    physics = XRayTransform(trainer.physics[6].geometry, Grid((12, 12, 12), trainer.physics[6].grid.voxel_size), "cpu")
    with torch.no_grad():
        found = load_weights(output).model(y, physics)
    assert torch.equal(truth, example.truth)
    assert np.allclose(found[0, 0, 2:10, 2:10, 2:10].numpy(), last.patch, atol=1e-3 * float(truth.max()))


def test_training_may_compute_in_half_precision(tmp_path):
    last = train(config(optimisation={"mixed_precision": True}), tmp_path / "w.safetensors")
    assert np.isfinite(last.figures["loss"])


MRI = {
    "data": {"modality": "mri", "kinds": ["head"], "size": 16, "count": 2, "accelerations": [2, 3], "coils": 3},
    "method": {"step": "gradient", "start": "sense", "data_steps": 2},
    "validation": {"kinds": ["blobs"]},
}


@torch.no_grad()
def test_the_gradient_of_a_patch_of_k_space_is_that_of_the_data(tmp_path):
    trainer = _Trainer(config(**MRI, optimisation={"context_mix": 0.0}), tmp_path / "w.safetensors")
    list(trainer.prepare())
    (_, y, physics) = next(trainer._scans(*trainer.objects[0], [2.0]))
    trainer.examples = trainer.examples[:1]
    (example,), drawn = trainer.examples, trainer._draw(np.random.default_rng(0))
    (at,) = [at for at in _places(example.start, drawn.start) if torch.equal(drawn.start, example.start[at])]
    x = torch.randn_like(drawn.start)
    whole = example.truth.clone()
    whole[at] = x
    expected = physics.A_adjoint(physics.A(whole) - y)[at] / physics.sqnorm
    assert (drawn.gradient(x) - expected).norm() < 1e-4 * expected.norm()


def _places(whole, patch):
    """Where such a patch may lie."""
    edge = patch.shape[-1]
    corners = range(whole.shape[-1] - edge + 1)
    return [(..., *(slice(c, c + edge) for c in at)) for at in itertools.product(corners, repeat=3)]


@pytest.mark.parametrize("method", ["unrolled", "post-processing"])
def test_networks_of_mri_are_trained_on_heads(method, tmp_path):
    output = tmp_path / "w.safetensors"
    last = train(config(**{**MRI, "method": MRI["method"] | {"name": method}}), output)
    assert np.isfinite(last.figures["psnr"])
    assert last.patch.shape == (8, 8, 8)
    assert float(last.patch.min()) >= 0  # a magnitude
    kept = load_weights(output)
    assert "multi-coil k-space of 3 coils, accelerations 2, 3" in kept.card
    made = simulate_mri("ellipsoids", seed=1, size=16, acceleration=2, coils=3)
    physics = MultiCoilMRI.from_scan(made.scan, "cpu")
    with torch.no_grad():
        assert kept.model(made.scan.measurements(), physics).shape == (1, 2, 16, 16, 16)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"method": {"start": "least-squares"}}, "method.start"),
        ({"method": {"step": "ramp"}}, "method.step"),
        ({"data": {"folder": "."}}, "data.folder"),
        ({"data": {"kinds": ["brain"]}}, "brain"),
    ],
)
def test_what_only_x_rays_have_is_refused_for_mri(changes, word, tmp_path):
    tables = {name: MRI.get(name, {}) | changes.get(name, {}) for name in ("data", "method")}
    with pytest.raises(ScanError, match=rf"^[^\n]*{word}[^\n]*$"):
        _Trainer(config(**tables), tmp_path / "w.safetensors")


def test_a_memory_begins_with_weights_that_had_none(tmp_path):
    """What it is shown more counts nothing at first."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    train(config(), first)
    before = _Trainer(config(network={"weights": str(first)}), second)
    after = _Trainer(config(network={"weights": str(first)}, method={"memory": True}), second)
    x, other = torch.rand(2, 1, 1, 12, 12, 12)
    found = after.model.denoise(x, 0, 1.0, other)
    assert torch.allclose(found, before.model.denoise(x, 0, 1.0, other), atol=1e-6)
    *_, last = stream_training(after.config, second)
    kept = load_weights(second).model
    assert kept.memory
    assert not torch.allclose(kept.denoise(x, 0, 1.0, other), kept.denoise(x, 0, 1.0, 2 * other))
    assert np.isfinite(last.figures["psnr"])


def test_training_begins_with_other_weights(tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    train(config(), first)
    trained = load_weights(first).model.state_dict()
    file = tmp_path / "config.toml"
    file.write_text(as_toml({**TABLES, "network": {**TABLES["network"], "weights": first.name}}))
    begun = _Trainer(read_config(file), second).model.state_dict()
    for name, values in trained.items():
        assert torch.equal(begun[name], values)
    with pytest.raises(ScanError, match=r"^[^\n]*another network[^\n]*$"):
        _Trainer(config(network={"options": {"width": 6, "scales": 2}, "weights": str(first)}), second)


def test_only_the_network_sees_mirrored_volumes(tmp_path):
    """Mirrored and turned back: the same training where the network does not know directions."""
    losses = []
    for flips in (True, False):
        trainer = _Trainer(config(optimisation={"flips": flips}), tmp_path / "w.safetensors")
        list(trainer.prepare())
        network = trainer.model.networks[0]
        with torch.no_grad():
            for parameter in network.parameters():  # what is left is a scaled x
                parameter.zero_()
        losses.append([float(trainer._loss(k).detach()) for k in range(4)])
        assert trainer.mirror.axes == []
    assert losses[0] == pytest.approx(losses[1])


def test_every_volume_is_scanned_with_every_number_of_views(tmp_path):
    trainer = _Trainer(config(), tmp_path / "w.safetensors")
    list(trainer.prepare())
    assert [e.physics.physics.geometry.views for e in trainer.examples] == [6, 9] * 3
    few, many = (e.truth / e.truth.max() for e in trainer.examples[:2])
    assert torch.allclose(few, many)


def test_patches_can_be_trained_with_a_normal_operator(tmp_path, monkeypatch):
    fitted = []

    def fit(*arguments, **options):
        fitted.append(fit_normal_operator(*arguments, probes=1, iterations=0, positions=1, **options))
        return fitted[-1]

    monkeypatch.setattr("napari_recon.physics.normal.fit_normal_operator", fit)
    monkeypatch.setattr(RampFiltered, "restrict", None)  # no patch is projected
    last = train(config(method={"normal": "fit"}, optimisation={"steps": 2}), tmp_path / "w.safetensors")
    assert len(fitted) == 2  # one for each number of views
    assert np.isfinite(last.figures["loss"])


@pytest.mark.parametrize("modality", ["x-ray", "mri"])
def test_a_network_may_be_trained_towards_the_minimiser(modality, tmp_path):
    """What is learned is what PADMM makes of the same scan, wherever it starts."""
    data = {"target": "minimiser", "regularization": 3e-3, "count": 1, "views": [9]}
    method = {"name": "post-processing", "start": "fdk"}
    if modality == "mri":
        data |= {"modality": "mri", "kinds": ["head"], "accelerations": [3], "size": 16}
        method["start"] = "zero-filled"
    trainer = _Trainer(config(data=data, method=method), tmp_path / "w.safetensors")
    with torch.no_grad():
        list(trainer.prepare())
        ((truth, y, physics),) = trainer._scans(*trainer.objects[0], trainer.config.data.samplings)
    learned, found = trainer.examples[0].truth, PADMM(100, 3e-3)(y, physics, init="zeros")
    assert (learned - found).norm() < 0.05 * (learned - truth).norm()


def test_accumulated_batches_count_as_one(tmp_path):
    seen = train(config(optimisation={"steps": 1, "accumulation": 3, "batch": 1}), tmp_path / "w.safetensors")
    assert np.isfinite(seen.figures["loss"])


# -- stopping and going on -----------------------------------------------------------------------------------------


def test_resumed_training_ends_as_if_it_had_not_been_interrupted(tmp_path):
    through = _weights_after(config(), tmp_path / "through.safetensors", stop=None)
    resumed = _weights_after(config(), tmp_path / "resumed.safetensors", stop=3)
    assert through.keys() == resumed.keys()
    for name, values in through.items():
        assert torch.equal(values, resumed[name]), name
    assert not checkpoint_path(tmp_path / "resumed.safetensors").exists()


def _weights_after(chosen, output, stop):
    """All weights at the end, whatever the best ones are."""
    if stop is not None:
        updates = stream_training(chosen, output)
        for update in updates:
            if update.stage == "training" and update.step == stop:
                break
        updates.close()
        assert checkpoint_path(output).exists()
    trainer = _Trainer(chosen, output)
    list(trainer.prepare())
    steps = [u.step for u in trainer.run(resume=True)]
    assert steps == list(range(1 if stop is None else stop + 1, 7))
    return {name: values.clone() for name, values in trainer.model.state_dict().items()}


def test_who_stops_early_keeps_weights_and_can_go_on(tmp_path):
    output = tmp_path / "w.safetensors"
    updates = stream_training(config(validation={"every": 100}), output)
    next(u for u in updates if u.stage == "training")
    updates.close()
    assert load_weights(output).figures["steps"] == 1
    assert [u.step for u in steps_of(stream_training(config(validation={"every": 100}), output))] == [2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    output = tmp_path / "w.safetensors"
    updates = stream_training(config(), output)
    next(u for u in updates if u.stage == "training")
    updates.close()
    with pytest.raises(ScanError, match=r"^[^\n]*seed[^\n]*$"):
        list(stream_training(config(seed=4), output))
    checkpoint_path(output).write_bytes(b"torn")
    with pytest.raises(ScanError, match=r"^[^\n]*cannot be read[^\n]*$"):
        list(stream_training(config(), output))
    assert len(steps_of(stream_training(config(), output, resume=False))) == 6


def test_divergence_is_said(tmp_path):
    wild = config(method={"step_size": 1e30}, optimisation={"steps": 3})
    with pytest.raises(ScanError, match="diverged"):
        list(stream_training(wild, tmp_path / "w.safetensors"))


# -- configurations ------------------------------------------------------------------------------------------------


def test_a_configuration_is_read_without_torch():
    code = "import sys, napari_recon.learning.training; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_a_configuration_comes_from_a_file(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(as_toml(TABLES | {"data": TABLES["data"] | {"folder": "volumes"}}))
    found = read_config(file)
    assert found.data.folder == tmp_path / "volumes"
    assert found.data.views == (6, 9)
    assert found.method == config().method


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[data", "not TOML"),
        ("[data]\nsice = 12", "data.sice"),
        ("[data]\nviews = []", "data.views"),
        ("[network]\nname = 'resnet'", "network.name"),
        ("[optimisation]\nlearning_rate = -1.0", "optimisation.learning_rate"),
        (None, "cannot be read"),
    ],
)
def test_wrong_configurations_are_refused_in_a_sentence(text, named, tmp_path):
    file = tmp_path / "config.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ScanError, match=rf"^[^\n]*{named}[^\n]*$"):
        read_config(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"kinds": ["unicorn"]}},
        {"network": {"options": {"depth": 3}}},
        {"data": {"folder": "nowhere"}},
        {"device": "abacus"},
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(changes, tmp_path):
    with pytest.raises(ScanError, match=r"^[^\n]+$"):
        list(stream_training(config(**changes), tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", ["weights.pt", "none/w.safetensors"])
def test_weights_are_only_written_where_they_can_be(name, tmp_path):
    with pytest.raises(ScanError, match=r"^[^\n]+$"):
        list(stream_training(config(), tmp_path / name))


def test_volumes_of_ones_own_are_trained_on(tmp_path):
    folder = tmp_path / "volumes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tifffile.imwrite(folder / "a.tif", rng.random((10, 14, 12), np.float32))
    np.save(folder / "b.npy", rng.random((20, 16, 16)))
    tifffile.imwrite(folder / "c.tif", (1000 * rng.random((9, 9, 9))).astype(np.uint16))
    chosen = config(data={"folder": folder})
    updates = list(stream_training(chosen, tmp_path / "w.safetensors"))
    assert sum(u.stage == "preparing" for u in updates) == 3  # two to train on, one to validate with
    np.save(folder / "a.npy", np.zeros((4, 4)))
    with pytest.raises(ScanError, match=r"a\.npy"):
        list(stream_training(chosen, tmp_path / "w.safetensors"))


# -- the command -------------------------------------------------------------------------------------------------
# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_trains(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(as_toml(TABLES))
    output = tmp_path / "w.safetensors"
    result = CliRunner().invoke(app, ["train", str(file), "-o", str(output), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["steps"] == 6
    assert told["figures"]["best_psnr"] == load_weights(output).figures["psnr"]
    assert "step 3" in result.stderr
    file.write_text("[data]\nsize = 'big'")
    result = CliRunner().invoke(app, ["train", str(file), "-o", str(output)])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
