"""Reconstruction by patches: the partition, the patch problem, and the whole."""

from itertools import pairwise

import deepinv as dinv
import numpy as np
import pytest
import torch
from deepinv.models import Reconstructor

from napari_recon.physics.normal import DiagCirculantWrapper, NormalOperator, fit_normal_operator
from napari_recon.physics.xray import XRayTransform
from napari_recon.reconstruction.fdk import FDK
from napari_recon.reconstruction.partitioned import Partition, PartitionedReconstructor
from napari_recon.reconstruction.tv import TVPrior, tv_patch_solver
from napari_recon.scans.errors import ScanError
from napari_recon.scans.geometry import Geometry
from napari_recon.scans.grid import Grid

N = 24


@pytest.fixture(scope="module")
def scan():
    geometry = Geometry.cone(np.arange(24) * 15.0, (36, 36), 2.5, 66.0, 199.0)
    physics = XRayTransform(geometry, Grid((N, N, N), 1.0), device="cpu")
    truth = torch.zeros(1, 1, N, N, N)
    truth[..., 6:18, 5:19, 7:16] = 0.05
    truth[..., 9:14, 8:12, 9:14] = 0.08
    y = physics.A(truth)
    y = y + 0.02 * y.max() * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    return physics, y, truth


@pytest.fixture(scope="module")
def x_fdk(scan):
    physics, y, _ = scan
    return FDK()(y, physics)


@pytest.fixture(scope="module")
def normal(scan):
    return fit_normal_operator(scan[0], probes=6, iterations=2)


@pytest.fixture
def base(scan, x_fdk):
    return tv_patch_solver(scan[0], x_fdk, iterations=8, regularization=2e-3)


class Counted(dinv.physics.LinearPhysics):
    """A physics that counts, and that cannot be restricted to a box."""

    def __init__(self, physics):
        super().__init__(img_size=physics.img_size)
        self.inner, self.calls = physics, {"A": 0, "A_adjoint": 0}

    def A(self, x, **kwargs):
        self.calls["A"] += 1
        return self.inner.A(x)

    def A_adjoint(self, y, **kwargs):
        self.calls["A_adjoint"] += 1
        return self.inner.A_adjoint(y)


class Context(Reconstructor):
    """Gives back the context that the patch's physics holds, plus a constant."""

    def __init__(self, add=0.0):
        super().__init__()
        self.add = add

    def forward(self, y, physics, **kwargs):
        return physics.context + self.add


# -- the partition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "patch", "stride"),
    [
        ((24, 24, 24), 12, None),
        ((23, 30, 17), (8, 16, 5), None),
        ((23, 30, 17), 7, 7),
        ((23, 30, 17), 9, (1, 4, 9)),
        ((5, 40, 40), 16, None),
        ((1, 33, 20), 8, None),
        ((10, 10, 10), 64, None),
        ((30, 21), 8, 3),
        ((7,), 1, None),
    ],
)
def test_windows_sum_to_one_everywhere(shape, patch, stride):
    partition = Partition(shape, patch, stride)
    total = torch.zeros(shape)
    for box in partition.boxes:
        weights = partition.weights(box)
        assert weights.shape == partition.patch_shape
        assert bool((weights > 0).all())
        assert all(0 <= s.start < s.stop <= n for s, n in zip(box, shape, strict=True))
        total[box] += weights
    assert torch.allclose(total, torch.ones(shape), atol=1e-5)


def test_windows_of_ones_own_sum_to_one_too():
    partition = Partition((20, 20), 8, 5, window=lambda n: torch.arange(1, n + 1))
    total = torch.zeros(20, 20)
    for box in partition.boxes:
        total[box] += partition.weights(box)
    assert torch.allclose(total, torch.ones(20, 20), atol=1e-5)


def test_boxes_have_one_shape_and_overlap_by_half():
    partition = Partition((64, 64, 64), 32)
    assert {tuple(s.stop - s.start for s in box) for box in partition.boxes} == {(32, 32, 32)}
    assert len(partition) == 27


def test_sizes_that_leave_gaps_are_one_sentence():
    with pytest.raises(ScanError, match="leaves out"):
        Partition((20, 20, 20), 8, 9)
    with pytest.raises(ScanError, match="patch_size"):
        Partition((20, 20, 20), (8, 8))
    with pytest.raises(ScanError, match="window"):
        Partition((20, 20), 8, window=torch.zeros)


# -- the paper's calls ---------------------------------------------------------------------------------------------


def test_the_papers_two_calls(scan, normal):
    physics, y, truth = scan
    device = "cpu"
    recon = PartitionedReconstructor(
        base_reconstructor=dinv.optim.PGD(
            data_fidelity=dinv.optim.L2(),
            prior=TVPrior(),
            lambda_reg=2e-4 * physics.sqnorm,
            stepsize=1 / physics.sqnorm,
            max_iter=8,
        ),
        img_size=(1, N, N, N),
        patch_size=12,
        stride=6,
    )
    wrapped = DiagCirculantWrapper(physics=physics, img_size=(1, N, N, N), scaling=1.0, device=device)
    x_exact = recon(y, physics)
    x_h = recon(y, wrapped, fourier_filter=normal.fourier_filter, spatial_mask=normal.spatial_mask)
    x_fdk = FDK()(y, physics)
    for x in (x_exact, x_h):
        assert x.shape == truth.shape
        assert (x - truth).norm() < 0.8 * (x_fdk - truth).norm()
    assert (x_h - x_exact).norm() < 0.3 * (x_exact - x_fdk).norm()


@pytest.mark.parametrize("form", ["exact", "H"])
def test_a_patch_as_large_as_the_volume_is_the_global_algorithm(scan, x_fdk, normal, base, form):
    physics, y, _ = scan
    recon = PartitionedReconstructor(base, (N, N, N), patch_size=2 * N, global_steps=0)
    if form == "exact":
        expected = base(y, physics, init=(x_fdk, x_fdk))
        found = recon(y, physics)
    else:
        wrapper = DiagCirculantWrapper(physics, operator=normal)
        base.prior[0].reset()
        # With H in the step only: its gradient at x0 is the exact one.
        b = normal.apply(x_fdk) - physics.A_adjoint(physics.A(x_fdk) - y)
        expected = base(b, wrapper, init=(x_fdk, x_fdk))
        found = recon(y, wrapper)
    assert (found - expected).norm() < 1e-3 * (expected - x_fdk).norm()


def test_patches_that_overshoot_together_are_held_back(monkeypatch):
    """Many small patches of one slice, all with the same reason to move; one patch alone is left as it is."""
    from napari_recon.reconstruction import partitioned

    geometry = Geometry.cone(np.arange(10) * 36.0, (1, 60), 2.5, 132.0, 398.0)
    physics = XRayTransform(geometry, Grid((1, 40, 40), 1.0), device="cpu")
    disc = torch.zeros(1, 1, 1, 40, 40)
    disc[..., 10:30, 10:30] = 0.05
    y = physics.A(disc)
    base = tv_patch_solver(physics, disc, iterations=20, regularization=1e-4)

    def last_residual(patch):
        recon = PartitionedReconstructor(base, patch_size=patch, init="zeros", passes=2, global_steps=1)
        return [u.figures for u in recon.stream(y, physics)][-1]["residual"]

    held, alone = last_residual(8), last_residual(40)
    monkeypatch.setattr(partitioned, "_hold_back", lambda *_: False)
    assert held < 0.8 * last_residual(8)
    assert alone == pytest.approx(last_residual(40), rel=1e-3)


@pytest.mark.parametrize("form", ["exact", "H", "scaled H"])
def test_gradient_on_a_patch_is_that_of_the_whole(scan, x_fdk, normal, form):
    """At the context, A(context) - b is S Aᵀ(A x0 - y), however AᵀA is approximated."""
    physics, y, _ = scan
    seen = []

    class Look(Reconstructor):
        def forward(self, b, patch, **kwargs):
            seen.append((dinv.optim.L2().grad(patch.context, b, patch), b, patch))
            return patch.context

    scaling = 0.01 if form == "scaled H" else 1.0
    meant = physics if form == "exact" else DiagCirculantWrapper(physics, scaling=scaling, operator=normal)
    boxes = [u.next_box for u in PartitionedReconstructor(Look(), patch_size=12, global_steps=0).stream(y, meant)][:-1]
    gradient = physics.A_adjoint(physics.A(x_fdk) - y)
    for box, (found, _, _) in zip(boxes, seen, strict=True):
        assert torch.allclose(found, scaling * gradient[(..., *box)], atol=1e-4 * scaling * float(gradient.abs().max()))


def test_exact_patches_with_and_without_restriction_agree(scan, x_fdk, base):
    physics, y, _ = scan
    recon = PartitionedReconstructor(base, patch_size=16, init=x_fdk)
    assert torch.allclose(recon(y, physics), recon(y, Counted(physics)), atol=1e-5 * float(x_fdk.max()))


def test_with_h_no_patch_touches_the_projections(scan, x_fdk, normal, base):
    physics, y, _ = scan
    counted = Counted(physics)
    recon = PartitionedReconstructor(base, patch_size=12, init=x_fdk, passes=2, global_steps=0)
    recon(y, DiagCirculantWrapper(counted, operator=normal))
    assert counted.calls == {"A": 3, "A_adjoint": 2}  # one each a pass, and the residual at the end
    recon.global_steps = 3
    recon(y, DiagCirculantWrapper(counted, operator=normal))
    assert counted.calls == {"A": 6 + 3 + 1, "A_adjoint": 4 + 3 + 1}  # one each a global step more


def test_a_solution_stays_where_it_is(scan, normal):
    physics, _, truth = scan
    pgd = dinv.optim.PGD(data_fidelity=dinv.optim.L2(), stepsize=1 / physics.sqnorm, max_iter=5)
    recon = PartitionedReconstructor(pgd, patch_size=12, init=truth)
    for meant in (physics, DiagCirculantWrapper(physics, operator=normal)):
        assert torch.allclose(recon(physics.A(truth), meant), truth, atol=1e-5)


def test_many_small_patches_do_not_all_mend_the_same_error(scan):
    """A start that is wrong as a whole: each patch alone would mend it, and together they would overshoot."""
    geometry = Geometry.cone(np.arange(60) * 6.0, (1, 96), 1.0, 410.0, 550.0)
    physics = XRayTransform(geometry, Grid((1, 64, 64), 0.75), device="cpu")
    z = torch.linspace(-1, 1, 64)
    truth = 0.02 * (z[:, None] ** 2 + z**2 < 0.7).float()[None, None, None]
    y, start = physics.A(truth), 0.7 * truth
    pgd = dinv.optim.PGD(data_fidelity=dinv.optim.L2(), stepsize=1 / physics.sqnorm, max_iter=20)

    def error(global_steps):
        recon = PartitionedReconstructor(pgd, patch_size=8, init=start, global_steps=global_steps)
        return float((recon(y, physics) - truth).norm() / truth.norm())

    assert error(0) > 0.3  # worse than the start, which is off by 0.3
    assert error(4) < 0.15


# -- the stream ----------------------------------------------------------------------------------------------------


def test_stream_tells_everything(scan, x_fdk, normal, base):
    physics, y, _ = scan
    recon = PartitionedReconstructor(base, patch_size=12, passes=2, global_steps=0)
    shown, promised, residuals, boxes = None, None, [], []
    for update in recon.stream(y, physics, operator=normal):
        if update.step == 0:
            shown = update.values.clone()
            assert torch.allclose(shown, x_fdk)
        else:
            assert update.box == promised
            shown[(..., *update.box)] = update.values
            boxes.append(update.box)
            assert update.figures["data_term"] < 0
            assert 0 < update.figures["change"] < 1
        promised = update.next_box
        if "residual" in update.figures:
            residuals.append(update.figures["residual"])
    assert promised is None
    assert len(boxes) == update.total == update.step == 54
    assert all(boxes.count(box) == 2 for box in boxes)
    assert residuals == sorted(residuals, reverse=True)
    assert len(residuals) == 3
    assert residuals[-1] == pytest.approx(float((physics.A(shown) - y).norm() / y.norm()), rel=1e-3)
    assert torch.allclose(shown, recon(y, physics, operator=normal), atol=1e-6)


def test_what_is_shown_is_the_context_where_nothing_was_done(scan, x_fdk):
    physics, y, _ = scan
    recon = PartitionedReconstructor(Context(add=1.0), patch_size=12, init=x_fdk, global_steps=0)
    for update in recon.stream(y, physics):
        if update.step == 0:
            shown = update.values
        assert bool((shown >= x_fdk - 1e-5).all())
        assert bool((shown <= x_fdk + 1 + 1e-5).all())
    assert torch.allclose(shown, x_fdk + 1, atol=1e-5)  # windows that sum to one add the constant once


def test_nearest_patches_come_first(scan, x_fdk):
    physics, y, _ = scan
    recon = PartitionedReconstructor(Context(), patch_size=12, init=x_fdk)

    def order(focus):
        boxes = [u.next_box for u in recon.stream(y, physics, focus=focus)][:-1]
        return [tuple((s.start + s.stop - 1) / 2 for s in box) for box in boxes]

    for focus in [(0, 0, 0), (23, 12, 3)]:
        distances = [sum((a - b) ** 2 for a, b in zip(middle, focus, strict=True)) for middle in order(focus)]
        assert distances == sorted(distances)
    assert order(None)[0] == (11.5, 11.5, 11.5)


def test_focus_steers_a_running_job(scan, x_fdk):
    physics, y, _ = scan
    recon = PartitionedReconstructor(Context(), patch_size=12, init=x_fdk)
    where = [(0, 0, 0)]
    stream = recon.stream(y, physics, focus=lambda: where[0])
    assert next(stream).next_box == (slice(0, 12),) * 3
    where[0] = (23, 23, 23)
    assert next(stream).next_box == (slice(12, 24),) * 3
    where[0] = None
    assert next(stream).next_box == (slice(6, 18),) * 3


def test_admm_by_any_name_starts_without_a_dual(scan, x_fdk, normal):
    """deepinv makes it by its class or by its builder; its second iterate is no volume."""
    physics, y, _ = scan
    options = {"data_fidelity": dinv.optim.L2(), "prior": TVPrior(), "max_iter": 3}
    step = 20 / physics.sqnorm
    built = dinv.optim.optim_builder("ADMM", params_algo={"stepsize": step, "lambda": 2e-2}, **options)
    named = dinv.optim.ADMM(stepsize=step, lambda_reg=2e-2, **options)
    first, second = (
        PartitionedReconstructor(base, patch_size=16, init=x_fdk)(y, physics, operator=normal)
        for base in (built, named)
    )
    assert torch.equal(first, second)


# -- batches of patches --------------------------------------------------------------------------------------------


def solver(name, physics, **options):
    step = (1 if name in ("PGD", "FISTA") else 20) / physics.sqnorm
    return getattr(dinv.optim, name)(
        data_fidelity=dinv.optim.L2(), prior=TVPrior(), lambda_reg=2e-2, stepsize=step, max_iter=5, **options
    )


@pytest.mark.parametrize(
    ("name", "form"),
    [("PGD", "exact"), ("FISTA", "exact"), ("PGD", "H"), ("FISTA", "H"), ("HQS", "H"), ("ADMM", "paper")],
)
def test_batches_of_patches_give_the_same(scan, x_fdk, normal, name, form):
    physics, y, _ = scan
    y, start = torch.cat([y, 0.3 * y]), torch.cat([x_fdk, 0.3 * x_fdk])  # two volumes, of different brightness
    recon = PartitionedReconstructor(solver(name, physics), patch_size=(24, 12, 12), init=start, passes=2)
    if form != "exact":
        h = NormalOperator(normal.spatial_mask, normal.fourier_filter, form == "H")
        physics = DiagCirculantWrapper(physics, operator=h, max_iter=20, tol=1e-2)
    expected = recon(y, physics)
    for recon.batch in (4, None):
        found = recon(y, physics)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() < 1e-4 * other.norm()


def test_a_batch_is_the_nearest_patches_and_updates_stay_single(scan, x_fdk, normal):
    physics, y, _ = scan
    sizes = []

    class Look(Context):
        def forward(self, b, patch, **kwargs):
            assert b.shape == patch.context.shape
            sizes.append(len(b))
            return super().forward(b, patch)

    def boxes(batch):
        recon = PartitionedReconstructor(Look(), patch_size=12, init=x_fdk, batch=batch)
        updates = list(recon.stream(y, physics, focus=(3, 2, 1), operator=normal))
        assert [u.step for u in updates] == list(range(28))
        assert all(u.box == before.next_box for before, u in pairwise(updates))
        assert updates[-1].next_box is None
        return [u.box for u in updates[1:]]

    assert boxes(1) == boxes(5) == boxes(None)
    assert sizes == [1] * 27 + [5] * 5 + [2] + [27]


def test_focus_is_heard_between_batches(scan, x_fdk):
    physics, y, _ = scan
    where = [(0, 0, 0)]
    stream = PartitionedReconstructor(Context(), patch_size=12, init=x_fdk, batch=2).stream(
        y, physics, focus=lambda: where[0]
    )
    assert next(stream).next_box == (slice(0, 12),) * 3
    where[0] = (23, 23, 23)
    assert sum(s.start for s in next(stream).next_box) == 6  # of the batch that was begun
    assert next(stream).next_box == (slice(12, 24),) * 3


def test_a_stream_ended_amid_a_batch_has_shown_what_was_told(scan, x_fdk):
    physics, y, _ = scan
    stream = PartitionedReconstructor(Context(add=1.0), patch_size=12, init=x_fdk, batch=None, global_steps=0).stream(
        y, physics
    )
    shown = next(stream).values
    box = next(stream).box
    stream.close()
    changed = (shown != x_fdk)[0, 0]
    assert bool(changed[box].all())
    changed[box] = False
    assert not bool(changed.any())


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64],
)
def test_total_variation_treats_every_volume_of_a_batch_by_itself(dtype):
    """What a batch of patches relies on; float32 is computed by the CPU's kernels, float64 as on a GPU."""
    easy = torch.zeros(1, 1, 8, 9, 10, dtype=dtype)
    easy[..., 4:] = 1
    hard = torch.randn(1, 1, 8, 9, 10, generator=torch.Generator().manual_seed(0), dtype=dtype)

    def prox(x, *weights):
        return TVPrior(60, tolerance=1e-2).prox(x, gamma=torch.tensor(weights, dtype=dtype))

    each = torch.cat([prox(easy, 0.1), prox(hard, 0.3)])
    assert torch.allclose(prox(torch.cat([easy, hard]), 0.1, 0.3), each, atol=1e-6)


def test_weight_of_total_variation_can_be_learnt():
    x = torch.randn(1, 1, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor(0.2, requires_grad=True)
    TVPrior(50).prox(x, gamma=weight).square().sum().backward()
    assert weight.grad < 0


# -- nothing is computed twice -------------------------------------------------------------------------------------


@pytest.fixture
def cropped(monkeypatch):
    """The shapes of patches for which the filter was cropped, in order."""
    shapes = []
    crop = NormalOperator._crop_filter

    def counted(self, spectrum, shape):
        shapes.append(shape)
        return crop(self, spectrum, shape)

    monkeypatch.setattr(NormalOperator, "_crop_filter", counted)
    return shapes


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("given", ["operator", "tensors"])
def test_filters_of_patches_are_made_once(scan, x_fdk, normal, base, cropped, given, batch):
    physics, y, _ = scan
    fresh = NormalOperator(normal.spatial_mask, normal.fourier_filter)
    options = {"operator": fresh}
    if given == "tensors":
        options = {"fourier_filter": normal.fourier_filter, "spatial_mask": normal.spatial_mask}
    recon = PartitionedReconstructor(base, patch_size=12, init=x_fdk, passes=3, batch=batch)
    recon(y, DiagCirculantWrapper(physics), **options)
    assert cropped == [(12, 12, 12)]
    if given == "operator":
        recon(y, DiagCirculantWrapper(physics), **options)
        recon(y, physics, **options)
        assert cropped == [(12, 12, 12)]  # nor for the next stream


def test_patches_take_no_copy_of_the_mask(normal):
    box = (slice(3, 15), slice(0, 12), slice(12, 24))
    patch = normal.patch(box)
    assert patch.spatial_mask.untyped_storage().data_ptr() == normal.spatial_mask.untyped_storage().data_ptr()


def test_filters_of_patches_move_with_the_operator(normal, cropped):
    fresh = NormalOperator(normal.spatial_mask, normal.fourier_filter)
    box = (slice(0, 12),) * 3
    fresh.patch(box)
    moved = fresh.to("meta")
    assert moved.patch(box).fourier_filter.device.type == "meta"
    assert len(cropped) == 1


# -- other bases, other physics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FISTA", "GD", "ADMM", "HQS", "DRS"])
def test_other_optimisers_of_deepinv(scan, x_fdk, normal, name):
    physics, y, truth = scan
    prior = dinv.optim.ZeroPrior() if name == "GD" else TVPrior(20)
    step = 1 / physics.sqnorm if name in ("FISTA", "GD") else 20 / physics.sqnorm
    optimiser = getattr(dinv.optim, name)(
        data_fidelity=dinv.optim.L2(), prior=prior, lambda_reg=2e-2, stepsize=step, max_iter=6
    )
    x = PartitionedReconstructor(optimiser, patch_size=16, init=x_fdk)(y, physics, operator=normal)
    assert (physics.A(x) - y).norm() < (physics.A(x_fdk) - y).norm()
    assert (x - truth).norm() < 1.2 * (x_fdk - truth).norm()


def test_pseudo_inverse_of_a_patch_starts_at_the_context(scan, x_fdk, normal):
    physics, y, _ = scan

    class PseudoInverse(Reconstructor):
        def forward(self, b, patch, **kwargs):
            return patch.A_dagger(b, max_iter=3)

    x = PartitionedReconstructor(PseudoInverse(), patch_size=16, init=x_fdk)(y, physics, operator=normal)
    assert (physics.A(x) - y).norm() < 0.9 * (physics.A(x_fdk) - y).norm()


def test_batches_and_two_dimensions():
    """deepinv's own 2D tomography, two images at a time."""
    physics = dinv.physics.Tomography(angles=40, img_width=32, circle=False, normalize=True)
    truth = torch.zeros(2, 1, 32, 32)
    truth[0, :, 8:20, 10:22] = 1
    truth[1, :, 12:28, 6:18] = 0.5
    with torch.no_grad():
        y = physics.A(truth)
        normal = fit_normal_operator(physics, (1, 32, 32), probes=24)
        pgd = dinv.optim.PGD(data_fidelity=dinv.optim.L2(), prior=TVPrior(), lambda_reg=1e-3, stepsize=0.9, max_iter=10)
        recon = PartitionedReconstructor(pgd, (1, 32, 32), patch_size=16)
        approximate = recon(y, physics, operator=normal)
        physics.img_size = (1, 32, 32)
        exact = recon(y, physics)
    for x in (exact, approximate):
        assert (physics.A(x) - y).norm() < 0.05 * y.norm()
    assert (exact - approximate).norm() < 0.1 * exact.norm()


def test_bad_input_is_one_sentence(scan, x_fdk, normal, base):
    physics, y, _ = scan
    recon = PartitionedReconstructor(base, (N, N, N), patch_size=12)
    with pytest.raises(ScanError, match="no λ and m yet"):
        recon(y, DiagCirculantWrapper(physics=physics, img_size=(N, N, N)))
    with pytest.raises(ScanError, match="made without a physics"):
        recon(y, DiagCirculantWrapper(img_size=(N, N, N), operator=normal))
    with pytest.raises(ScanError, match="is for volumes"):
        PartitionedReconstructor(base, (N, N, N + 1))(y, physics)
    with pytest.raises(ScanError, match="start 'fbp'"):
        recon(y, physics, init="fbp")
    with pytest.raises(ScanError, match="at least one pass"):
        PartitionedReconstructor(base, passes=0)
    with pytest.raises(ScanError, match="at least one patch"):
        PartitionedReconstructor(base, batch=0)
    with pytest.raises(ScanError, match="focus"):
        recon(y, physics, focus=(1, 2))

    class Cropping(Reconstructor):
        def forward(self, b, patch, **kwargs):
            return b[..., 1:]

    with pytest.raises(ScanError, match="keep the shape"):
        PartitionedReconstructor(Cropping(), patch_size=12)(y, physics)
