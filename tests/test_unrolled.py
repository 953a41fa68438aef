"""Unrolled networks and post-processing: their steps, their patches, their networks and the files of their weights."""

import json

import numpy as np
import pytest
import torch
from deepinv.physics import Denoising, MultiCoilMRI
from torch import nn

from napari_recon import FDK, DiagCirculantWrapper, Geometry, Grid, PartitionedReconstructor, XRayTransform
from napari_recon.learning.networks import load_weights, make_network, save_weights
from napari_recon.learning.phantoms import make_phantom
from napari_recon.physics.normal import fit_normal_operator
from napari_recon.physics.ramp_filtered import RampFiltered
from napari_recon.reconstruction.partitioned import Partition
from napari_recon.reconstruction.start import start_volume
from napari_recon.reconstruction.tv import TV, PreconditionedTV
from napari_recon.reconstruction.unrolled import PostProcessing, UnrolledPGD, apply_by_patches
from napari_recon.scans import ScanError


@pytest.fixture(scope="module")
def grid():
    return Grid((12, 16, 16), 2.0)


@pytest.fixture(scope="module")
def physics(grid):
    geometry = Geometry.cone(np.arange(10) * 36.0, (20, 24), 5.0, 66.0, 199.0)
    return XRayTransform(geometry, grid, device="cpu")


@pytest.fixture(scope="module")
def truth(grid):
    return torch.from_numpy(make_phantom("ellipsoids", 3, 11.0).volume(grid))[None, None]


@pytest.fixture(scope="module")
def y(physics, truth):
    return physics.A(truth)


@pytest.fixture(scope="module")
def operator(physics):
    return fit_normal_operator(RampFiltered(physics), probes=2, iterations=1)


def small_network(name="light", seed=0, **more):
    options = {
        "light": {"width": 4, "scales": 2},
        "unet": {"scales": 2, "channels_per_scale": [4, 8]},
        "drunet": {"nc": [2, 4, 8, 16], "nb": 1},
    }
    torch.manual_seed(seed)
    network = make_network(name, **options[name], **more)
    with torch.no_grad():  # far enough from the identity to matter
        for parameter in network.parameters():
            parameter.mul_(1.3)
    return network.eval()


def difference(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


# -- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["light", "unet", "drunet"])
@pytest.mark.parametrize("shape", [(12, 16, 8), (7, 9, 13), (1, 5, 6)])
@torch.no_grad()
def test_networks_take_any_size_and_do_not_know_units(name, shape):
    network = small_network(name)
    x = torch.rand(2, 1, *shape)
    found = network(x)
    assert found.shape == x.shape
    assert difference(network(1e-3 * x), 1e-3 * found) < 1e-4
    assert difference(network(40.0 * x), 40.0 * found) < 1e-4


def test_the_light_network_is_light_and_begins_near_the_identity():
    network = make_network()
    x = torch.rand(1, 1, 16, 16, 16)
    assert sum(p.numel() for p in network.parameters()) < 1_500_000
    with torch.no_grad():
        assert difference(network(x), x) < 0.2


@pytest.mark.parametrize(("name", "options"), [("resnet", {}), ("light", {"depth": 3}), ("unet", {"scales": 1})])
def test_networks_that_do_not_exist_are_refused_in_a_sentence(name, options):
    with pytest.raises(ScanError, match=r"^[^\n]+$"):
        make_network(name, **options)


# -- the ramp-filtered step ----------------------------------------------------------------------------------------


def test_the_ramp_filtered_transform_has_an_exact_adjoint_and_norm_one(physics):
    ramp = RampFiltered(physics)
    x = torch.randn(1, 1, *physics.grid.shape)
    r = torch.randn_like(ramp.A(x))
    assert torch.allclose((ramp.A(x) * r).sum(), (x * ramp.A_adjoint(r)).sum(), rtol=1e-4)
    assert difference(ramp.A_adjoint_A(x), ramp.A_adjoint(ramp.A(x))) < 1e-5
    for _ in range(30):
        x = ramp.A_adjoint_A(x / x.norm())
    assert 0.8 < float(x.norm()) < 1.1


def test_a_ramp_filtered_patch_is_the_part_of_the_whole(physics):
    ramp = RampFiltered(physics)
    box = (slice(2, 9), slice(4, 12), slice(0, 8))
    patch = torch.randn(1, 1, 7, 8, 8)
    amid_zeros = torch.zeros(1, 1, *physics.grid.shape)
    amid_zeros[(..., *box)] = patch
    assert difference(ramp.restrict(box).A_adjoint_A(patch), ramp.A_adjoint_A(amid_zeros)[(..., *box)]) < 1e-4


def test_ramp_filtered_steps_come_further(physics, y, truth):
    def error(step):
        return difference(UnrolledPGD(nn.Identity(), 3, step=step, init="zeros").eval()(y, physics).detach(), truth)

    assert error("ramp") < 0.95 * error("gradient")


# -- data steps ----------------------------------------------------------------------------------------------------


def test_an_iteration_without_a_network_is_a_gradient_step(physics, y):
    x0 = FDK()(y, physics)
    found = UnrolledPGD(nn.Identity(), 1, step="gradient", step_size=0.7)(y, physics).detach()
    assert difference(found, x0 - 0.7 / physics.sqnorm * physics.A_adjoint(physics.A(x0) - y)) < 1e-5
    ramp = RampFiltered(physics)
    found = UnrolledPGD(nn.Identity(), 1, step="ramp", step_size=0.7)(y, physics).detach()
    assert difference(found, x0 - 0.7 * ramp.A_adjoint(ramp.A(x0) - ramp.measurement(y))) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("make", [UnrolledPGD, PostProcessing])
def test_the_unit_of_the_attenuation_does_not_matter(make, physics, y):
    model = make(small_network(), patch_size=8)
    assert difference(model(100 * y, physics), 100 * model(y, physics)) < 1e-4


@torch.no_grad()
def test_several_data_steps_without_a_network_are_accelerated_projected_gradient(physics, y):
    """What TV without a weight does, from the same start."""
    ramp = RampFiltered(physics)
    unrolled = UnrolledPGD(nn.Identity(), iterations=1, step_size=1.0, data_steps=6, nonnegative=True)
    start = FDK()(y, physics).clamp(min=0)
    control = TV(6, regularization=0.0)(ramp.measurement(y), ramp, init=start)
    found = unrolled(y, physics, init=start)
    plain = UnrolledPGD(nn.Identity(), iterations=6, step_size=1.0)(y, physics)
    assert float(found.min()) >= 0

    def residual(x):
        return float((ramp.A(x) - ramp.measurement(y)).norm())

    assert residual(found) < residual(plain.clamp(min=0))
    assert residual(found) == pytest.approx(residual(control), rel=0.05)  # which restarts where momentum points uphill


@pytest.mark.parametrize("start", ["tv", "least-squares"])
def test_a_quick_start_is_streamed_as_a_part_of_the_whole(start, physics, y):
    model = UnrolledPGD(nn.Identity(), iterations=1, data_steps=2, patch_size=12, passes=2, init=start)
    updates = [(u.step, u.values.clone(), u.total) for u in model.stream(y, physics)]
    quick = [u.values.clone() for u in PreconditionedTV.of(start).stream(y, physics)]
    assert [step for step, _, _ in updates] == list(range(updates[-1][2] + 1))
    for (_, values, _), expected in zip(updates, quick, strict=False):
        assert torch.allclose(values, expected, atol=1e-5 * float(expected.abs().max()))
    assert len(updates) > len(quick)


@torch.no_grad()
def test_a_quick_start_is_nearer_to_the_truth_than_fdk(physics, y, truth):
    errors = {s: float((start_volume(s, y, physics) - truth).norm()) for s in ("fdk", "least-squares", "tv")}
    assert max(errors["tv"], errors["least-squares"]) < errors["fdk"]


@torch.no_grad()
def test_a_quick_start_knows_filtered_projections(physics, y, truth):
    ramp = RampFiltered(physics)
    found, other = start_volume("tv", ramp.measurement(y), ramp), start_volume("tv", y, physics)
    assert float((found - other).norm()) < 0.1 * float(other.norm())


@torch.no_grad()
def test_a_slice_is_seen_as_a_part_of_an_object_that_goes_on():
    network = small_network()
    x = torch.rand(1, 1, 1, 12, 16)
    found = PostProcessing(network).denoise(x, 1.0)
    expected = network(x.expand(-1, -1, 16, -1, -1))
    assert found.shape == x.shape
    assert torch.allclose(found[:, :, 0], expected[:, :, 8])
    assert float((found - network(x)).abs().max()) > 1e-6


def test_copies_of_the_network_learn_apart():
    model = UnrolledPGD(small_network(), 3, tied=False)
    assert len({id(network) for network in model.networks}) == 3
    x = torch.rand(1, 1, 8, 8, 8)
    *_, last = model.unroll(x, torch.zeros_like, 1.0)
    last.square().mean().backward()
    for network in model.networks:
        assert all(p.grad is not None for p in network.parameters())


def test_gradients_reach_the_weights_and_the_steps_through_the_physics(physics, y, truth):
    model = UnrolledPGD(small_network(), 2)

    def loss():
        return (model(y, physics) - truth).square().mean() / truth.square().mean()

    loss().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters())
    # The derivative by a step is that of finite differences.
    with torch.no_grad():
        model.step_sizes[0] += 0.05
        above = loss()
        model.step_sizes[0] -= 0.1
        below = loss()
    assert float(above - below) / 0.1 == pytest.approx(float(model.step_sizes.grad[0]), rel=0.05)


def test_gradients_pass_through_a_normal_operator(operator):
    model = UnrolledPGD(small_network(), 2)
    patch = operator.patch((slice(0, 8),) * 3)
    *_, last = model.unroll(torch.rand(1, 1, 8, 8, 8), patch.apply, 1.0)
    last.square().mean().backward()
    assert float(model.step_sizes.grad.abs().min()) > 0


# -- patches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_patches_blend_into_the_whole(batch):
    x = torch.rand(1, 1, 9, 14, 11)
    out = x.clone()
    boxes = list(apply_by_patches(torch.tanh, x, out, Partition(x.shape[2:], 6), batch))
    assert torch.allclose(out, torch.tanh(x), atol=1e-6)
    assert len(boxes) == len(Partition(x.shape[2:], 6))


@torch.no_grad()
def test_one_patch_is_the_whole_volume(physics, y):
    network = small_network()
    for step in ("gradient", "ramp"):
        model = UnrolledPGD(network, 2, step=step)
        expected = model(y, physics)
        assert difference(UnrolledPGD(network, 2, step=step, patch_size=16)(y, physics), expected) < 1e-5
        of_patches = PartitionedReconstructor(model, patch_size=16, global_steps=0, init=FDK()(y, physics))
        stepped = model.step_physics(physics)
        measured = stepped.measurement(y) if isinstance(stepped, RampFiltered) else y
        assert difference(of_patches(measured, stepped), expected) < 1e-4


@torch.no_grad()
def test_a_second_pass_goes_on_from_the_first(physics, y):
    network = small_network()
    once = UnrolledPGD(network, 2)(y, physics)
    twice = UnrolledPGD(network, 2, patch_size=16, passes=2, brightness=0.05)(y, physics)
    assert difference(UnrolledPGD(network, 2)(y, physics, init=once), twice) < 1e-4


@torch.no_grad()
def test_patches_with_a_normal_operator_never_project(physics, y, operator, monkeypatch):
    model = UnrolledPGD(small_network(), 2, patch_size=8, passes=2)
    expected = model(y, physics)

    def fail(self, box):
        raise AssertionError("a patch was projected")

    monkeypatch.setattr(RampFiltered, "restrict", fail)
    with pytest.raises(AssertionError):
        model(y, physics)
    assert difference(model(y, physics, operator=operator), expected) < 0.2


@torch.no_grad()
def test_the_published_call_takes_an_unrolled_network(physics, y):
    plain = fit_normal_operator(physics, probes=2, iterations=1)
    wrapped = DiagCirculantWrapper(
        physics=physics, img_size=(1, *physics.grid.shape), scaling=1 / physics.sqnorm, device="cpu"
    )
    model = UnrolledPGD(small_network(), 2, step="gradient")
    recon = PartitionedReconstructor(base_reconstructor=model, img_size=(1, *physics.grid.shape), patch_size=8)
    exact = recon(y, physics)
    found = recon(y, wrapped, fourier_filter=plain.fourier_filter, spatial_mask=plain.spatial_mask)
    assert difference(found, exact) < 0.2
    again = recon(y, physics, operator=plain)  # steps are in units of the norm, whatever the scaling
    assert difference(again, found) < 1e-4


@torch.no_grad()
def test_complex_volumes_of_any_physics_are_stepped_and_patched():
    maps = torch.ones(1, 2, 8, 12, 8, dtype=torch.complex64)
    maps[:, 1, :, 6:] = 0.5j
    mask = (torch.rand(8, 12, 8, generator=torch.Generator().manual_seed(0)) < 0.6).float()
    physics = MultiCoilMRI(mask=mask[None, None], coil_maps=maps, img_size=(2, 8, 12, 8), three_d=True)
    x = torch.zeros(1, 2, 8, 12, 8)
    x[:, :, 2:6, 3:9, 2:6] = 1
    network = make_network(channels=2, width=4, scales=2)
    y = physics.A(x)
    model = UnrolledPGD(network, 2, step="gradient", patch_size=8, passes=2, init="zeros")
    assert difference(model(y, physics), x) < 0.8


@torch.no_grad()
def test_post_processing_works_as_the_base_of_patches(physics, y):
    network = small_network()
    recon = PartitionedReconstructor(PostProcessing(network), patch_size=8, global_steps=0)
    assert difference(recon(y, physics), PostProcessing(network, patch_size=8)(y, physics)) < 1e-4


class Before(nn.Module):
    """A network that undoes the data steps."""

    def forward(self, x):
        return x[:, 1:]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"patch_size": 16}, {"patch_size": 16, "passes": 2}])
def test_a_network_with_a_memory_is_shown_the_volume_before_the_data_steps(options, physics, y):
    start = FDK()(y, physics)
    found = UnrolledPGD(Before(), 2, memory=True, data_steps=2, **options).eval()(y, physics)
    assert difference(found, start) < 1e-5
    slice_of_it = UnrolledPGD(Before(), 1, memory=True).denoise(start[:, :, :1], 0, 1.0, 2 * start[:, :, :1])
    assert difference(slice_of_it, 2 * start[:, :, :1]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["light", "unet", "drunet"])
def test_networks_of_several_volumes_give_one_and_scale_with_them(name):
    network = small_network(name, inputs=2).eval()
    x = torch.rand(1, 2, 16, 16, 16)
    assert network(x).shape == (1, 1, 16, 16, 16)
    assert difference(network(3 * x), 3 * network(x)) < 1e-4


# -- streaming -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda n: UnrolledPGD(n, 2),
        lambda n: UnrolledPGD(n, 2, patch_size=8, batch=2),
        lambda n: UnrolledPGD(n, 2, patch_size=8, passes=2),
        lambda _: UnrolledPGD(small_network(inputs=2), 2, memory=True, patch_size=8, passes=2),
        lambda n: PostProcessing(n, patch_size=8),
    ],
)
def test_the_last_word_of_the_stream_is_the_reconstruction(make, physics, y):
    model = make(small_network())
    volume, steps, following = None, [], []
    for update in model.stream(y, physics):
        if volume is None:
            volume = update.values.clone()
            assert torch.equal(volume, FDK()(y, physics))
        volume[(..., *update.box)] = update.values
        steps.append(update.step)
        following.append(update.next_box)
    assert steps == list(range(update.total + 1))
    assert following[-1] is None
    assert None not in following[:-1]
    assert difference(model(y, physics), volume) < 1e-6


@torch.no_grad()
def test_every_data_step_tells_its_residual(physics, y):
    model = UnrolledPGD(nn.Identity(), 4, patch_size=8)
    residuals = [u.figures["residual"] for u in model.stream(y, physics) if "residual" in u.figures]
    assert len(residuals) == 4
    assert residuals == sorted(residuals, reverse=True)


@torch.no_grad()
def test_the_patch_under_the_cursor_comes_first(physics, y):
    model = UnrolledPGD(small_network(), 1, patch_size=8)
    updates = list(model.stream(y, physics, focus=(11, 15, 15)))
    assert [s.stop for s in updates[2].box] == [12, 16, 16]


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"data_steps": 0},
        {"step": "newton"},
        {"passes": 2},
        {"passes": 0},
        {"patch_size": 8, "batch": 0},
    ],
)
def test_wrong_options_are_refused_in_a_sentence(options):
    with pytest.raises(ScanError, match=r"^[^\n]+$"):
        UnrolledPGD(nn.Identity(), **options)


def test_wrong_pieces_are_refused_in_a_sentence(physics, y, operator):
    with pytest.raises(ScanError, match="keep the shape"):
        UnrolledPGD(nn.AvgPool3d(2))(y, physics)
    with pytest.raises(ScanError, match="ramp-filtered steps"):
        PartitionedReconstructor(UnrolledPGD(nn.Identity()), patch_size=8)(y, physics)
    wrapped = DiagCirculantWrapper(physics=physics, operator=operator)
    with pytest.raises(ScanError, match="without the filter"):
        UnrolledPGD(nn.Identity(), patch_size=8, passes=2)(y, wrapped)
    with pytest.raises(ScanError, match="focus"):
        UnrolledPGD(nn.Identity(), patch_size=8)(y, physics, focus=(3, 4))
    with pytest.raises(ScanError, match="X-ray transform"):
        UnrolledPGD(nn.Identity(), init="zeros")(torch.ones(1, 1, 8, 8), Denoising())
    other = XRayTransform(physics.geometry, Grid((8, 8, 8), 2.0), device="cpu")
    with pytest.raises(ScanError, match="fit it for"):
        UnrolledPGD(nn.Identity(), patch_size=4, passes=2).eval()(y, other, operator=operator)


# -- weights -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda n: UnrolledPGD(n, 2, tied=False, patch_size=8, passes=2),
        lambda n: UnrolledPGD(n, 1, step="gradient"),
        lambda n: UnrolledPGD(n, 1, data_steps=3, nonnegative=True, init="tv"),
        lambda _: UnrolledPGD(small_network(inputs=2), 2, memory=True),
        PostProcessing,
        lambda n: PostProcessing(n, init="least-squares"),
    ],
)
def test_weights_come_back_as_they_were(make, physics, y, tmp_path):
    model = make(small_network())
    file = tmp_path / "weights.safetensors"
    save_weights(model, file, card="Trained on air.", training={"seed": 3}, figures={"psnr": 30.5})
    kept = load_weights(file)
    assert torch.equal(kept.model(y, physics), model(y, physics))
    assert (kept.card, kept.training, kept.figures) == ("Trained on air.", {"seed": 3}, {"psnr": 30.5})
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_files_that_are_no_weights_are_refused_in_a_sentence(operator, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    good = tmp_path / "good.safetensors"
    save_weights(PostProcessing(small_network()), good)
    operator.save(tmp_path / "operator.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(good.read_bytes()[:200])
    (tmp_path / "text.safetensors").write_text("hello")
    with safe_open(str(good), framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wider = json.loads(metadata["model"])
    wider["network"]["options"]["width"] = 5
    save_file(tensors, tmp_path / "other.safetensors", metadata | {"model": json.dumps(wider)})
    save_file(tensors, tmp_path / "newer.safetensors", metadata | {"format": "napari-recon weights 2"})
    for name in ("operator", "torn", "text", "other", "newer", "missing"):
        with pytest.raises(ScanError, match=rf"^[^\n]*{name}[^\n]*$"):
            load_weights(tmp_path / f"{name}.safetensors")
    with pytest.raises(ScanError, match="make_network"):
        save_weights(PostProcessing(nn.Identity()), tmp_path / "x.safetensors")
    with pytest.raises(ScanError, match="could not be written"):
        save_weights(PostProcessing(small_network()), tmp_path / "none" / "x.safetensors")
