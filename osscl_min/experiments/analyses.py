"""Analyses of trained detectors: test clips filtered, occluded or in noise, other scores, the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F
from tqdm import tqdm

from osscl_min import checkpoint
from osscl_min.checkpoint import Checkpoint
from osscl_min.config import EvaluateConfig
from osscl_min.data.batches import batches_of, load_batches
from osscl_min.data.reader import Data, open_data
from osscl_min.evaluate import Scored, known_machines, score_clips
from osscl_min.experiments import perturbations
from osscl_min.experiments.sweep import Condition
from osscl_min.features import FrontEnd, ZeroPhaseFilter, to_wave
from osscl_min.losses import anomaly_score
from osscl_min.metrics import Score, measured
from osscl_min.runtime.device import choose_device, prepare
from osscl_min.runtime.files import UserError, provenance, read_json, replacing

CUTOFFS = (500.0, 1000.0, 2000.0, 3000.0, 4000.0, 5000.0, 6000.0, 7000.0)  # Hz
SNRS = (20.0, 10.0, 0.0, -10.0)  # dB
BANDS = 8  # with equally many mel bands each
NEIGHBOURS = 5  # training embeddings whose mean distance is a score


@dataclass(frozen=True)
class Detector:
    """A trained detector and the data that it is examined on."""

    trained: Checkpoint
    data: Data
    config: EvaluateConfig
    cutoffs: Sequence[float] = CUTOFFS

    def positions(self, split: str) -> list[int]:
        """The clips of known machines: all training clips, and the test clips that metrics are made of."""
        reader = getattr(self.data, split)
        known, _ = known_machines(self.trained, reader)
        if split == "train":
            return known
        chosen = set(measured([reader.clips[position] for position in known]))
        if not chosen:
            raise UserError("no test clip has a known truth, so there is nothing to measure")
        return [position for position in known if reader.clips[position] in chosen]

    def score(self, split: str = "test", **changes: Any) -> Scored:
        """Score the clips of a split; `changes` go to `score_clips`."""
        reader, positions = getattr(self.data, split), self.positions(split)
        return score_clips(self.trained, reader, config=self.config, positions=positions, **changes)

    @cached_property
    def plain(self) -> Scored:
        """The test clips as they are, scored once."""
        return self.score()

    def batches(self, split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
        """Samples (B, samples) int16, labels (B,) and positions of the same clips, in batches."""
        reader = getattr(self.data, split)
        labels = self.trained.labels_of(reader.clips)
        cuts = batches_of(np.array(self.positions(split)), self.config.batch_size, least=1)
        loaded = load_batches(reader, labels, cuts, self.trained.device)
        for (samples, target), cut in zip(loaded, cuts, strict=True):
            yield samples, target, cut.tolist()


# The settings of each condition, the scores of its clips, and further values (`sweep.VALUES`).
Examined = Iterator[tuple[dict[str, Any], list[Score], dict[str, float | None]]]


def filtered(detector: Detector) -> Examined:
    """Test clips low-passed or high-passed; the detector stays as trained."""
    audio = detector.trained.config.model.audio
    yield {"filter": "none", "cutoff_hz": None}, detector.plain.rows, {}
    filters = [(kind, cutoff) for kind in ("low-pass", "high-pass") for cutoff in detector.cutoffs]
    for kind, cutoff in tqdm(filters, "filtering test clips", unit="filter", disable=None):
        scored = detector.score(transform=ZeroPhaseFilter(kind, cutoff, audio))
        yield {"filter": kind, "cutoff_hz": cutoff}, scored.rows, {}


def occluded(detector: Detector) -> Examined:
    """Bands of the test clips' log-mel silenced, or set to their mean over the machine's training clips.

    The wave, which Tgram and TFgram take, stays whole.
    """
    yield {"replaced_by": "nothing", "low_hz": None, "high_hz": None}, detector.plain.rows, {}
    bands = perturbations.bands(detector.trained.config.model.audio, BANDS)
    fills = {"silence": None, "training mean": machine_levels(detector)}
    conditions = [(fill, level, band) for fill, level in fills.items() for band in bands]
    for fill, level, (rows, low, high) in tqdm(conditions, "occluding bands", unit="band", disable=None):
        scored = detector.score(occlude=perturbations.replace_band(rows, level))
        yield {"replaced_by": fill, "low_hz": low, "high_hz": high}, scored.rows, {}


def noisy(detector: Detector) -> Examined:
    """Test clips in white, pink and factory-like noise."""
    audio = detector.trained.config.model.audio
    yield {"noise": "none", "snr_db": None}, detector.plain.rows, {}
    conditions = [(kind, snr) for kind in perturbations.NOISES for snr in SNRS]
    for kind, snr in tqdm(conditions, "adding noise", unit="condition", disable=None):
        scored = detector.score(transform=perturbations.clip_noise(kind, snr, audio))
        yield {"noise": kind, "snr_db": snr}, scored.rows, {}


def scored_otherwise(detector: Detector) -> Examined:
    """The paper's anomaly score and three others, all of the same embeddings."""
    test, training = detector.plain, detector.score("train")
    head = detector.trained.model.arcface
    weight = F.normalize(head.weight.detach().double().cpu())
    cosine = torch.from_numpy(test.embeddings).double() @ weight.T
    labels = torch.from_numpy(test.labels)
    distance = np.empty(len(labels))
    for label in np.unique(test.labels):
        own = training.embeddings[training.labels == label]
        near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(own)), metric="cosine").fit(own)
        chosen = test.labels == label
        distance[chosen] = near.kneighbors(test.embeddings[chosen])[0].mean(1)
    for name, values in (
        ("cross-entropy with margin (paper)", test.scores),
        ("cross-entropy without margin", anomaly_score(head.scale * cosine, labels).numpy()),
        ("1 - cosine to the class weight", 1 - cosine.gather(1, labels[:, None])[:, 0].numpy()),
        (f"mean cosine distance to the {NEIGHBOURS} nearest training clips", distance),
    ):
        yield {"score": name}, replace(test, scores=values).rows, {}


def embedded(detector: Detector) -> Examined:
    """How far machines, and normal and anomalous clips, lie apart among the test embeddings."""
    yield {}, detector.plain.rows, separation(detector.plain)


def separation(scored: Scored) -> dict[str, float | None]:
    """Silhouettes and nearest neighbours of embeddings; None where the clips do not give one.

    Silhouette, from -1 to 1: of the machines, among normal clips; of normal and anomalous clips within a
    machine, averaged. Neighbour: the nearest other clip, in percent. Kind: normal or anomalous.
    """
    anomaly = np.array([clip.anomaly for clip in scored.clips])
    points, labels, normal = scored.embeddings, scored.labels, anomaly == 0

    def silhouette(chosen: np.ndarray, groups: np.ndarray) -> float | None:
        count = len(np.unique(groups[chosen]))
        if not 2 <= count < chosen.sum():
            return None
        return float(silhouette_score(points[chosen], groups[chosen], metric="cosine"))

    def nearest(chosen: np.ndarray) -> np.ndarray:
        """For each of the chosen clips, the position of the nearest other one among them."""
        own = np.flatnonzero(chosen)
        near = NearestNeighbors(n_neighbors=1, metric="cosine").fit(points[own]).kneighbors()[1][:, 0]
        return own[near]

    def mean(values: Sequence[Any]) -> float | None:
        values = [value for value in values if value is not None]
        return float(np.mean(values)) if values else None

    same = labels[nearest(np.ones(len(labels), bool))] == labels
    machines = [labels == label for label in np.unique(labels) if (labels == label).sum() > 1]
    kinds = [kind for own in machines for kind in anomaly[nearest(own)] == anomaly[own]]
    return {
        "silhouette_machines": silhouette(normal, labels),
        "silhouette_anomalies": mean([silhouette(own, anomaly) for own in machines]),
        "neighbour_normal": mean([100 * value for value in same[normal]]),
        "neighbour_anomalous": mean([100 * value for value in same[~normal]]),
        "neighbour_kind": mean([100 * value for value in kinds]),
    }


def machine_levels(detector: Detector) -> torch.Tensor:
    """Mean log-mel (dB) of each machine's training clips over clips and frames: (classes, mels)."""
    audio, classes = detector.trained.config.model.audio, len(detector.trained.classes)
    front = FrontEnd(audio).to(detector.trained.device)
    total = torch.zeros(classes, audio.mels, device=detector.trained.device)
    count = torch.zeros(classes, dtype=torch.int64, device=total.device)
    for samples, labels, _ in detector.batches("train"):
        total.index_add_(0, labels, front(samples)[1].mean((1, 3)))
        count += labels.bincount(minlength=classes)
    return total / count[:, None].clamp(min=1)


def energy_shares(detector: Detector) -> list[dict[str, Any]]:
    """Each band's share of the test clips' energy, averaged over a type's normal and its anomalous clips."""
    audio = detector.trained.config.model.audio
    edges = [low for _, low, _ in perturbations.bands(audio, BANDS)] + [audio.f_max]
    frequency = torch.linspace(0, audio.sample_rate / 2, audio.samples // 2 + 1)
    cuts = torch.searchsorted(frequency, torch.tensor(edges[1:-1])).tolist()
    shares: dict[str, dict[int, list[torch.Tensor]]] = {}
    for samples, _, positions in detector.batches("test"):
        power = torch.fft.rfft(to_wave(samples)).abs().square()
        power = torch.stack([part.sum(1) for part in power.tensor_split(cuts, 1)], 1)
        power = (power / power.sum(1, keepdim=True).clamp(min=1e-30)).cpu()
        for position, share in zip(positions, power, strict=True):
            clip = detector.data.test.clips[position]
            shares.setdefault(clip.machine_type, {0: [], 1: []})[clip.anomaly].append(share)

    def mean(parts: Sequence[torch.Tensor], band: int) -> float | None:
        return float(torch.stack(list(parts))[:, band].double().mean()) if parts else None

    return [
        {"low_hz": low, "high_hz": high, "type": name,
         "normal": mean(shares[name][0], band), "anomalous": mean(shares[name][1], band)}
        for band, (low, high) in enumerate(zip(edges, edges[1:], strict=False))
        for name in sorted(shares, key=str.lower)
    ]  # fmt: skip


def frequency_responses(trained: Checkpoint, bins: int = 513) -> dict[str, np.ndarray]:
    """Magnitude responses (dB) of the first convolutions of Tgram and TFgram: {name: (filters, bins)}.

    `bins` frequencies from 0 to half the sample rate; the strides, which alias, are not part of it.
    """
    model, responses = trained.model, {}
    for name, weight in (
        ("tgram", model.tgram and model.tgram.extractor.weight),
        ("tfgram", model.tfgram and model.tfgram.conv[0].weight),
    ):
        if weight is not None:
            spectrum = torch.fft.rfft(weight.detach()[:, 0].double().cpu(), 2 * (bins - 1))
            responses[name] = (20 * spectrum.abs().clamp(min=1e-12).log10()).numpy()
    return responses


ANALYSES: dict[
    str, tuple[Callable[[Detector], Examined], tuple[str, ...]]
] = {  # and the splits that it reads
    "high-frequency": (filtered, ("test",)),
    "bands": (occluded, ("train", "test")),
    "noise": (noisy, ("test",)),
    "scores": (scored_otherwise, ("train", "test")),
    "embeddings": (embedded, ("test",)),
}


def detectors(
    checkpoints: Mapping[str, Sequence[Path]],
    data: Path | str,
    splits: Sequence[str],
    config: EvaluateConfig,
    device: str = "auto",
    cutoffs: Sequence[float] = CUTOFFS,
) -> Iterator[tuple[str, Detector]]:
    """Variant and detector of every checkpoint; the data is opened once."""
    where = choose_device(device)
    prepare(where, config.precision)
    opened = None
    for variant, paths in checkpoints.items():
        for path in paths:
            trained = checkpoint.load(path, where)
            opened = opened or open_data(data, trained.config.model.audio, splits=splits)
            yield variant, Detector(trained, opened, config, cutoffs)


def collect(
    name: str,
    checkpoints: Mapping[str, Sequence[Path]],
    data: Path | str,
    out: Path,
    config: EvaluateConfig,
    device: str = "auto",
    cutoffs: Sequence[float] = CUTOFFS,
) -> tuple[list[Condition], dict[str, Any]]:
    """The scores of trained detectors under every condition of one of ANALYSES, and the facts behind them.

    `checkpoints` maps a variant to a best.pt for each seed. `out` gets arrays for figures: first filters
    before and after training, or embeddings of the first seed.
    """
    examine, splits = ANALYSES[name]
    conditions: dict[tuple, Condition] = {}
    points: dict[str, np.ndarray] = {}
    first, commits = None, set()
    for variant, detector in detectors(checkpoints, data, splits, config, device, cutoffs):
        first, seed = first or detector, detector.trained.config.train.seed
        for settings, scores, values in examine(detector):
            settings = {"variant": variant, **settings}
            condition = conditions.setdefault(tuple(settings.values()), Condition(settings, {}, {}))
            condition.scores[seed] = scores
            for key, value in values.items():
                condition.values.setdefault(key, []).append(value)
        written = Path(detector.trained.path).with_name("config.json")
        if written.is_file():
            commits.add(read_json(written)["provenance"]["commit"])
        if name == "embeddings" and f"{variant}/embeddings" not in points:
            plain = detector.plain
            anomaly = np.array([clip.anomaly for clip in plain.clips])
            points |= {f"{variant}/embeddings": plain.embeddings, "labels": plain.labels, "anomaly": anomaly}
    audio, train = first.trained.config.model.audio, first.trained.config.train
    facts = {
        "data": first.data.dataset.root.name,
        "synthetic": first.data.dataset.synthetic,
        "preset": first.trained.config.preset,
        "precision": train.precision,
        "epochs": train.epochs,
        "commits": sorted(commits),
        "provenance": provenance(choose_device(device)),
    }
    if name == "high-frequency":
        facts |= {"filter": "zero-phase Butterworth, run forwards and backwards",
                  "order": ZeroPhaseFilter.order, "sample_rate": audio.sample_rate}  # fmt: skip
        best = Path(first.trained.path)
        for when, path in (("before", best.with_name("initial.pt")), ("after", best)):
            if path.is_file():
                gains = frequency_responses(checkpoint.load(path))
                points |= {f"{part}_{when}": gain for part, gain in gains.items()}
    if name == "bands":
        facts["energy"] = energy_shares(first)
    if name == "embeddings":
        facts["machines"] = [" ".join(machine) for machine in first.trained.classes]
    if points:
        stem = name.replace("-", "_") + ("_filters" if name == "high-frequency" else "")
        with replacing(out / f"{stem}.npz", "wb") as file:
            np.savez(file, **points)
    return list(conditions.values()), facts
