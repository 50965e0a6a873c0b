"""Decide whether a recording is anomalous, at a false-alarm rate that holds per recording.

The score of a recording is its highest window's. Windows of one recording resemble each other, so recordings,
not windows, are the exchangeable units, and m windows are compared with m windows:

1. A block is k consecutive windows. Its p-value is (1 + S) / (n + 1): n normal recordings have at least k
   windows, and each adds to S the share of its blocks whose highest window scores as high (hierarchical
   conformal prediction; Lee, Barber and Willett, 2023, arXiv:2306.06342).
2. A recording of m windows is ceil(m / k) blocks. Its p-value is its lowest block's times their number
   (Bonferroni, which holds under any dependence). k <= m is chosen by the lowest attainable p-value,
   ceil(m / k) / (n + 1); with enough normal recordings of m windows k = m, and nothing is corrected.

The rate holds for scores of any distribution if normal recordings are exchangeable and, where their lengths
differ, a block does not depend on where it begins. It is an average over calibration sets: the rate of one
set of n recordings spreads by about sqrt(rate (1 - rate) / n).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, groupby
from typing import Any

import numpy as np
import scipy.stats
from numpy.lib.stride_tricks import sliding_window_view

from osscl_min.runtime.files import UserError

Machine = tuple[str, str]  # machine type, machine id


def recordings_needed(rate: float, blocks: int = 1) -> int:
    """The smallest number n of normal recordings that resolves a rate: blocks / (n + 1) <= rate."""
    return math.ceil(blocks / rate - 1e-9) - 1


class _Blocks:
    """The highest scores of all blocks of k windows; the blocks of a recording weigh 1 together."""

    def __init__(self, recordings: Iterable[np.ndarray], block: int):
        maxima, weights, self.recordings = [], [], 0
        long_enough = sorted((own for own in recordings if len(own) >= block), key=len)
        for length, alike in groupby(long_enough, key=len):
            scores = np.stack(list(alike))
            maxima.append(sliding_window_view(scores, block, axis=1).max(axis=2).ravel())
            weights.append(np.full(len(maxima[-1]), 1 / (length - block + 1)))
            self.recordings += len(scores)
        order = np.argsort(np.concatenate(maxima))
        self.maxima = np.concatenate(maxima)[order]
        weights = np.concatenate(weights)[order]
        self.tail = np.append(np.cumsum(weights[::-1])[::-1], 0.0)  # weight of maxima from here on

    def p_value(self, scores: np.ndarray | float, side: str = "left") -> np.ndarray:
        """How likely a normal block is as high as each score, or, with side "right", higher."""
        return (1 + self.tail[np.searchsorted(self.maxima, scores, side)]) / (self.recordings + 1)


@dataclass(frozen=True, eq=False)
class Threshold:
    """The score above which a recording of so many windows is called anomalous, and its p-values."""

    value: float | None  # None where so few normal recordings do not resolve the rate
    group: str  # whose recordings set it: "fan id 00", "fan" or "all machines"
    source: str  # what it rests on, in a few words
    block_count: int
    blocks: _Blocks
    windows: _Blocks

    def p_value(self, score: np.ndarray | float) -> np.ndarray:
        """How likely the highest window of a normal recording scores as high as each `score`."""
        return np.minimum(1, self.block_count * self.blocks.p_value(score))

    def window_p_value(self, score: np.ndarray | float) -> np.ndarray:
        """The same for a single window, not corrected for their number."""
        return self.windows.p_value(score)


class Calibration:
    """Scores of normal recordings, and the thresholds that follow from them.

    A machine's own recordings decide where they resolve the rate, else those of its type, else all; then the
    rate holds on average over these machines, not for each. Scores are not normalised per machine: estimated
    from the one to three clips that a small data set holds out, that would break the exchangeability.

    Parameters
    ----------
    machines : iterable of (machine type, machine id)
        Of each recording.
    scores : sequence of float or of (windows,) float
        Of each recording, its windows in order; higher = more anomalous. Recordings that were never trained
        on and chose no epoch.
    rate : float
        Share of normal recordings that may be called anomalous, between 0 and 1.
    """

    def __init__(self, machines: Iterable[Machine], scores: Sequence[float | np.ndarray], rate: float):
        if not 0 < rate < 1:
            raise UserError(f"a false-alarm rate lies between 0 and 1, such as 0.05; got {rate:g}")
        self.machines, self.rate = list(machines), rate
        self.scores = [np.atleast_1d(np.asarray(own, np.float64)) for own in scores]
        self._thresholds: dict[tuple[Machine, int], Threshold] = {}
        self._blocks: dict[tuple[str, int], _Blocks] = {}

    def threshold(self, machine: Machine, windows: int = 1) -> Threshold | None:
        """The threshold for a machine's recordings of so many windows; None without any calibration."""
        key = machine, windows
        if self.scores and key not in self._thresholds:
            groups = (
                (f"{machine[0]} id {machine[1]}", [own == machine for own in self.machines]),
                (machine[0], [own[0] == machine[0] for own in self.machines]),
                ("all machines", [True] * len(self.machines)),
            )
            for group, members in groups:
                if any(members):
                    self._thresholds[key] = self._compare(
                        group, list(compress(self.scores, members)), windows
                    )
                    if self._thresholds[key].value is not None:
                        break
        return self._thresholds.get(key)

    def _compare(self, group: str, recordings: list[np.ndarray], windows: int) -> Threshold:
        lengths = np.array([len(own) for own in recordings])

        def attainable(block: int) -> tuple[float, int]:
            return math.ceil(windows / block) / (1 + np.count_nonzero(lengths >= block)), -block

        block = min(np.unique(np.minimum(lengths, windows)).tolist(), key=attainable)
        for size in (block, 1):
            if (group, size) not in self._blocks:
                self._blocks[group, size] = _Blocks(recordings, size)
        blocks, count = self._blocks[group, block], math.ceil(windows / block)
        enough = count * blocks.p_value(blocks.maxima, "right") <= self.rate + 1e-9
        value = float(blocks.maxima[enough.argmax()]) if enough.any() else None
        source = f"{blocks.recordings} normal recordings of {group}"
        if count > 1:
            source += f", corrected for {count} blocks of {block} window{'s' if block > 1 else ''}"
        if value is None:
            more = recordings_needed(self.rate) - np.count_nonzero(lengths >= windows)
            length = f" of {windows} windows" if windows > 1 else ""
            source += f"; {100 * self.rate:g} % false alarms need {more} more{length}"
        return Threshold(value, group, source, count, blocks, self._blocks[group, 1])

    def alarms(
        self, machines: Sequence[Machine], scores: np.ndarray, anomaly: np.ndarray
    ) -> list[dict[str, Any]]:
        """Count alarms on clips of known truth that set no threshold, per machine type and in total.

        Parameters
        ----------
        machines : sequence of (machine type, machine id)
        scores : (n,)
            Of clips of one window; the caller chooses which are measured together.
        anomaly : (n,) of 0 and 1

        Returns
        -------
        list of dict
            A row per machine type and a last one, "all": "machine_type", "threshold_from", "normal_clips",
            "false_alarms", "rate_found" with its Clopper-Pearson interval "binomial", "anomalous_clips",
            "detected", and "chance", the central 95 % of the rates to be expected of exchangeable clips,
            which counts in that few recordings place a threshold. What is unknown or not resolved is None.
        """
        thresholds = np.array([self.threshold(machine) for machine in machines], object)
        resolved = all(threshold is not None and threshold.value is not None for threshold in thresholds)
        types, rows = np.array([machine_type for machine_type, _ in machines]), []
        for name in [*sorted(set(types.tolist()), key=str.lower), "all"]:
            own = (types == name) | (name == "all")
            normal, anomalous = own & (anomaly == 0), own & (anomaly == 1)
            row = {
                "machine_type": name,
                "threshold_from": "; ".join(sorted({threshold.source for threshold in thresholds[own]})),
                "normal_clips": int(normal.sum()),
                **dict.fromkeys(("false_alarms", "rate_found", "binomial", "chance")),
                "anomalous_clips": int(anomalous.sum()),
                "detected": None,
            }
            if resolved:
                called = np.array([score > t.value for score, t in zip(scores, thresholds, strict=True)])
                row |= {"false_alarms": int(called[normal].sum()), "detected": int(called[anomalous].sum())}
            if resolved and normal.any():
                test = scipy.stats.binomtest(row["false_alarms"], row["normal_clips"])
                row |= {"rate_found": test.statistic, "binomial": tuple(test.proportion_ci())}
                row["chance"] = self._chance(thresholds[normal])
            rows.append(row)
        return rows

    def _chance(self, thresholds: Sequence[Threshold]) -> tuple[float, ...]:
        """The central 95 % of the share of false alarms among normal clips with these thresholds.

        The share of clips above the r-th highest of n scores is Beta(r, n + 1 - r), one draw per group; given
        it, alarms are binomial.
        """
        probability = np.ones(1)  # of each number of false alarms
        counts = Counter((threshold.group, threshold.blocks.recordings) for threshold in thresholds)
        for (_, recordings), count in counts.items():
            rank = math.floor((recordings + 1) * self.rate + 1e-9)
            share = scipy.stats.betabinom(count, rank, recordings + 1 - rank)
            probability = np.convolve(probability, share.pmf(np.arange(count + 1)))
        return tuple((np.searchsorted(np.cumsum(probability), (0.025, 0.975)) / len(thresholds)).tolist())
