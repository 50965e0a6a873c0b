"""Decisions against known distributions: the false-alarm rate that is asked is the one that is kept."""

import math

import numpy as np
import pytest
from conftest import refused
from simulations import false_alarms, fans, split_alarms, windows_of

from osscl_min.inference.calibration import Calibration, recordings_needed

FAN = ("fan", "00")


@pytest.mark.parametrize("windows", [1, 10, 60])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_the_rate_holds_per_recording(rate, windows, correlation):
    """For calibration recordings as long, longer, shorter, of one window, and mixed."""
    few = recordings_needed(rate) + 12
    cases = {
        "alike": [windows] * few,
        "longer": [max(60, windows) + 20] * few,
        "mixed": [*range(windows, windows + few), *[1] * few],
        "shorter": [max(1, windows // 4)] * (recordings_needed(rate / 5) + 5),
        "one window": [1] * (recordings_needed(rate / windows) + 5),
    }
    for name, lengths in cases.items():
        share, error = false_alarms(lengths, windows, correlation, rate)
        assert share <= rate + 3.5 * error, name
        if name in ("alike", "longer"):  # exact: no power is given away
            expected = math.floor((few + 1) * rate + 1e-9) / (few + 1)
            assert share == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_rate_holds_for_new_clips_over_seeds_of_the_split(keep):
    share, error = split_alarms(keep, 0.05)
    assert 0.02 < share <= 0.05 + 3.5 * error


def test_windows_taken_for_recordings_would_break_the_rate():
    """The simulation can fail: with each window a unit of its own the rate does not hold."""
    random, shares = np.random.default_rng(0), []
    for _ in range(15):
        threshold = fans(windows_of(random, 31, 60, 0.3).ravel(), 0.05).threshold(FAN)
        shares.append((windows_of(random, 40, 60, 0.3).max(axis=1) > threshold.value).mean())
    assert np.mean(shares) > 0.15


def test_what_so_many_recordings_resolve():
    assert [recordings_needed(rate) for rate in (0.05, 0.1, 0.01, 0.5, 0.3)] == [19, 9, 99, 1, 3]
    for rate in (0.05, 0.1, 0.01, 0.3):
        enough = np.arange(recordings_needed(rate), dtype=float)
        assert fans(enough, rate).threshold(FAN).value == enough.max()
        short = fans(enough[1:], rate).threshold(FAN)
        assert short.value is None and short.source.endswith("false alarms need 1 more")
    clips = fans(np.arange(43.0), 0.05)
    assert clips.threshold(FAN, 2).value == 42
    long = clips.threshold(FAN, 3)
    assert long.value is None and long.source == (
        "43 normal recordings of all machines, corrected for 3 blocks of 1 window; "
        "5 % false alarms need 19 more of 3 windows"
    )
    assert fans(np.zeros(19), 0.05).threshold(FAN).value == 0.0  # zero is a threshold
    for rate in (0, 1, -1, 2, math.nan):
        with refused("between 0 and 1"):
            fans([1.0], rate)


@pytest.mark.parametrize(
    ("lengths", "windows", "block", "recordings"),
    [
        ([10] * 30, 10, 10, 30),
        ([10] * 30, 4, 4, 30),
        ([10] * 300, 60, 10, 300),
        ([1] * 30 + [9] * 30, 9, 9, 30),
        ([1] * 300 + [9] * 3, 9, 1, 303),
        ([4, 5, 6, 7] * 10, 6, 6, 20),
    ],
)
def test_the_block_is_the_one_that_resolves_most(lengths, windows, block, recordings):
    threshold = fans([np.ones(n) for n in lengths], 0.05).threshold(FAN, windows)
    assert threshold.source.startswith(f"{recordings} normal recordings")
    assert threshold.blocks == math.ceil(windows / block)
    text = f"corrected for {threshold.blocks} blocks of {block} window"
    assert (text in threshold.source) == (threshold.blocks > 1)


def test_p_values_by_hand():
    calibration = fans([np.array([1.0, 5.0, 2.0, 6.0]), np.array([4.0, 4.0]), np.array([9.0])], 0.5)
    one = calibration.threshold(FAN)
    assert one.value == 4 and one.p_value(2.0) == (1 + 2) / 4
    two = calibration.threshold(FAN, 2)  # the first two windows: maxima 5 and 4; the third has one alone
    assert two.blocks == 1 and two.value == 5
    assert [two.p_value(score) for score in (5.5, 5.0, 4.5, 4.0)] == [1 / 3, 2 / 3, 2 / 3, 1]
    four = fans(np.arange(9.0), 0.5).threshold(FAN, 4)
    assert four.p_value(8.5) == 4 * 0.1 and four.p_value(3.0) == 1


@pytest.mark.parametrize("count", [19, 22, 40, 57])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25])
def test_the_decision_agrees_with_the_p_value(count, rate):
    random = np.random.default_rng(2)  # integers: there are ties
    calibration = fans([random.integers(0, 15, random.integers(1, 5)) for _ in range(count)], rate)
    for windows in (1, 2, 5):
        threshold = calibration.threshold(FAN, windows)
        for score in range(-1, 17):
            called = threshold.value is not None and score > threshold.value
            assert called == (threshold.p_value(score) <= rate + 1e-9)


def test_a_machines_own_recordings_decide_then_its_types_then_all():
    counts = {FAN: 9, ("fan", "02"): 5, ("pump", "00"): 8, ("pump", "02"): 1, ("saw", "A"): 1}
    machines = [machine for machine, count in counts.items() for _ in range(count)]
    calibration = Calibration(machines, np.linspace(0.1, 1, len(machines)), 0.1)
    sources = [calibration.threshold(machine).source for machine in counts]
    expected = ["9 * fan id 00", "14 * fan", "9 * pump", "9 * pump", "24 * all machines"]
    assert sources == [text.replace("*", "normal recordings of") for text in expected]
    long = calibration.threshold(FAN, 2)  # two blocks need 19
    assert long.source.startswith("24 normal recordings of all machines, corrected for 2 blocks")
    assert fans([], 0.05).threshold(FAN) is None
    alone = fans([0.3], 0.05).threshold(FAN)
    assert alone.value is None and alone.p_value(2.0) == 0.5
