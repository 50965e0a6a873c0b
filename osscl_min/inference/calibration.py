"""From scores of held-out normal clips to a threshold, a decision and a p-value, at a false-alarm rate.

The empirical threshold and the p-value are conformal: they use ranks alone, so they hold for scores of any
distribution, as long as normal clips to come are like those held out. The gamma fit, as in the baselines of
the DCASE challenges, reaches rates that few clips cannot resolve, and holds as far as the fit does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.stats

Method = Literal["empirical", "gamma"]


@dataclass(frozen=True)
class Threshold:
    """The score above which a clip is called anomalous."""

    value: float
    method: Method  # the one that gave `value`
    empirical: float | None  # None where so few clips do not resolve the rate
    gamma: float | None  # None where there is nothing to fit
    clips: int  # held-out normal clips
    group: str  # whose they are: "fan id 00", "fan" or "all machines"
    rate: float  # the false-alarm rate asked for

    @property
    def resolution(self) -> float:
        """The lowest false-alarm rate that so many clips resolve empirically."""
        return 1 / (self.clips + 1)

    def __str__(self) -> str:
        def number(value: float | None, why: str) -> str:
            return why if value is None else f"{value:.4g}"

        return (
            f"{self.group}: {self.value:.4g} ({self.method}; "
            f"empirical {number(self.empirical, 'not resolved')}, "
            f"gamma fit {number(self.gamma, 'impossible')}) from {self.clips} held-out normal clips, which "
            f"resolve rates down to {100 * self.resolution:.2g} %"
        )


def clips_needed(rate: float) -> int:
    """Held-out normal clips that resolve a false-alarm rate: the least n with 1 / (n + 1) <= rate."""
    return max(1, math.ceil(1 / rate - 1e-9) - 1)


def empirical_threshold(scores: np.ndarray, rate: float) -> float | None:
    """The score that a normal clip to come exceeds with a probability of at most `rate`.

    Its rank among n scores is ceil((n + 1) (1 - rate)): split conformal prediction (Vovk, Gammerman and
    Shafer, 2005). None where that is beyond the largest.
    """
    rank = _rank(len(scores), rate)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else None


def _rank(clips: int, rate: float) -> int:
    return math.ceil((clips + 1) * (1 - rate) - 1e-9)  # which may be off by a rounding error


def gamma_threshold(scores: np.ndarray, rate: float) -> float | None:
    """Quantile of a gamma distribution fitted to the scores; it starts at 0, as cross-entropies do."""
    if len(np.unique(scores)) < 2 or scores.min() <= 0:
        return None
    shape, _, scale = scipy.stats.gamma.fit(scores, floc=0)
    return float(scipy.stats.gamma.isf(rate, shape, scale=scale))


def p_value(scores: np.ndarray, score: float) -> float:
    """How likely a normal clip scores as high: (1 + number of held-out scores as high) / (n + 1)."""
    return (1 + int(np.count_nonzero(scores >= score))) / (len(scores) + 1)


def chance(thresholds: Sequence[Threshold], draws: int = 20_000, seed: int = 0) -> tuple[float, float]:
    """The central 95 % of the share of false alarms, if all normal clips of a group are alike.

    The share of clips above the r-th of n held-out scores has a Beta(n + 1 - r, r) distribution, one for the
    clips of a group together; given it, alarms are binomial.

    Parameters
    ----------
    thresholds : sequence of Threshold
        An empirical one for each normal clip.
    """
    random = np.random.default_rng(seed)
    alarms = np.zeros(draws)
    for threshold, count in Counter(thresholds).items():
        rank = _rank(threshold.clips, threshold.rate)
        shares = random.beta(threshold.clips + 1 - rank, rank, draws)
        alarms += random.binomial(count, shares)
    low, high = np.quantile(alarms, (0.025, 0.975)) / len(thresholds)
    return float(low), float(high)


class Calibration:
    """Held-out normal scores, and the thresholds they give.

    A machine's own clips decide where there are enough to resolve the rate, else its type's, else all: then
    the rate holds on average over those machines, not for each.

    Parameters
    ----------
    machines : sequence of (machine type, machine id)
        Of each clip.
    scores : sequence of float
        Higher = more anomalous; of clips never trained on.
    rate : float
        The false-alarm rate, between 0 and 1.
    method : {"empirical", "gamma"}
        "empirical" falls back on the gamma fit where even all clips are too few.
    """

    def __init__(
        self,
        machines: Iterable[tuple[str, str]],
        scores: Sequence[float],
        rate: float,
        method: Method = "empirical",
    ):
        self.machines = list(machines)
        self.scores = np.asarray(scores, np.float64)
        self.rate, self.method = rate, method
        self._groups: dict[tuple[str, str], tuple[np.ndarray, Threshold | None]] = {}

    def __call__(self, machine: tuple[str, str], score: float) -> tuple[Threshold | None, float | None]:
        """The threshold for a machine's clips, and a clip's p-value; None of both without calibration."""
        scores, threshold = self.group(machine)
        return threshold, None if threshold is None else p_value(scores, score)

    def group(self, machine: tuple[str, str]) -> tuple[np.ndarray, Threshold | None]:
        """The scores that decide about a machine's clips, and their threshold."""
        if machine not in self._groups:
            choices = (
                (f"{machine[0]} id {machine[1]}", [one == machine for one in self.machines]),
                (machine[0], [one[0] == machine[0] for one in self.machines]),
                ("all machines", [True] * len(self.machines)),
            )
            enough = clips_needed(self.rate)
            name, chosen = next((c for c in choices if sum(c[1]) >= enough), choices[-1])
            scores = self.scores[np.array(chosen, bool)]
            self._groups[machine] = scores, self._threshold(scores, name)
        return self._groups[machine]

    def _threshold(self, scores: np.ndarray, name: str) -> Threshold | None:
        if not len(scores):
            return None
        empirical, gamma = empirical_threshold(scores, self.rate), gamma_threshold(scores, self.rate)
        both = {"empirical": empirical, "gamma": gamma}
        method = self.method if both[self.method] is not None else next((n for n in both if both[n]), None)
        if method is None:
            return None
        return Threshold(both[method], method, empirical, gamma, len(scores), name, self.rate)

    def alarms(
        self, machines: Sequence[tuple[str, str]], scores: np.ndarray, anomaly: np.ndarray
    ) -> dict[str, Any]:
        """Count alarms on clips of known truth that set no threshold.

        Parameters
        ----------
        machines : sequence of (machine type, machine id)
        scores : (n,)
        anomaly : (n,) of 0 and 1

        Returns
        -------
        dict
            "threshold_from" (held-out clips a threshold), "normal_clips", "false_alarms", "rate_found" with
            its Clopper-Pearson interval "binomial_low" and "binomial_high", "chance_low" and "chance_high"
            (see `chance`; None where a threshold comes from the gamma fit), "anomalous_clips", "detected".
        """
        thresholds = [self.group(machine)[1] for machine in machines]
        called = np.array([s > t.value for s, t in zip(scores, thresholds, strict=True)], bool)
        used = [threshold for threshold, truth in zip(thresholds, anomaly, strict=True) if truth == 0]
        alarms = int(called[anomaly == 0].sum())
        interval = scipy.stats.binomtest(alarms, len(used)).proportion_ci()
        ranked = all(threshold.method == "empirical" for threshold in used)
        low, high = chance(used) if ranked else (None, None)
        clips = sorted({threshold.clips for threshold in used})
        return {
            "threshold_from": f"{clips[0]} to {clips[-1]} clips" if len(clips) > 1 else f"{clips[0]} clips",
            "normal_clips": len(used),
            "false_alarms": alarms,
            "rate_found": alarms / len(used),
            "binomial_low": float(interval.low),
            "binomial_high": float(interval.high),
            "chance_low": low,
            "chance_high": high,
            "anomalous_clips": int((anomaly == 1).sum()),
            "detected": int(called[anomaly == 1].sum()),
        }
