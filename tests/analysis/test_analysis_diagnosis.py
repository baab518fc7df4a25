"""A diagnosis finds what was hidden in synthetic weights, and nothing where nothing was."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from openmm_bg.analysis import diagnose
from openmm_bg.errors import InputError


def two_basins(rng: np.random.Generator, target: float, generator: float, *, n: int = 20_000, chains: int = 16):
    """Draws and held-out frames of two laws that differ in the share of one basin alone, with exact weights."""
    draws, frames = rng.random(n) < generator, rng.random(50 * chains) < target
    inside, outside = math.log(target / generator), math.log((1 - target) / (1 - generator))
    regions = {"the basin": (draws, frames), "the rest": (~draws, ~frames)}
    return np.where(draws, inside, outside), np.where(frames, inside, outside), regions


def noise(rng: np.random.Generator, n: int) -> np.ndarray:
    return 0.1 * rng.standard_normal(n)


def test_a_basin_that_is_missed_is_named_with_its_numbers():
    log_w, held, regions = two_basins(np.random.default_rng(0), target=0.1, generator=0.001)
    found = diagnose(log_w, held, regions=regions, chains=16)
    basin, rest = found.regions
    assert abs(basin.share - 0.1) < 3 * basin.share_error < 0.05
    assert abs(basin.drawn - 0.001) < 3 * basin.drawn_error < 0.001
    assert basin.ratio == pytest.approx(100, rel=0.3)
    assert basin.is_missed and not rest.is_missed
    text = found.findings["basins"]
    assert text.startswith("Missed: the basin (") and "% of the draws, mean p/q there" in text and "rest" not in text


def test_a_basin_the_draws_never_see_is_missed():
    rng = np.random.default_rng(1)
    _, held, regions = two_basins(rng, target=0.1, generator=0.001)
    never = {"the basin": (np.zeros(20_000, dtype=bool), regions["the basin"][1])}
    found = diagnose(noise(rng, 20_000), held, regions=never, chains=16)
    assert found.regions[0].is_missed and found.regions[0].drawn == 0 < found.regions[0].drawn_error


def test_a_generator_that_is_right_misses_nothing():
    rng = np.random.default_rng(2)
    for chains in (1, 16):
        for _ in range(100):
            log_w, held, regions = two_basins(rng, target=0.05, generator=0.05, n=2000, chains=chains)
            found = diagnose(log_w + noise(rng, 2000), held + noise(rng, len(held)), regions=regions, chains=chains)
            assert not any(region.is_missed for region in found.regions)
    assert found.findings["basins"] == "No basin that the held-out frames visit often is missed."


def test_a_generator_that_is_poor_everywhere_misses_nothing_in_particular():
    rng = np.random.default_rng(3)
    _, held, regions = two_basins(rng, target=0.3, generator=0.3)
    found = diagnose(2 * rng.standard_normal(20_000), held + 4 + rng.standard_normal(len(held)), regions=regions)
    assert found.ess < 0.05 and found.regions[0].ratio > 5
    assert not any(region.is_missed for region in found.regions)


def test_one_visit_of_one_chain_is_no_evidence():
    rng = np.random.default_rng(4)
    frames = np.zeros((16, 50), dtype=bool)
    frames[3, 20:40] = True
    regions = {"the basin": (rng.random(20_000) < 1e-3, frames.ravel())}
    held = np.where(frames.ravel(), 3.0, 0.0)
    found = diagnose(noise(rng, 20_000), held, regions=regions, chains=16)
    assert not found.regions[0].is_missed
    assert "Visited too rarely by the held-out frames to say: the basin" in found.findings["basins"]
    # the same frames, if they were independent, would be
    order = rng.permutation(800)
    apart = {"the basin": (regions["the basin"][0], frames.ravel()[order])}
    assert diagnose(noise(rng, 20_000), held[order], regions=apart, chains=16).regions[0].is_missed


def test_frames_that_are_not_in_equilibrium_are_not_believed():
    """Frames that all but avoid the rest, while the weights say that target and generator are one."""
    rng = np.random.default_rng(10)
    log_w, _, regions = two_basins(rng, target=0.2, generator=0.2)
    frames = rng.random(800) < 0.9
    found = diagnose(log_w, noise(rng, 800), regions={"the basin": (regions["the basin"][0], frames)}, chains=16)
    assert found.regions[0].is_doubtful and not found.regions[0].is_missed
    assert "The held-out frames are not in equilibrium" in found.findings["basins"]
    # the mean p/q of a basin is at least the ratio of its shares
    log_w, held, regions = two_basins(rng, target=0.5, generator=0.1)
    assert diagnose(log_w, held, regions=regions).regions[0].ratio >= 4.5


def test_the_coordinate_that_drives_the_weights_is_named_first():
    rng = np.random.default_rng(5)
    n = 20_000
    psi, phi = rng.uniform(-np.pi, np.pi, (2, n))
    bond = 0.15 + 0.003 * rng.standard_normal(n)
    log_w = 0.4 * np.sin(psi) + 40 * (bond - 0.15) + 0.2 * rng.standard_normal(n)
    variances = np.array([0.08, 0.0144, 0.04])
    found = diagnose(
        log_w, np.zeros(50), coordinates=np.stack([phi, psi, bond], 1), names=["phi", "psi", "CA-C bond"],
        angular=[True, True, False],
    )  # fmt: skip
    first, second, third = found.dependences
    assert (first.name, second.name, third.name) == ("psi", "CA-C bond", "phi")
    # twenty bins keep all but a percent of a sine
    assert first.explained == pytest.approx(variances[0] / variances.sum(), abs=0.02)
    assert second.explained == pytest.approx(variances[1] / variances.sum(), abs=0.02)
    assert abs(third.explained) < 4 * third.error < 0.01
    assert first.thinnest == pytest.approx(90, abs=10) and first.unit == "degrees"
    assert second.thinnest == pytest.approx(0.15 + 0.003 * 1.96, abs=5e-4) and second.unit == "nm"
    text = found.findings["coordinates"]
    assert text.startswith("log w still depends most on psi (") and "CA-C bond" in text and "phi" not in text


def test_coordinates_that_explain_nothing_are_not_blamed():
    rng = np.random.default_rng(6)
    n = 2000  # without the correction twenty bins would explain a percent
    names = [f"c{i}" for i in range(200)]
    found = diagnose(
        rng.standard_normal(n), np.zeros(50), coordinates=rng.standard_normal((n, 200)), names=names
    )  # fmt: skip
    explained = np.array([d.explained for d in found.dependences])
    assert abs(explained.mean()) < 4 * explained.std() / math.sqrt(200)
    assert explained.std() == pytest.approx(found.dependences[-1].error, rel=0.2)
    few = diagnose(rng.standard_normal(n), np.zeros(50), coordinates=rng.standard_normal((n, 3)), names=names[:3])
    assert few.findings["coordinates"] == "No single coordinate explains a percent of the variance of log w."


def test_clashes_do_not_hide_what_costs_the_weights():
    rng = np.random.default_rng(7)
    x = rng.uniform(-np.pi, np.pi, (5000, 1))
    log_w = np.sin(x[:, 0]) + 0.1 * rng.standard_normal(5000)
    log_w[:10], log_w[10:20] = -1e8, -np.inf
    x[10:20] = np.nan
    found = diagnose(log_w, np.zeros(50), coordinates=x, names=["x"])
    assert found.dependences[0].explained > 0.85  # as they stand, ten draws would be all the variance
    assert found.outside == 10 and "10 draws fell outside the support." in found.findings["effective sample size"]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (0.2, "their variance is finite, and the figure holds"),
        (0.6, "their variance is infinite, so the figure falls"),
        (0.9, "neither this figure nor reweighted averages can be trusted"),
    ],
)
def test_the_tail_is_put_in_words(shape, words):
    # quantiles of a Pareto law in place of draws: no luck in it
    log_w = -shape * np.log((np.arange(40_000) + 0.5) / 40_000)
    found = diagnose(log_w, np.zeros(10))
    assert found.pareto_k == pytest.approx(shape, abs=0.05)
    assert words in found.findings["tail of the weights"]


def test_a_diagnosis_is_strict_json():
    rng = np.random.default_rng(8)
    held = np.zeros(40)
    held[:4] = np.inf
    regions = {"nowhere": (np.zeros(1000, dtype=bool), np.zeros(40, dtype=bool))}
    coordinates = rng.standard_normal((1000, 30))
    found = diagnose(
        noise(rng, 1000), held, regions=regions, coordinates=coordinates, names=[f"c{i}" for i in range(30)]
    )
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["findings"] == found.findings and record["regions"][0]["ratio"] is None
    assert len(record["dependences"]) == 10 and len(found.dependences) == 30
    assert "4 of 40 held-out frames lie outside the generator's support." in found.findings["basins"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out_log_weights": np.zeros(3)}, "at least 4"),
        ({"held_out_log_weights": np.zeros(21), "chains": 2}, "same number from each of 2 chains"),
        ({"held_out_log_weights": np.full(20, -np.inf)}, "a frame of the target has a finite energy"),
        ({"log_weights": np.full(100, -np.inf)}, "All weights are zero"),
        ({"log_weights": np.full(100, np.nan)}, "NaN"),
        ({"coordinates": np.zeros((100, 2)), "names": ["a"]}, "1 named ones of each of 100 draws"),
        ({"coordinates": np.full((100, 1), np.nan), "names": ["a"]}, "not finite in draws that carry weight"),
        ({"regions": {"a": (np.zeros(99, dtype=bool), np.zeros(20, dtype=bool))}}, "The region 'a' must say"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes, message):
    given = {"log_weights": np.zeros(100), "held_out_log_weights": np.zeros(20)} | changes
    with pytest.raises(InputError, match=message) as caught:
        diagnose(given.pop("log_weights"), given.pop("held_out_log_weights"), **given)
    assert str(caught.value).endswith(".")
