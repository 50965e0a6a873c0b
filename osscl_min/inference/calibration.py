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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from osscl_min.runtime.files import UserError

Machine = tuple[str, str]  # machine type, machine id


def recordings_needed(rate: float) -> int:
    """The smallest number n of normal recordings that resolves a rate: 1 / (n + 1) <= rate."""
    return math.ceil(1 / rate - 1e-9) - 1


@dataclass(frozen=True, eq=False)
class Threshold:
    """The score above which a recording of so many windows is called anomalous, and p-values."""

    source: str  # what it rests on, such as "43 normal recordings of all machines"
    blocks: int  # of the recording that is judged
    rank: int  # which of the highest maxima is the threshold; 0 where they are too few to resolve the rate
    maxima: np.ndarray  # of the normal recordings' first blocks, sorted
    value: float | None  # the threshold; None where the normal recordings are too few to resolve the rate

    def p_value(self, score: float) -> float:
        """The probability that the highest window of a normal recording scores as high."""
        n, below = len(self.maxima), np.searchsorted(self.maxima, score)
        return float(min(1, self.blocks * (1 + n - below) / (n + 1)))


class Calibration:
    """Scores of normal recordings, and the thresholds that follow from them.

    A machine's own recordings set its threshold if they resolve the rate, else those of its type, else all;
    then the rate holds on average over these machines, not for each. Scores are not normalised per machine:
    estimates from the one to three clips that a small data set holds out would break the exchangeability.

    Parameters
    ----------
    machines : iterable of (machine type, machine id)
        Of each recording; none took part in training or in the choice of the epoch.
    scores : sequence of float or of (windows,) float
        Of each recording; higher = more anomalous.
    rate : float
        Share of normal recordings that may be called anomalous, between 0 and 1.
    """

    def __init__(self, machines: Iterable[Machine], scores: Sequence[float | np.ndarray], rate: float):
        if not 0 < rate < 1:
            raise UserError(f"a false-alarm rate lies between 0 and 1, such as 0.05; got {rate:g}")
        self.rate = rate
        self._recordings = [
            (m, np.array(own, float, ndmin=1)) for m, own in zip(machines, scores, strict=True)
        ]
        self._compare = cache(self._compare)

    def threshold(self, machine: Machine, windows: int = 1) -> Threshold | None:
        """The threshold for a machine's recordings of so many windows; None without any calibration."""
        for group in (machine, machine[:1], ()):
            threshold = self._compare(group, windows)
            if threshold and threshold.rank:
                break
        return threshold

    def _compare(self, group: tuple[str, ...], windows: int) -> Threshold | None:
        own = [scores for known, scores in self._recordings if known[: len(group)] == group]
        if not own:
            return None
        lengths = np.array([len(scores) for scores in own])

        def attainable(block: int) -> tuple[float, int]:
            return math.ceil(windows / block) / (1 + np.count_nonzero(lengths >= block)), -block

        block = min(np.unique(np.minimum(lengths, windows)).tolist(), key=attainable)
        maxima = np.sort([scores[:block].max() for scores in own if len(scores) >= block])
        blocks = math.ceil(windows / block)
        rank = math.floor((len(maxima) + 1) * self.rate / blocks + 1e-9)
        source = f"{len(maxima)} normal recordings of {' id '.join(group) or 'all machines'}"
        if blocks > 1:
            source += f", corrected for {blocks} blocks of {block} window{'s' if block > 1 else ''}"
        if not rank:
            more = recordings_needed(self.rate) - np.count_nonzero(lengths >= windows)
            length = f" of {windows} windows" if windows > 1 else ""
            source += f"; {100 * self.rate:g} % false alarms need {more} more{length}"
        return Threshold(source, blocks, rank, maxima, float(maxima[-rank]) if rank else None)
