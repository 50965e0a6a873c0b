"""Trained detectors examined: test clips filtered, occluded or in noise, and other anomaly scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F
from tqdm import tqdm

from osscl_min import checkpoint
from osscl_min.checkpoint import Checkpoint
from osscl_min.config import EvaluateConfig
from osscl_min.data.batches import batches_of, load_batches
from osscl_min.data.reader import Data, open_data
from osscl_min.evaluate import Scored, known_machines, score_clips
from osscl_min.experiments import perturbations as signals
from osscl_min.experiments.sweep import difference
from osscl_min.features import FrontEnd, ZeroPhaseFilter, to_wave
from osscl_min.losses import anomaly_score
from osscl_min.metrics import Resampled, Score, average, resampled
from osscl_min.runtime.device import choose_device, prepare
from osscl_min.runtime.files import provenance, read_json

CUTOFFS = (500.0, 1000.0, 2000.0, 3000.0, 4000.0, 5000.0, 6000.0, 7000.0)  # Hz
SNRS = (20.0, 10.0, 0.0, -10.0)  # dB
BANDS = 8  # of equally many mel bands
NEIGHBOURS = 5  # training embeddings whose mean distance is a score


@dataclass(frozen=True)
class Subject:
    """A trained detector and the data that it is examined on."""

    trained: Checkpoint
    data: Data
    config: EvaluateConfig
    cutoffs: Sequence[float] = CUTOFFS

    def score(self, split: str = "test", **changes: Any) -> Scored:
        """Score the clips of a split whose machine and truth are known; `changes` go to `score_clips`."""
        reader = getattr(self.data, split)
        positions, _ = known_machines(self.trained, reader)
        positions = [p for p in positions if split == "train" or reader.clips[p].anomaly is not None]
        return score_clips(self.trained, reader, config=self.config, positions=positions, **changes)

    def batches(self, split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
        """Samples (B, samples) int16, labels (B,) and positions, in batches, of the same clips."""
        reader = getattr(self.data, split)
        labels = self.trained.labels_of(reader.clips)
        cuts = batches_of(np.flatnonzero(labels >= 0), self.config.batch_size, least=1)
        loaded = load_batches(reader, labels, cuts, self.trained.device)
        for (samples, target), cut in zip(loaded, cuts, strict=True):
            yield samples, target, cut.tolist()


Measured = Iterator[tuple[dict[str, Any], Sequence[Score]]]  # what sets a row apart, and its clips' scores


def filtered(subject: Subject) -> Measured:
    """Test clips low-passed or high-passed; the detector stays as trained."""
    audio = subject.trained.config.model.audio
    filters = [("none", None, None)]
    filters += [
        (kind, cutoff, ZeroPhaseFilter(kind, cutoff, audio))
        for kind in ("low-pass", "high-pass")
        for cutoff in subject.cutoffs
    ]
    for kind, cutoff, transform in tqdm(filters, "filtering test clips", unit="filter", disable=None):
        yield {"filter": kind, "cutoff_hz": cutoff}, subject.score(transform=transform).rows


def occluded(subject: Subject) -> Measured:
    """Bands of the test clips' log-mel silenced, or set to their mean in the machine's training clips.

    The wave, which Tgram and TFgram hear, stays whole.
    """
    levels = machine_levels(subject)
    settings = {"replaced_by": "nothing", "low_hz": None, "high_hz": None}
    yield settings, subject.score().rows
    conditions = [
        (by, level, band)
        for by, level in (("silence", None), ("training mean", levels))
        for band in signals.bands(subject.trained.config.model.audio, BANDS)
    ]
    for by, level, (rows, low, high) in tqdm(conditions, "occluding bands", unit="band", disable=None):
        occlude = signals.replace_band(rows, level)
        yield {"replaced_by": by, "low_hz": low, "high_hz": high}, subject.score(occlude=occlude).rows


def noisy(subject: Subject) -> Measured:
    """Test clips in white, pink and factory-like noise."""
    audio = subject.trained.config.model.audio
    yield {"noise": "none", "snr_db": None}, subject.score().rows
    conditions = [(kind, snr) for kind in signals.NOISES for snr in SNRS]
    for kind, snr in tqdm(conditions, "adding noise", unit="condition", disable=None):
        transform = signals.clip_noise(kind, snr, audio)
        yield {"noise": kind, "snr_db": snr}, subject.score(transform=transform).rows


def scored_otherwise(subject: Subject) -> Measured:
    """The paper's anomaly score and three others, all of the same embeddings."""
    test, training = subject.score(), subject.score("train")
    head = subject.trained.model.arcface
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
        yield {"score": name}, replace(test, scores=values).rows


def machine_levels(subject: Subject) -> torch.Tensor:
    """Mean log-mel (dB) of each machine's training clips over clips and frames: (classes, mels)."""
    audio, classes = subject.trained.config.model.audio, len(subject.trained.classes)
    front = FrontEnd(audio).to(subject.trained.device)
    total = torch.zeros(classes, audio.mels, device=subject.trained.device)
    count = torch.zeros(classes, dtype=torch.int64, device=total.device)
    for samples, labels, _ in subject.batches("train"):
        total.index_add_(0, labels, front(samples)[1].mean((1, 3)))
        count += labels.bincount(minlength=classes)
    return total / count[:, None].clamp(min=1)


def energy_shares(subject: Subject) -> list[dict[str, Any]]:
    """Each band's share of the test clips' energy, a mean over the clips of a type, normal and anomalous."""
    audio = subject.trained.config.model.audio
    edges = [low for _, low, _ in signals.bands(audio, BANDS)] + [audio.f_max]
    frequency = torch.linspace(0, audio.sample_rate / 2, audio.samples // 2 + 1)
    cuts = torch.searchsorted(frequency, torch.tensor(edges[1:-1])).tolist()
    shares: dict[tuple[str, int | None], list[torch.Tensor]] = {}
    for samples, _, positions in subject.batches("test"):
        power = torch.fft.rfft(to_wave(samples)).abs().square()
        power = torch.stack([part.sum(1) for part in power.tensor_split(cuts, 1)], 1)
        for position, share in zip(positions, (power / power.sum(1, keepdim=True).clamp(min=1e-30)).cpu(),
                                   strict=True):  # fmt: skip
            clip = subject.data.test.clips[position]
            shares.setdefault((clip.machine_type, clip.anomaly), []).append(share)
    means = {key: torch.stack(values).double().mean(0) for key, values in shares.items()}
    return [
        {"low_hz": low, "high_hz": high, "type": machine_type,
         "normal": _at(means.get((machine_type, 0)), n), "anomalous": _at(means.get((machine_type, 1)), n)}
        for n, (low, high) in enumerate(zip(edges, edges[1:], strict=False))
        for machine_type in sorted({key[0] for key in means}, key=str.lower)
    ]  # fmt: skip


def _at(values: torch.Tensor | None, n: int) -> float | None:
    return None if values is None else float(values[n])


def frequency_responses(trained: Checkpoint, bins: int = 513) -> dict[str, np.ndarray]:
    """Magnitude responses (dB) of the first convolutions of Tgram and TFgram: {name: (filters, bins)}.

    `bins` frequencies from 0 to half the sample rate; the strides, which alias, are not part of it.
    """
    model, found = trained.model, {}
    for name, weight in (
        ("tgram", model.tgram and model.tgram.extractor.weight),
        ("tfgram", model.tfgram and model.tfgram.conv[0].weight),
    ):
        if weight is not None:
            spectrum = torch.fft.rfft(weight.detach()[:, 0].double().cpu(), 2 * (bins - 1))
            found[name] = (20 * spectrum.abs().clamp(min=1e-12).log10()).numpy()
    return found


def responses_before_and_after(best: Path | str) -> dict[str, np.ndarray]:
    """`frequency_responses` of a run's best.pt and, where it lies beside it, its initial.pt.

    Returns
    -------
    dict
        "tgram_before", "tgram_after", "tfgram_before", "tfgram_after", as far as there are such.
    """
    files = {"before": Path(best).with_name("initial.pt"), "after": Path(best)}
    return {
        f"{name}_{when}": gain
        for when, path in files.items()
        if path.is_file()
        for name, gain in frequency_responses(checkpoint.load(path)).items()
    }


PROBES: dict[str, tuple[Callable[[Subject], Measured], tuple[str, ...]]] = {  # and the splits that it reads
    "high-frequency": (filtered, ("test",)),
    "bands": (occluded, ("train", "test")),
    "noise": (noisy, ("test",)),
    "scores": (scored_otherwise, ("train", "test")),
}


def subjects(
    checkpoints: Mapping[str, Sequence[Path]],
    data: Path | str,
    splits: Sequence[str],
    config: EvaluateConfig,
    device: str = "auto",
    cutoffs: Sequence[float] = CUTOFFS,
) -> Iterator[tuple[str, Subject]]:
    """Variant and subject of every checkpoint; the data is opened once."""
    where = choose_device(device)
    prepare(where, config.precision)
    opened = None
    for variant, paths in checkpoints.items():
        for path in paths:
            trained = checkpoint.load(path, where)
            opened = opened or open_data(data, trained.config.model.audio, splits=splits)
            yield variant, Subject(trained, opened, config, cutoffs)


def examine(
    name: str,
    checkpoints: Mapping[str, Sequence[Path]],
    data: Path | str,
    *,
    config: EvaluateConfig = EvaluateConfig(),
    device: str = "auto",
    cutoffs: Sequence[float] = CUTOFFS,
) -> dict[str, Any]:
    """Examine trained detectors: AUC under every condition, and what it differs from the first one.

    Parameters
    ----------
    name : str
        One of PROBES.
    checkpoints : mapping of str to sequence of Path
        Variant -> its best.pt, one a seed.
    data : Path or str
    config : EvaluateConfig
        `bootstrap` 0 leaves out intervals and differences.
    device : str
    cutoffs : sequence of float
        Hz, for "high-frequency".

    Returns
    -------
    dict
        "conditions" is a list of rows: their settings, "variant", "seeds", "metrics" (see
        `metrics.evaluate_scores`; the mean over the seeds), "each" (average's AUC id-mean of each seed),
        "difference" to the variant's first condition, on "average" and of each type (see
        `sweep.difference`), and, beyond the first variant, "gain" over that one in the same condition.
    """
    measure, splits = PROBES[name]
    times = config.bootstrap
    rows: dict[tuple, dict[str, Any]] = {}
    measured: dict[tuple, dict[int, Resampled]] = {}
    extra: dict[str, Any] = {}
    first = None
    for variant, subject in subjects(checkpoints, data, splits, config, device, cutoffs):
        first = first or subject
        seed = subject.trained.config.train.seed
        for settings, scores in measure(subject):
            key = variant, *settings.values()
            rows.setdefault(key, {**settings, "variant": variant})
            measured.setdefault(key, {})[seed] = resampled(scores, times)
    types = [entry["type"] for entry in next(iter(measured[next(iter(rows))].values()))[0]["types"]]

    def compare(key: tuple, other: tuple) -> dict[str, Any]:
        seeds = [seed for seed in measured[key] if seed in measured[other]]
        ours, base = ([measured[which][seed] for seed in seeds] for which in (key, other))
        return {name or "average": difference(ours, base, name) for name in ("", *types)}

    bases: dict[str, tuple] = {}
    for key, row in rows.items():
        base = bases.setdefault(key[0], key)
        seeds = list(measured[key])
        row["seeds"], row["metrics"] = seeds, average(list(measured[key].values()))
        row["each"] = [measured[key][seed][0]["average"]["auc_id_mean"] for seed in seeds]
        if times and key != base:
            row["difference"] = compare(key, base)
        other = (next(iter(bases)), *key[1:])
        if times and other != key and set(measured[key]) & set(measured[other]):
            row["gain"] = compare(key, other)
    if name == "high-frequency":
        audio = first.trained.config.model.audio
        extra = {
            "filter": "zero-phase Butterworth, run forwards and backwards",
            "order": ZeroPhaseFilter.order,
            "sample_rate": audio.sample_rate,
        }
    if name == "bands":
        extra = {"energy": energy_shares(first)}
    return {
        "experiment": name,
        **about(first, checkpoints),
        **extra,
        "conditions": list(rows.values()),
        "provenance": provenance(choose_device(device)),
    }


def about(subject: Subject, checkpoints: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Data, preset and commits behind a result, as `sweep.origin` reads them."""
    folders = [Path(path).parent for paths in checkpoints.values() for path in paths]
    logs = [folder / "config.json" for folder in folders if (folder / "config.json").is_file()]
    trained = subject.trained
    return {
        "data": subject.data.dataset.root.name,
        "synthetic": subject.data.dataset.synthetic,
        "clips": len(subject.data.test),
        "preset": trained.config.preset,
        "precision": trained.config.train.precision,
        "epochs": trained.config.train.epochs,
        "commits": sorted({read_json(log)["provenance"]["commit"] for log in logs}),
    }
