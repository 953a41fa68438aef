"""How much to regularise, told from a sweep over τ on a part of the scan."""

import json
import math

import numpy as np
import pytest

from napari_recon.jobs import Control, ReconstructionJob, RegularizationJob, run_job
from napari_recon.jobs.job import SIRTParameters
from napari_recon.jobs.messages import Finished, Progress, VolumeReady
from napari_recon.jobs.regularization import LARGEST, VALUES, Row, choose, middle_slab
from napari_recon.jobs.stages import Prepared
from napari_recon.learning.simulate import simulate
from napari_recon.scans import Geometry, Grid

ANGLES = np.arange(0, 360, 10.0)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """The same object with few photons and with many."""
    folder = tmp_path_factory.mktemp("scans")
    return {n: simulate("blobs", folder / str(n), size=24, views=20, seed=1, photons=n) for n in (500, 50_000)}


def suggestion(scan, prepared=None, **fields):
    messages = list(run_job(RegularizationJob(scan=scan, device="cpu", **fields), Control(), prepared))
    assert isinstance(messages[-1], Finished), messages[-1]
    return messages, messages[-1].figures, messages[-1].provenance["suggestion"]


# -- the job -------------------------------------------------------------------------------------------------------


def test_the_noisier_scan_is_regularised_more(scans):
    noisy, clean = (suggestion(scans[n])[1] for n in (500, 50_000))
    assert noisy["noise"] > 3 * clean["noise"]
    assert noisy["regularization"] > 2 * clean["regularization"]


def test_the_sweep_goes_from_strong_to_weak_and_is_told(scans):
    messages, figures, told = suggestion(scans[500])
    sweep = told["sweep"]
    taus, residuals, variations = ([row[name] for row in sweep] for name in ("regularization", "residual", "variation"))
    assert taus == list(VALUES[: len(taus)])
    assert residuals == sorted(residuals, reverse=True)
    assert variations[-1] > 1
    steps = [m for m in messages if isinstance(m, Progress) and m.name == "sweep"]
    assert [m.step for m in steps] == list(range(1, len(sweep) + 1))
    assert not any(isinstance(m, VolumeReady) for m in messages)
    assert f"τ = {figures['regularization']:g} " in told["sentence"]
    assert told["sentence"].endswith(".")
    json.dumps(messages[-1].provenance)


def test_what_is_kept_for_the_reconstruction_stays(scans):
    prepared = Prepared()
    list(run_job(ReconstructionJob(scan=scans[500], parameters=SIRTParameters(iterations=1)), Control(), prepared))
    before = dict(prepared.things)
    suggestion(scans[500], prepared)
    assert prepared.things == before


def test_a_large_scan_is_binned(scans, monkeypatch):
    monkeypatch.setattr("napari_recon.jobs.regularization.LARGEST", 24**3)
    _, figures, _ = suggestion(scans[500], shape=(48, 48, 48))
    assert figures["binning"] > 1


# -- the rules -----------------------------------------------------------------------------------------------------


def rows_of(residuals, variations):
    return [Row(tau, r, v) for tau, r, v in zip(VALUES, residuals, variations, strict=False)]


def test_the_residual_at_the_noise_decides():
    tau, sentence = choose(rows_of([8, 4, 2, 0.5], [1, 1.1, 1.2, 1.3]), 1.0)
    assert tau == pytest.approx(math.sqrt(VALUES[2] * VALUES[3]), rel=0.05)  # halfway, in logarithms
    assert "down at the noise" in sentence


def test_what_no_value_explains_decides_where_it_is_more_than_noise():
    tau, sentence = choose(rows_of([16, 8, 6, 4.1, 4], [1, 1.1, 1.2, 1.5, 2]), 1.0)
    assert tau == pytest.approx(VALUES[2], rel=0.05)
    assert "6.0 times the noise" in sentence


@pytest.mark.parametrize("noise", [0.0, math.nan])
def test_noise_that_is_not_known_is_not_spoken_of(noise):
    rows = rows_of([16, 8, 6, 4.1, 4], [1, 1.1, 1.2, 1.5, 2])
    tau, sentence = choose(rows, noise)
    assert tau == choose(rows, 1.0)[0]
    assert "noise" not in sentence


def test_the_strongest_is_taken_where_all_explain_the_data():
    assert choose(rows_of([0.9, 0.8, 0.7], [1, 1.1, 1.2]), 1.0)[0] == VALUES[0]


# -- the part ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry.cone(ANGLES, (200, 180), 0.5, 66.0, 199.0),
        Geometry.cone(ANGLES, (201, 180), 0.5, 66.0, 199.0, axis_offset=7.0),
        Geometry.parallel(ANGLES, (150, 180), 0.3),
    ],
    ids=["cone", "cone-offset", "parallel"],
)
def test_the_rows_of_a_slab_see_nothing_else(geometry):
    import torch

    from napari_recon.physics import XRayTransform

    grid = geometry.default_grid(shape=(50, 40, 40))
    rows, kept, slab = middle_slab(geometry, grid)
    assert slab.shape == (12, 40, 40)
    assert rows.stop - rows.start == kept.detector_shape[0] > 3
    full = torch.zeros(1, 1, *grid.shape)
    inside = slice(19, 31)
    torch.manual_seed(0)
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, 40)], indexing="ij")
    cylinder = torch.rand(1, 1, 12, 40, 40) * ((x**2 + y**2) < 0.9)
    full[:, :, inside] = cylinder
    full[:, :, :19] = full[:, :, 31:] = 0
    few = slice(0, 36, 6)
    seen = XRayTransform(geometry.select(few), grid, "cpu").A(full)[:, :, rows]
    part = XRayTransform(kept.select(few), slab, "cpu").A(cylinder)
    torch.testing.assert_close(part, seen, rtol=1e-3, atol=1e-3)
    beyond = torch.rand(1, 1, *grid.shape) * ((x**2 + y**2) < 0.9)
    beyond[:, :, inside] = 0
    assert not XRayTransform(geometry.select(few), grid, "cpu").A(beyond)[:, :, rows].any()


def test_no_slab_is_cut_where_rays_cross_it():
    cone = Geometry.cone(ANGLES, (200, 180), 0.5, 66.0, 199.0)
    grid = cone.default_grid(shape=(50, 40, 40))
    rising = cone.vectors.copy()
    rising[:, [2, 5]] += np.linspace(-20, 20, len(rising))[:, None]
    assert middle_slab(Geometry(rising, cone.detector_shape), grid) is None
    fan = Geometry.cone(ANGLES, (1, 180), 0.5, 66.0, 199.0)
    assert middle_slab(fan, fan.default_grid()) is None
    assert middle_slab(cone, Grid((16, 40, 40), grid.voxel_size)) is None  # thin already
    assert LARGEST > 40**3
