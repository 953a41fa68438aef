"""Training on scans of one's own: with references, and by leaving views out."""

import json
import shutil

import numpy as np
import pytest
import tifffile
import tomli_w
import torch
from typer.testing import CliRunner

from napari_recon.cli import app
from napari_recon.learning.networks import load_weights
from napari_recon.learning.own_scans import find_scans, read_volume, split_views
from napari_recon.learning.simulate import simulate
from napari_recon.learning.training import TrainingConfig, _Trainer, read_config, stream_training, train, write_config
from napari_recon.physics.ramp_filtered import RampFiltered
from napari_recon.physics.xray import XRayTransform
from napari_recon.scans import ScanError, open_scan

SIZE, VIEWS = 16, 20
TABLES = {
    "data": {"views": []},
    "network": {"options": {"width": 4, "scales": 2}},
    "method": {"iterations": 1, "start": "fdk", "data_steps": 2},
    "optimisation": {"steps": 4, "patch": 8, "batch": 1, "warm_up": 2},
    "validation": {"every": 2, "count": 1},
    "device": "cpu",
}


def config(scans, **changes):
    tables = {
        name: {**value, **changes.pop(name, {})} if isinstance(value, dict) else value for name, value in TABLES.items()
    }
    tables["data"] = tables["data"] | {"scans": scans}
    return TrainingConfig.model_validate(tables | changes)


def scan(folder, photons):
    """Three scans of known objects."""
    for seed in range(3):
        simulate("blobs", folder / f"scan{seed}", size=SIZE, views=VIEWS, seed=seed, photons=photons)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return scan(tmp_path_factory.mktemp("scans"), photons=5000)


@pytest.fixture
def copied(measured, tmp_path):
    """The same scans, to change."""
    return shutil.copytree(measured, tmp_path / "scans")


def truth_of(path):
    return torch.from_numpy(tifffile.imread(path / "truth.tif"))[None, None]


def test_scans_with_references_are_trained_on_as_they_were_measured(measured, tmp_path):
    trainer = _Trainer(
        config(measured, data={"views": [10]}, optimisation={"context_mix": 0}), tmp_path / "w.safetensors"
    )
    list(trainer.prepare())
    assert len(trainer.examples) == 2  # the last one validates
    example = trainer.examples[1]
    opened = open_scan(measured / "scan1", views=10)
    assert torch.equal(example.truth, truth_of(measured / "scan1"))
    assert isinstance(example.physics, RampFiltered)
    assert np.array_equal(example.physics.geometry.vectors, opened.geometry.vectors)
    y = example.physics.measurement(opened.measurements())
    expected = example.physics.A_adjoint(example.physics.A(example.truth) - y) / example.physics.sqnorm
    assert torch.allclose(example.noise_gradient, expected, atol=1e-5 * float(expected.abs().max()))
    *_, last = stream_training(config(measured), tmp_path / "w.safetensors")
    assert last.patch.shape == last.truth.shape == last.start.shape == (8, 8, 8)
    kept = load_weights(tmp_path / "w.safetensors")
    assert "reference volumes" in kept.card


def test_references_lie_beside_their_scans(copied):
    (copied / "scan0" / "truth.tif").rename(copied / "scan0" / "reference.tif")
    np.save(copied / "scan1" / "reference.npy", tifffile.imread(copied / "scan1" / "truth.tif"))
    (copied / "scan1" / "truth.tif").unlink()
    (copied / "notes.txt").write_text("not a scan")
    found = find_scans(copied, 1, with_reference=True)
    assert [own.reference.name for own in found] == ["reference.tif", "reference.npy", "truth.tif"]
    assert [own.reference for own in find_scans(copied, 1, with_reference=False)] == [None] * 3


def test_a_binned_scan_has_a_binned_reference(measured):
    own = find_scans(measured, 2, with_reference=True)[0]
    truth, y, physics = own.read(None, torch.device("cpu"))
    assert truth.shape[2:] == (SIZE // 2,) * 3 == physics.grid.shape
    assert float(truth.mean()) == pytest.approx(float(truth_of(measured / "scan0").mean()), rel=1e-5)
    assert float((physics.A(truth) - y).norm() / y.norm()) < 0.5


def test_a_patch_is_no_larger_than_any_volume(measured, tmp_path):
    update = train(config(measured, optimisation={"patch": 48, "steps": 1}), tmp_path / "w.safetensors")
    assert update.patch.shape == (SIZE,) * 3


def test_every_view_is_left_out_once():
    parts = list(split_views(23, 5, (0, 1)))
    assert sorted(np.concatenate([left for _, left in parts])) == list(range(23))
    for seen, left in parts:
        assert sorted([*seen, *left]) == list(range(23))
        assert np.diff(seen).max() <= 3  # no gap wider than two parts that meet
    other = list(split_views(23, 5, (0, 2)))
    assert any(not np.array_equal(a[1], b[1]) for a, b in zip(parts, other, strict=True))


def test_what_is_left_out_is_not_seen(measured, tmp_path):
    """The start and the data steps of a split change with the views that are seen, and with no others."""
    trainer = _Trainer(config(measured, data={"supervision": "splitting"}), tmp_path / "w.safetensors")
    (own, seed), *_ = trainer.objects
    first = next(trainer._splits(own, seed, [None]))
    opened = open_scan(measured / "scan0")
    seen, left_out = next(split_views(VIEWS, 5, (0, seed, VIEWS)))
    y = opened.measurements()
    assert torch.equal(first.y, y[:, :, :, left_out])
    assert np.array_equal(first.left_out.geometry.vectors, opened.geometry.vectors[left_out])
    assert np.array_equal(first.physics.geometry.vectors, opened.geometry.vectors[seen])
    part = RampFiltered(XRayTransform.from_scan(opened, device="cpu").subset(seen))
    expected = part.A_adjoint(part.A(first.start) - part.measurement(y[:, :, :, seen])) / part.sqnorm
    assert torch.allclose(first.gradient(first.start), expected, atol=1e-4 * float(expected.abs().max()))


def test_splitting_brings_a_network_closer_to_a_truth_that_it_never_saw(tmp_path):
    noisy = scan(tmp_path / "scans", photons=500)
    chosen = config(
        noisy,
        data={"supervision": "splitting"},
        optimisation={"steps": 30, "learning_rate": 5e-3, "patch": SIZE},
        validation={"every": 10},
    )
    updates = list(stream_training(chosen, tmp_path / "w.safetensors"))
    validated = [u for u in updates if u.patch is not None]
    assert all(u.truth is None for u in validated)
    trained = load_weights(tmp_path / "w.safetensors")
    assert "leaving views out" in trained.card
    untrained = _Trainer(chosen, tmp_path / "w.safetensors").model.eval()
    opened = open_scan(noisy / "scan2")  # which no step was taken on
    physics, y = XRayTransform.from_scan(opened, device="cpu"), opened.measurements()
    truth = truth_of(noisy / "scan2")
    with torch.no_grad():
        before, after = (float((model(y, physics) - truth).norm()) for model in (untrained, trained.model))
    assert after < 0.85 * before


@pytest.mark.parametrize("method", ["unrolled", "post-processing"])
def test_mirrored_volumes_are_trained_on_the_same_way_back(method, measured, tmp_path):
    """Features that are computed again for the gradient are those of the volume that was shown."""
    chosen = config(measured, data={"supervision": "splitting"}, method={"name": method, "iterations": 2})
    trainer = _Trainer(chosen, tmp_path / "w.safetensors")
    split = next(trainer._splits(*trainer.objects[0], [None]))
    gradients = []
    for again in (True, False):
        trainer.model.zero_grad()
        if again:
            found = trainer._of_split(split, [2, 4])
        elif method == "unrolled":
            trainer.mirror.axes = [2, 4]
            *_, found = trainer.model.unroll(split.start, split.gradient, split.scale)
        else:
            trainer.mirror.axes = [2, 4]
            found = trainer.model.denoise(split.start, split.scale)
        split.residual(found).square().sum().backward()
        trainer.mirror.axes = []
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_splitting_resumes_as_if_it_had_not_been_interrupted(measured, tmp_path):
    chosen = config(measured, data={"supervision": "splitting"})
    through = train(chosen, tmp_path / "a.safetensors")
    updates = stream_training(chosen, tmp_path / "b.safetensors")
    next(u for u in updates if u.stage == "training" and u.step == 2)
    updates.close()
    assert train(chosen, tmp_path / "b.safetensors").figures == through.figures


def test_a_configuration_is_written_as_it_is_read(tmp_path):
    chosen = config(tmp_path / "scans", data={"photons": None, "supervision": "splitting"}, card='Two\n"lines".')
    write_config(chosen, tmp_path / "c.toml")
    assert read_config(tmp_path / "c.toml") == chosen
    with pytest.raises(ScanError, match=r"^[^\n]+$"):
        write_config(chosen, tmp_path / "nowhere" / "c.toml")
    assert [f.name for f in tmp_path.iterdir()] == ["c.toml"]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "scan1" / "truth.tif").unlink(), "splitting"),
        (lambda folder: [p.unlink() for p in (folder / "scan1").glob("scan_*")], "scan1"),
        (lambda folder: tifffile.imwrite(folder / "scan0" / "truth.tif", np.full((16,) * 3, np.nan, "f4")), "NaN"),
        (lambda folder: tifffile.imwrite(folder / "scan0" / "truth.tif", np.ones((16,) * 3, "f4")), "unexplained"),
        (lambda folder: [p.rename(folder.parent / p.name) for p in list(folder.iterdir())[1:]], "at least two"),
    ],
)
def test_scans_that_cannot_be_trained_on_are_refused_in_a_sentence(spoil, named, copied, tmp_path):
    spoil(copied)
    with pytest.raises(ScanError, match=rf"^[^\n]*{named}[^\n]*$"):
        train(config(copied), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"views": [21]}, "views"), ({"supervision": "splitting", "splits": 15}, "data.splits")],
)
def test_more_views_than_there_are_cannot_be_asked_for(changes, named, measured, tmp_path):
    with pytest.raises(ScanError, match=rf"^[^\n]*{named}[^\n]*$"):
        train(config(measured, data=changes), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("text", "named"),
    [("folder = 'a'\nscans = 'b'", "not both"), ("supervision = 'none'", "data.supervision"), ("splits = 1", "splits")],
)
def test_data_that_contradict_themselves_are_refused_in_a_sentence(text, named, tmp_path):
    (tmp_path / "c.toml").write_text("[data]\n" + text)
    with pytest.raises(ScanError, match=rf"^[^\n]*{named}[^\n]*$"):
        read_config(tmp_path / "c.toml")


def test_the_command_trains_on_scans_beside_its_configuration(copied, tmp_path):
    entries = {name: value for name, value in TABLES.items() if name != "data"}
    entries["data"] = {"scans": copied.name, "supervision": "splitting", "views": []}
    (tmp_path / "c.toml").write_text(tomli_w.dumps(entries))
    output = tmp_path / "w.safetensors"
    result = CliRunner().invoke(app, ["train", str(tmp_path / "c.toml"), "-o", str(output), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["figures"]["best_psnr"] == load_weights(output).figures["psnr"]


def test_volumes_are_read_from_slices_too(tmp_path):
    volume = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    for i, plane in enumerate(volume):
        tifffile.imwrite(tmp_path / f"slice{i}.tif", plane)
    assert np.array_equal(read_volume(tmp_path), volume)
