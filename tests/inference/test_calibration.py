"""Thresholds against known distributions: the false-alarm rate that is promised is the one that is kept."""

import numpy as np
import pytest
import scipy.stats

from osscl_min.inference.calibration import (
    Calibration,
    Threshold,
    chance,
    clips_needed,
    empirical_threshold,
    gamma_threshold,
    p_value,
)

GAMMA = scipy.stats.gamma(0.7, scale=0.3)


def false_alarms(make, clips, rate, repeats=1000, new=20):
    """Share of new normal scores above the threshold from `clips` held-out ones, and its standard error."""
    random = np.random.default_rng(0)
    shares = [
        np.mean(GAMMA.rvs(new, random_state=random) > make(GAMMA.rvs(clips, random_state=random), rate))
        for _ in range(repeats)
    ]
    return np.mean(shares), np.std(shares) / np.sqrt(repeats)


@pytest.mark.parametrize(("clips", "rate"), [(19, 0.05), (22, 0.05), (22, 0.1), (99, 0.01), (7, 0.2)])
def test_the_empirical_threshold_keeps_the_rate(clips, rate):
    share, error = false_alarms(empirical_threshold, clips, rate)
    rank = int(np.ceil((clips + 1) * (1 - rate) - 1e-9))
    assert share == pytest.approx(1 - rank / (clips + 1), abs=4 * error)  # exactly, in expectation
    assert share <= rate + 4 * error


def test_the_gamma_fit_finds_the_quantile_of_a_gamma_distribution():
    scores = GAMMA.rvs(20_000, random_state=1)
    for rate in (0.1, 0.01, 0.001):
        assert gamma_threshold(scores, rate) == pytest.approx(GAMMA.isf(rate), rel=0.05)
    share, error = false_alarms(gamma_threshold, 200, 0.02, repeats=300)
    assert share == pytest.approx(0.02, abs=4 * error + 0.004)
    assert gamma_threshold(np.ones(5), 0.1) is None and gamma_threshold(np.array([0.0, 1.0]), 0.1) is None


def test_what_so_many_clips_resolve():
    assert [clips_needed(rate) for rate in (0.05, 0.1, 0.01, 0.5, 0.3)] == [19, 9, 99, 1, 3]
    for rate in (0.05, 0.1, 0.01, 0.3):
        enough = np.arange(clips_needed(rate), dtype=float)
        assert empirical_threshold(enough, rate) == enough.max()
        assert empirical_threshold(enough[:-1], rate) is None


def test_the_decision_agrees_with_the_p_value():
    random = np.random.default_rng(2)
    for clips in (19, 22, 40, 57):
        for rate in (0.05, 0.1, 0.25):
            scores = random.integers(0, 15, clips).astype(float)  # with ties
            threshold = empirical_threshold(scores, rate)
            for score in range(-1, 17):
                assert (score > threshold) == (p_value(scores, score) <= rate + 1e-9)
    assert p_value(np.arange(22.0), 100) == 1 / 23 and p_value(np.arange(22.0), -1) == 1


def calibration(counts, rate=0.1, **options):
    machines = [machine for machine, count in counts.items() for _ in range(count)]
    return Calibration(machines, np.linspace(0.1, 1, len(machines)), rate, **options)


def test_a_machines_own_clips_decide_then_its_types_then_all():
    counts = {("fan", "00"): 9, ("fan", "02"): 5, ("pump", "00"): 8, ("pump", "02"): 1, ("saw", "A"): 1}
    groups = {machine: calibration(counts).group(machine)[1] for machine in counts}
    assert groups["fan", "00"].group == "fan id 00" and groups["fan", "00"].clips == 9
    assert groups["fan", "02"].group == "fan" and groups["fan", "02"].clips == 14
    assert groups["pump", "00"].group == groups["pump", "02"].group == "pump"
    assert groups["saw", "A"].group == "all machines" and groups["saw", "A"].clips == 24
    assert "resolve rates down to 10 %" in str(groups["fan", "00"])


def test_too_few_clips_leave_the_gamma_fit_and_none_leave_nothing():
    threshold, p = calibration({("fan", "00"): 5}, rate=0.05)(("fan", "00"), 2.0)
    assert threshold.method == "gamma" and threshold.empirical is None and threshold.value == threshold.gamma
    assert p == 1 / 6 and "empirical not resolved" in str(threshold)
    assert calibration({("fan", "00"): 30}, method="gamma").group(("fan", "00"))[1].method == "gamma"
    assert Calibration([], [], 0.05)(("fan", "00"), 2.0) == (None, None)
    assert Calibration([("fan", "00")], [0.3], 0.05)(("fan", "00"), 2.0) == (None, None)


def test_chance_is_beta_binomial():
    one = Threshold(1.0, "empirical", 1.0, None, 43, "all machines", 0.05)
    expected = np.array(scipy.stats.betabinom(180, 2, 42).interval(0.95)) / 180
    assert chance([one] * 180) == pytest.approx(expected, abs=0.012)
    two = Threshold(2.0, "empirical", 2.0, None, 43, "fan", 0.05)
    low, high = chance([one] * 90 + [two] * 90)  # two independent halves vary less
    assert expected[0] <= low and high < expected[1]


def test_alarms_are_counted_against_each_machines_threshold():
    counts = {("fan", "00"): 9, ("pump", "00"): 9}
    one = calibration(counts)  # thresholds: the largest of each nine
    low, high = one.group(("fan", "00"))[1].value, one.group(("pump", "00"))[1].value
    machines = [("fan", "00")] * 3 + [("pump", "00")] * 3
    scores = np.array([low - 0.01, low + 0.01, low + 0.01, low + 0.01, high + 0.01, high + 0.01])
    found = one.alarms(machines, scores, np.array([0, 0, 1, 0, 1, 0]))
    assert (found["normal_clips"], found["false_alarms"]) == (4, 2)
    assert (found["anomalous_clips"], found["detected"]) == (2, 2)
    assert found["binomial_low"] < 0.5 < found["binomial_high"] and found["threshold_from"] == "9 clips"
    assert found["chance_low"] == 0 and 0 < found["chance_high"] < 1
