"""The statistics of a comparison against cases whose answer is known, and how often they err."""

import math

import numpy as np
import pytest
from scipy import stats

from kvgraft.evaluate.statistics import LEVEL, corrected, holm, paired_difference, reach, spread

TRIALS = 2000
# Three standard errors of a rate of 5 % over TRIALS.
NOISE = 3 * math.sqrt(LEVEL * (1 - LEVEL) / TRIALS)


def by_seed(values: np.ndarray) -> dict[int, float]:
    return {seed: float(value) for seed, value in enumerate(values)}


def share_shown(first: np.ndarray, second: np.ndarray) -> float:
    """Share of the rows ``[trials, seeds]`` that are called different, each judged alone."""
    found = [
        corrected({"arm": paired_difference(by_seed(a), by_seed(b))})["arm"].shown
        for a, b in zip(first, second, strict=True)
    ]
    return sum(found) / len(found)


def test_a_difference_worked_by_hand() -> None:
    found = paired_difference({0: 3.0, 1: 3.2, 2: 2.9}, {0: 4.0, 1: 4.0, 2: 4.1})
    # Differences -1.0, -0.8, -1.2: mean -1, deviation 0.2, t = -1 / (0.2 / sqrt 3), quantile of two degrees 4.3027.
    assert found.mean == pytest.approx(-1.0)
    assert found.interval == pytest.approx((-1.4968, -0.5032), abs=1e-4)
    assert found.effect_size == pytest.approx(-5.0 * 0.5642, abs=1e-3)
    assert found.by_seed == pytest.approx({0: -1.0, 1: -0.8, 2: -1.2})


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_the_paired_t_test_of_scipy_says_the_same(seeds: int) -> None:
    first, second = np.random.default_rng(seeds).normal(size=(2, seeds))
    found, reference = paired_difference(by_seed(first), by_seed(second)), stats.ttest_rel(first, second)
    assert found.p_value == pytest.approx(reference.pvalue, rel=1e-9)
    assert found.interval == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-9)


def test_one_seed_gives_no_interval_and_no_p_value() -> None:
    found = paired_difference({4: 3.0}, {4: 4.0})
    assert found.mean == -1.0
    assert (found.interval, found.effect_size, found.p_value) == (None, None, None)
    assert not corrected({"arm": found})["arm"].shown
    assert spread({4: 3.0}).deviation is None


def test_seeds_that_change_nothing_are_no_evidence() -> None:
    found = paired_difference({0: 3.0, 1: 3.0, 2: 3.0}, {0: 4.0, 1: 4.0, 2: 4.0})
    assert (found.mean, found.interval, found.p_value) == (-1.0, None, None)
    same = paired_difference({0: 3.1, 1: 3.2}, {0: 3.1, 1: 3.2})
    assert (same.mean, same.interval, same.p_value) == (0.0, None, 1.0)


def test_two_seeds_have_an_interval_but_no_effect_size() -> None:
    found = paired_difference({0: 3.0, 1: 3.2}, {0: 4.0, 1: 4.0})
    assert found.effect_size is None
    assert found.interval == pytest.approx((-0.9 - 12.706 * 0.1, -0.9 + 12.706 * 0.1), abs=1e-3)


def test_seeds_have_to_match() -> None:
    with pytest.raises(ValueError, match=r"same seeds.*\[0, 1\] and \[0, 2\]"):
        paired_difference({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0})


def test_holm_on_the_textbook_case() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("luck", ["normal", "laplace", "exponential"])
def test_identical_arms_are_called_different_at_most_one_time_in_twenty(seeds: int, luck: str) -> None:
    generator = np.random.default_rng(seeds)
    first, second = (getattr(generator, luck)(size=(TRIALS, seeds)) for _ in range(2))
    shared = generator.normal(size=(TRIALS, seeds))
    assert share_shown(first + shared, second + shared) <= LEVEL + NOISE


@pytest.mark.parametrize(("method", "seeds"), [("percentile", 3), ("percentile", 5), ("BCa", 3), ("BCa", 5)])
def test_a_bootstrap_of_few_seeds_would_err_far_more_often(method: str, seeds: int) -> None:
    differences = np.random.default_rng(0).normal(size=(TRIALS, seeds))
    low, high = stats.bootstrap(
        (differences,), np.mean, axis=1, n_resamples=500, method=method, rng=np.random.default_rng(1)
    ).confidence_interval
    assert np.mean((low > 0) | (high < 0)) > 2 * LEVEL


def test_five_identical_arms_are_together_called_different_at_most_one_time_in_twenty() -> None:
    generator = np.random.default_rng(0)
    arms = generator.normal(size=(TRIALS, 6, 5)) + generator.normal(size=(TRIALS, 1, 5))
    erred = 0
    for baseline, *others in arms:
        differences = {
            str(index): paired_difference(by_seed(other), by_seed(baseline)) for index, other in enumerate(others)
        }
        erred += any(found.shown for found in corrected(differences).values())
    assert erred / TRIALS <= LEVEL + NOISE


@pytest.mark.parametrize(("seeds", "spreads"), [(10, 1.0), (3, 3.4)])
def test_a_difference_of_one_spread_is_found_at_ten_seeds(seeds: int, spreads: float) -> None:
    """One spread is the standard deviation between seeds of the difference: what pairing leaves of the luck."""
    quantile = stats.t.ppf(1 - LEVEL / 2, seeds - 1)
    noncentral = stats.nct(seeds - 1, spreads * math.sqrt(seeds))
    power = noncentral.sf(quantile) + noncentral.cdf(-quantile)
    assert power >= 0.8
    generator = np.random.default_rng(0)
    luck = generator.normal(size=(TRIALS, seeds)) * 5
    found = share_shown(luck + generator.normal(size=(TRIALS, seeds)) - spreads, luck)
    assert found == pytest.approx(power, abs=3 * math.sqrt(power * (1 - power) / TRIALS))


def test_steps_to_a_target() -> None:
    found = reach({0: (180.0, 225.0), 1: (180.0, 225.0), 2: (180.0, 225.0)})
    assert found.mean == 225
    # All seeds crossed between the same two evaluations: where exactly is not known.
    assert found.interval == (180, 225)
    never = reach({0: (180.0, 225.0), 1: None})
    assert (never.by_seed, never.mean, never.interval) == ({0: 225.0, 1: None}, None, None)
    assert reach({0: (180.0, 225.0)}).interval is None
    apart = reach({0: (100.0, 150.0), 1: (200.0, 250.0), 2: (300.0, 350.0)})
    half = 4.3027 * 100 / math.sqrt(3)
    assert apart.interval == pytest.approx((max(0, 200 - half), 250 + half), abs=0.1)
