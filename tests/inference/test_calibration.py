"""Decisions against known distributions: the false-alarm rate that is asked is the one that is kept."""

import math

import numpy as np
import pytest
import scipy.stats

from osscl_min.inference.calibration import Calibration, recordings_needed
from osscl_min.runtime.files import UserError

FAN = ("fan", "00")


def windows_of(random, recordings, windows, correlation):
    """(recordings, windows) normal scores: a random effect per recording, lognormal as losses are."""
    shared = random.standard_normal((recordings, 1)) * np.sqrt(correlation)
    return np.exp(shared + random.standard_normal((recordings, windows)) * np.sqrt(1 - correlation))


def false_alarms(lengths, windows, correlation, rate, sets=40, new=40):
    """Mean share of false alarms over calibration sets with recordings of `lengths`, and its error."""
    random = np.random.default_rng(0)
    shares = []
    for _ in range(sets):
        drawn = windows_of(random, len(lengths), max(lengths), correlation)
        calibration = Calibration(
            [FAN] * len(lengths), [own[:n] for own, n in zip(drawn, lengths, strict=True)], rate
        )
        highest = windows_of(random, new, windows, correlation).max(axis=1)
        threshold = calibration.threshold(FAN, windows)
        called = highest > threshold.value
        p_values = np.array([threshold.p_value(score) for score in highest])
        np.testing.assert_array_equal(called, p_values <= rate + 1e-9)
        shares.append(called.mean())
    return np.mean(shares), np.std(shares) / np.sqrt(sets)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("windows", [1, 10, 60])
@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_the_rate_holds_per_recording(rate, windows, correlation):
    """For calibration recordings as long, longer, shorter, of one window, and mixed."""
    few = recordings_needed(rate) + 12
    cases = {
        "alike": [windows] * few,
        "longer": [max(60, windows) + 20] * few,
        "mixed": [*range(windows, windows + few), *[1] * few],
        "shorter": [max(1, windows // 4)] * (recordings_needed(rate, 5) + 5),
        "one window": [1] * (recordings_needed(rate, windows) + 5),
    }
    for name, lengths in cases.items():
        share, error = false_alarms(lengths, windows, correlation, rate)
        assert share <= rate + 3.5 * error, name
        if name in ("alike", "longer"):  # exact: no power is given away
            expected = math.floor((few + 1) * rate + 1e-9) / (few + 1)
            assert share == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("correlation", [0.3, 0.6])
def test_windows_taken_for_recordings_would_break_the_rate(correlation):
    """The simulation can fail: with each window a unit of its own the rate does not hold."""
    random, shares = np.random.default_rng(0), []
    for _ in range(60):
        drawn = windows_of(random, 31, 60, correlation)
        calibration = Calibration([FAN] * drawn.size, drawn.ravel(), 0.05)
        highest = windows_of(random, 40, 60, correlation).max(axis=1)
        shares.append((highest > calibration.threshold(FAN).value).mean())
    assert np.mean(shares) > 0.15


def test_the_rate_holds_where_other_clips_chose_the_epoch():
    """Twenty seeds of the split of held-out clips: one half chooses, the other one calibrates."""
    random, epochs, rate = np.random.default_rng(0), 30, 0.1
    held_out, fresh = 38, 500
    shares = {"other half": [], "same clips": []}
    for _ in range(20 * 10):  # networks, each with its split
        difficulty = random.standard_normal((held_out + fresh, 1))
        scores = np.exp(0.5 * difficulty + random.standard_normal((held_out + fresh, epochs)))
        order = random.permutation(held_out)
        for name, chosen_by in (("other half", order[:19]), ("same clips", order[19:])):
            # the loss whose minimum chooses: here the largest score, which a threshold hangs on
            epoch = scores[chosen_by].max(axis=0).argmin()
            threshold = Calibration([FAN] * 19, scores[order[19:], epoch], rate).threshold(FAN)
            shares[name].append((scores[held_out:, epoch] > threshold.value).mean())
    error = np.std(shares["other half"]) / np.sqrt(len(shares["other half"]))
    assert np.mean(shares["other half"]) == pytest.approx(rate, abs=3.5 * error)
    assert np.mean(shares["same clips"]) > 1.5 * rate


def test_what_so_many_recordings_resolve():
    assert [recordings_needed(rate) for rate in (0.05, 0.1, 0.01, 0.5, 0.3)] == [19, 9, 99, 1, 3]
    assert recordings_needed(0.05, 3) == 59
    for rate in (0.05, 0.1, 0.01, 0.3):
        enough = np.arange(recordings_needed(rate), dtype=float)
        assert Calibration([FAN] * len(enough), enough, rate).threshold(FAN).value == enough.max()
        short = Calibration([FAN] * (len(enough) - 1), enough[1:], rate).threshold(FAN)
        assert short.value is None and short.source.endswith("false alarms need 1 more")
    clips = Calibration([FAN] * 43, np.arange(43.0), 0.05)
    assert clips.threshold(FAN, 2).value == 42
    long = clips.threshold(FAN, 3)
    assert long.value is None and long.source == (
        "43 normal recordings of all machines, corrected for 3 blocks of 1 window; "
        "5 % false alarms need 19 more of 3 windows"
    )
    for rate in (0, 1, -1, 2, math.nan):
        with pytest.raises(UserError, match="between 0 and 1"):
            Calibration([FAN], [1.0], rate)


@pytest.mark.parametrize(
    ("lengths", "windows", "block", "recordings"),
    [
        ([1] * 30, 1, 1, 30),
        ([10] * 30, 10, 10, 30),
        ([10] * 30, 4, 4, 30),
        ([10] * 300, 60, 10, 300),
        ([1] * 30 + [9] * 30, 9, 9, 30),
        ([1] * 300 + [9] * 3, 9, 1, 303),
        ([4, 5, 6, 7] * 10, 6, 6, 20),
    ],
)
def test_the_block_is_the_one_that_resolves_most(lengths, windows, block, recordings):
    threshold = Calibration([FAN] * len(lengths), [np.ones(n) for n in lengths], 0.05).threshold(FAN, windows)
    assert threshold.source.startswith(f"{recordings} normal recordings")
    count = math.ceil(windows / block)
    assert threshold.blocks == count
    assert (f"corrected for {count} blocks of {block} window" in threshold.source) == (count > 1)


def test_p_values_by_hand():
    scores = [np.array([1.0, 5.0, 2.0, 6.0]), np.array([4.0, 4.0]), np.array([9.0])]
    calibration = Calibration([FAN] * 3, scores, 0.5)
    one = calibration.threshold(FAN)
    assert one.value == 4 and one.p_value(2.0) == one.window_p_value(2.0) == (1 + 2) / 4
    two = calibration.threshold(FAN, 2)  # the first two windows: maxima 5 and 4; the third has one alone
    assert two.blocks == 1 and two.value == 5
    assert [two.p_value(score) for score in (5.5, 5.0, 4.5, 4.0)] == [1 / 3, 2 / 3, 2 / 3, 1]
    assert two.window_p_value(4.5) == (1 + 1) / 4
    four = Calibration([FAN] * 9, np.arange(9.0), 0.5).threshold(FAN, 4)
    assert four.p_value(8.5) == 4 * 0.1 and four.p_value(3.0) == 1


def test_the_decision_agrees_with_the_p_value():
    random = np.random.default_rng(2)
    for count in (19, 22, 40, 57):
        for rate in (0.05, 0.1, 0.25):
            drawn = [
                random.integers(0, 15, random.integers(1, 5)).astype(float) for _ in range(count)
            ]  # ties
            calibration = Calibration([FAN] * count, drawn, rate)
            for windows in (1, 2, 5):
                threshold = calibration.threshold(FAN, windows)
                for score in range(-1, 17):
                    called = threshold.value is not None and score > threshold.value
                    assert called == (threshold.p_value(score) <= rate + 1e-9)


def test_a_threshold_of_zero_is_a_threshold():
    calibration = Calibration([FAN] * 19, np.zeros(19), 0.05)
    assert calibration.threshold(FAN).value == 0.0
    rows = calibration.alarms([FAN] * 3, np.array([0.0, 0.1, 0.1]), np.array([0, 0, 1]))
    assert rows[-1]["false_alarms"] == rows[-1]["detected"] == 1


def calibration(counts, rate=0.1):
    machines = [machine for machine, count in counts.items() for _ in range(count)]
    return Calibration(machines, np.linspace(0.1, 1, len(machines)), rate)


def test_a_machines_own_recordings_decide_then_its_types_then_all():
    counts = {FAN: 9, ("fan", "02"): 5, ("pump", "00"): 8, ("pump", "02"): 1, ("saw", "A"): 1}
    groups = {machine: calibration(counts).threshold(machine) for machine in counts}
    sources = [threshold.source.split(" normal recordings of ") for threshold in groups.values()]
    expected = [("9", "fan id 00"), ("14", "fan"), ("9", "pump"), ("9", "pump"), ("24", "all machines")]
    assert sources == [list(pair) for pair in expected]
    long = calibration(counts).threshold(FAN, 2)  # two blocks need 19
    assert long.source.startswith("24 normal recordings of all machines, corrected for 2 blocks")
    nothing = Calibration([], [], 0.05)
    assert nothing.threshold(FAN) is None and nothing.alarms([FAN], np.ones(1), np.zeros(1)) == []
    alone = Calibration([FAN], [0.3], 0.05).threshold(FAN)
    assert alone.value is None and alone.p_value(2.0) == 0.5


def test_alarms_are_counted_per_machine_type():
    counts = {FAN: 9, ("pump", "00"): 9}
    both = calibration(counts)  # thresholds: the largest of each nine
    low, high = both.threshold(FAN).value, both.threshold(("pump", "00")).value
    machines = [FAN] * 3 + [("pump", "00")] * 3
    scores = np.array([low - 0.01, low + 0.01, low + 0.01, low + 0.01, high + 0.01, high + 0.01])
    rows = both.alarms(machines, scores, np.array([0, 0, 1, 0, 1, 0]))
    names = ("machine_type", "normal_clips", "false_alarms", "anomalous_clips", "detected")
    counted = [tuple(row[name] for name in names) for row in rows]
    assert counted == [("fan", 2, 1, 1, 1), ("pump", 2, 1, 1, 1), ("all", 4, 2, 2, 2)]
    assert rows[0]["threshold_from"] == "9 normal recordings of fan id 00"
    assert rows[2]["threshold_from"] == "2 groups"
    assert rows[2]["binomial"][0] < rows[2]["rate_found"] == 0.5 < rows[2]["binomial"][1]
    assert rows[2]["chance"][0] == 0 < rows[2]["chance"][1] < 1
    anomalies = both.alarms([FAN], np.array([2.0]), np.array([1]))
    assert anomalies[0]["rate_found"] is None and anomalies[0]["detected"] == 1
    (*_, row) = calibration(counts, rate=0.01).alarms(machines, scores, np.zeros(6))
    assert row["false_alarms"] is row["detected"] is None and row["normal_clips"] == 6
    assert "1 % false alarms need 81 more" in row["threshold_from"]


def test_chance_is_beta_binomial():
    one = Calibration([FAN] * 43, np.arange(43.0), 0.05)
    rows = one.alarms([FAN] * 180, np.zeros(180), np.zeros(180))
    expected = np.array(scipy.stats.betabinom(180, 2, 42).interval(0.95)) / 180
    assert rows[-1]["chance"] == pytest.approx(tuple(expected))
    two = Calibration([FAN] * 43 + [("pump", "00")] * 43, np.arange(86.0), 0.05)
    halves = two.alarms([FAN] * 90 + [("pump", "00")] * 90, np.zeros(180), np.zeros(180))[-1]
    assert expected[0] <= halves["chance"][0] and halves["chance"][1] < expected[1]  # these vary less
