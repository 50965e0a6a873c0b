"""Scores that compare a clip with normal clips of its own machine, with and without the network.

"nearest" adds two distances from the nearest of these clips: between embeddings, and between profiles. A
profile is the 98th percentile over time of each log-mel band, which short events raise too. "profile" is the
second distance alone, and "gaussian" a Mahalanobis distance: neither needs training, so they show what the
network is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf

PERCENTILE = 0.98
NEAREST = 2  # clips whose mean distance counts
MOST = 200  # clips kept per machine
# the scores of this module and, for each that adds distances, what these lie between
FORMS = {"nearest": ("embeddings", "levels"), "profile": ("levels",), "gaussian": ()}


def profile(log_mel: torch.Tensor) -> torch.Tensor:
    """(B, 1, mels, frames) in dB -> (B, 3, mels): 98th percentile, mean and deviation over time."""
    place = PERCENTILE * (log_mel.shape[-1] - 1)
    highest = log_mel[:, 0].topk(log_mel.shape[-1] - int(place), dim=-1).values
    percentile = highest[..., -1].lerp(highest[..., max(-2, -highest.shape[-1])], place % 1)
    return torch.stack([percentile, log_mel[:, 0].mean(-1), log_mel[:, 0].std(-1, correction=0)], dim=1)


def choose(labels: np.ndarray, recordings: np.ndarray, seed: int) -> np.ndarray:
    """Which clips to keep, as sorted positions: whole recordings, drawn at random, MOST clips per machine.

    A recording of more clips counts with its first MOST.
    """
    random, kept = np.random.default_rng([seed, 4]), []
    for label in np.unique(labels):
        count = 0
        for recording in random.permutation(np.unique(recordings[labels == label])):
            clips = np.flatnonzero((labels == label) & (recordings == recording))[:MOST]
            if count + len(clips) <= MOST:
                kept.append(clips)
                count += len(clips)
            if count == MOST:
                break
    return np.sort(np.concatenate(kept))


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Training clips to compare with.

    Every distance is normalised by the mean and the deviation of the same distance between the machine's own
    recordings, each left out in turn, so that the scores of different machines mean the same.
    """

    labels: np.ndarray  # (n,) int64, classes
    recordings: np.ndarray  # (n,) int64; the clips of one recording are never each other's neighbours
    embeddings: np.ndarray  # (n, D) float32
    profiles: np.ndarray  # (n, 3, mels) float32

    @property
    def levels(self) -> np.ndarray:
        """The percentiles of the profiles, (n, mels)."""
        return self.profiles[:, 0]

    def deviation(self, log_mel: np.ndarray, label: int) -> np.ndarray:
        """A log-mel (mels, frames) in standard deviations from each band's mean over a machine's training."""
        _, means, deviations = self.profiles[self.labels == label].transpose(1, 0, 2)
        spread = np.sqrt((deviations**2).mean(0) + means.var(0))
        return (log_mel - means.mean(0)[:, None]) / np.maximum(spread, 1e-6)[:, None]

    def _within(self, name: str, label: int) -> np.ndarray:
        """Distances of a machine's clips from its nearest other recordings, where there are any."""
        own = self.labels == label
        points, recordings = getattr(self, name)[own], self.recordings[own]
        same = recordings[:, None] == recordings
        distances = _nearest(np.where(same, np.nan, cdist(points, points)))
        return distances[~np.isnan(distances)]

    @cached_property
    def _moments(self) -> dict[tuple[str, int], tuple[float, float]]:
        """Mean and deviation of the distances within each machine; the average over all machines where it has
        fewer than three recordings or all distances are equal."""
        labels, moments = np.unique(self.labels), {}
        few = [label for label in labels if len(np.unique(self.recordings[self.labels == label])) < 3]
        for name in FORMS["nearest"]:
            within = {label: self._within(name, label) for label in labels}
            own = {label: (d.mean(), d.std(ddof=1)) for label, d in within.items() if d.size and d.std()}
            typical = tuple(np.mean(list(own.values()), axis=0)) if own else (0.0, 1.0)
            for label in labels:
                moments[name, label] = typical if label in few else own.get(label, typical)
        return moments

    def scores(
        self, form: str, labels: np.ndarray, embeddings: np.ndarray, profiles: np.ndarray
    ) -> np.ndarray:
        """Anomaly scores (m,) float64 of clips against their machines; NaN if a machine has too few here.

        Parameters
        ----------
        form : one of FORMS
        labels : (m,) int64
        embeddings : (m, D)
        profiles : (m, 3, mels), see `profile`
        """
        result = np.full(len(labels), np.nan)
        points = {"embeddings": embeddings, "levels": profiles[:, 0]}
        for label in np.intersect1d(labels, self.labels):
            chosen, own = np.flatnonzero(labels == label), self.labels == label
            if form != "gaussian":
                result[chosen] = 0
            elif own.sum() > 1:
                result[chosen] = _mahalanobis(self.profiles[own, 1:], profiles[chosen, 1:])
            for name in FORMS[form]:
                mean, deviation = self._moments[name, label]
                distance = _nearest(cdist(points[name][chosen], getattr(self, name)[own]))
                result[chosen] += (distance - mean) / deviation
        return result


def _nearest(distances: np.ndarray) -> np.ndarray:
    """(m, n) -> mean of each row's NEAREST smallest; NaN is no neighbour."""
    nearest = np.ma.masked_invalid(np.sort(distances, axis=1)[:, :NEAREST])
    return nearest.mean(axis=1).filled(np.nan)


def _mahalanobis(own: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance of points (m, 2, mels) from the Gaussian of `own` (n, 2, mels), shrunk by Ledoit and Wolf."""
    gaussian = LedoitWolf().fit(own.reshape(len(own), -1).astype(np.float64))
    return np.sqrt(gaussian.mahalanobis(points.reshape(len(points), -1).astype(np.float64)))
