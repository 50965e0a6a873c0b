"""Decide whether a recording is anomalous, at a false-alarm rate that holds per recording.

The score of a recording is its highest window's. Windows of one recording resemble each other, so recordings,
not windows, are the exchangeable units, and m windows are compared with m windows:

1. A block is k consecutive windows. Its p-value is (1 + number of normal recordings whose first k windows
   reach its highest score) / (n + 1), of the n normal recordings with at least k windows: split conformal
   prediction (Vovk, Gammerman and Shafer, 2005), one block per recording.
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
from typing import Any

import numpy as np
import scipy.stats

from osscl_min.runtime.files import UserError

Machine = tuple[str, str]  # machine type, machine id


def recordings_needed(rate: float, blocks: int = 1) -> int:
    """The smallest number n of normal recordings that resolves a rate: blocks / (n + 1) <= rate."""
    return math.ceil(blocks / rate - 1e-9) - 1


def _rank(n: int, rate: float) -> int:
    """Which of the n highest scores a normal one exceeds with this probability at most; 0 for none."""
    return math.floor((n + 1) * rate + 1e-9)


@dataclass(frozen=True, eq=False)
class Threshold:
    """The score above which a recording of so many windows is called anomalous, and its p-values."""

    value: float | None  # None where so few normal recordings do not resolve the rate
    source: str  # what it rests on, such as "43 normal recordings of all machines"
    blocks: int  # of the recording that is judged
    maxima: np.ndarray  # of the normal recordings' first blocks, sorted
    windows: np.ndarray  # of their first windows

    def p_value(self, score: float) -> float:
        """How likely the highest window of a normal recording scores as high."""
        return min(1.0, self.blocks * _p_value(self.maxima, score))

    def window_p_value(self, score: float) -> float:
        """The same for a single window, not corrected for their number."""
        return _p_value(self.windows, score)


def _p_value(sorted_scores: np.ndarray, score: float) -> float:
    n = len(sorted_scores)
    return float(1 + n - np.searchsorted(sorted_scores, score)) / (n + 1)


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
        self._maxima: dict[tuple[tuple[str, ...], int], np.ndarray] = {}

    def threshold(self, machine: Machine, windows: int = 1) -> Threshold | None:
        """The threshold for a machine's recordings of so many windows; None without any calibration."""
        key = machine, windows
        if self.scores and key not in self._thresholds:
            for group in (machine, machine[:1], ()):
                pairs = zip(self.machines, self.scores, strict=True)
                recordings = [own for known, own in pairs if known[: len(group)] == group]
                if recordings:
                    self._thresholds[key] = self._compare(group, recordings, windows)
                    if self._thresholds[key].value is not None:
                        break
        return self._thresholds.get(key)

    def _compare(self, group: tuple[str, ...], recordings: list[np.ndarray], windows: int) -> Threshold:
        lengths = np.array([len(own) for own in recordings])

        def attainable(block: int) -> tuple[float, int]:
            return math.ceil(windows / block) / (1 + np.count_nonzero(lengths >= block)), -block

        block = min(np.unique(np.minimum(lengths, windows)).tolist(), key=attainable)
        for k in (1, block):
            if (group, k) not in self._maxima:
                self._maxima[group, k] = np.sort([own[:k].max() for own in recordings if len(own) >= k])
        maxima, blocks = self._maxima[group, block], math.ceil(windows / block)
        rank = _rank(len(maxima), self.rate / blocks)
        value = float(maxima[-rank]) if rank else None
        source = f"{len(maxima)} normal recordings of {' id '.join(group) or 'all machines'}"
        if blocks > 1:
            source += f", corrected for {blocks} blocks of {block} window{'s' if block > 1 else ''}"
        if value is None:
            more = recordings_needed(self.rate) - np.count_nonzero(lengths >= windows)
            length = f" of {windows} windows" if windows > 1 else ""
            source += f"; {100 * self.rate:g} % false alarms need {more} more{length}"
        return Threshold(value, source, blocks, maxima, self._maxima[group, 1])

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
            Empty without any calibration.
        """
        if not self.scores:
            return []
        thresholds = np.array([self.threshold(machine) for machine in machines], object)
        resolved = all(threshold.value is not None for threshold in thresholds)
        types, rows = np.array([machine_type for machine_type, _ in machines]), []
        for name in [*sorted(set(types.tolist()), key=str.lower), "all"]:
            own = (types == name) | (name == "all")
            normal, anomalous = own & (anomaly == 0), own & (anomaly == 1)
            sources = {threshold.source for threshold in thresholds[own]}
            row = {
                "machine_type": name,
                "threshold_from": f"{len(sources)} groups" if len(sources) > 1 else sources.pop(),
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
        counts = Counter((threshold.source, len(threshold.maxima)) for threshold in thresholds)
        for (_, n), count in counts.items():
            share = scipy.stats.betabinom(count, _rank(n, self.rate), n + 1 - _rank(n, self.rate))
            probability = np.convolve(probability, share.pmf(np.arange(count + 1)))
        return tuple((np.searchsorted(np.cumsum(probability), (0.025, 0.975)) / len(thresholds)).tolist())
