"""Anomaly scores of test clips, in batches and constant memory, and the tables made from them."""

from __future__ import annotations

import csv
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import maximum
from tqdm import tqdm

from osscl_min import checkpoint
from osscl_min.checkpoint import Checkpoint
from osscl_min.config import EvaluateConfig, to_dict
from osscl_min.data.batches import batches_of, load_batches
from osscl_min.data.clips import Clip
from osscl_min.data.reader import Reader, open_data
from osscl_min.features import FrontEnd
from osscl_min.losses import anomaly_score
from osscl_min.metrics import Score, evaluate_scores, measured, write_metrics
from osscl_min.model import OSSCL
from osscl_min.neighbours import FORMS, profile
from osscl_min.runtime.device import autocast, choose_device, implementation, prepare
from osscl_min.runtime.distributed import Ranks, current, joined
from osscl_min.runtime.files import (
    UserError,
    peak_memory_mb,
    printable,
    provenance,
    replacing,
    safe_name,
    write_csv,
    write_json,
)

Transform = Callable[[torch.Tensor], torch.Tensor]
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]  # samples (B, samples) int16, labels (B,) int64


@torch.no_grad()
def embed(
    model: OSSCL,
    front: FrontEnd,
    batches: Batches,
    precision: str,
    transform: Transform | None = None,
    occlude: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Unit embeddings (B, D), profiles (B, 3, mels; see `neighbours.profile`) and labels (B,) of batches.

    `transform` changes the waves (B, samples), `occlude` the log-mels (B, 1, mels, frames) given the labels.
    """
    model.eval()
    for samples, labels in batches:
        wave, log_mel = front(samples, transform)
        if occlude is not None:
            log_mel = occlude(log_mel, labels)
        with autocast(samples.device, precision):
            _, embedding = model(wave, log_mel)
        yield embedding, profile(log_mel), labels


@torch.no_grad()
def score_batches(
    model: OSSCL, front: FrontEnd, batches: Batches, precision: str, form: str = "exact", **changes: Any
) -> tuple[torch.Tensor, ...]:
    """Labels, scores, recognised classes, embeddings and profiles, on the CPU; `changes` go to `embed`."""
    parts = []
    for embedding, profiles, labels in embed(model, front, batches, precision, **changes):
        scores = anomaly_score(model.arcface(embedding, labels), labels, form)
        values = labels, scores, model.arcface(embedding).argmax(1), embedding, profiles
        parts.append([value.cpu() for value in values])
    return tuple(map(torch.cat, zip(*parts, strict=True)))


@dataclass
class Scored:
    """Scores of recordings; a long one counts with its highest window."""

    clips: list[Clip]
    labels: np.ndarray  # (n,) int64, own class
    scores: np.ndarray  # (n,) float64, higher = more anomalous
    predicted: np.ndarray  # (n,) int64, the class recognised, margin off
    embeddings: np.ndarray  # (n, D) float32, of unit length
    windows: np.ndarray  # (n,) int64, of each recording
    seconds: float
    forms: dict[str, np.ndarray]  # the scores (n,) of every form that the checkpoint allows

    @property
    def rows(self) -> list[Score]:
        """For `metrics.evaluate_scores`."""
        return self.rows_of(self.scores)

    def rows_of(self, scores: np.ndarray) -> list[Score]:
        """The same with other scores."""
        return [
            Score(printable(clip.path.name), *clip.machine, float(score), clip.anomaly, clip.subset, windows)
            for clip, score, windows in zip(self.clips, scores, self.windows.tolist(), strict=True)
        ]

    @property
    def identity_accuracy(self) -> float | None:
        """Share of the normal `measured` clips recognised as their own machine; None without any."""
        chosen = set(measured(self.clips))
        normal = np.array([clip.anomaly == 0 and clip in chosen for clip in self.clips], bool)
        return float((self.predicted == self.labels)[normal].mean()) if normal.any() else None


def score_clips(
    trained: Checkpoint,
    reader: Reader,
    *,
    config: EvaluateConfig = EvaluateConfig(),
    positions: Sequence[int] | None = None,
    **changes: Any,
) -> Scored:
    """Score clips of a reader (all, or those at `positions`) against their own machines.

    Several processes share the clips, and all get the result. `changes` go to `embed`.
    """
    labels = trained.labels_of(reader.clips)
    positions = np.arange(len(reader)) if positions is None else np.asarray(positions)
    if (labels[positions] < 0).any():
        raise UserError("a clip of a machine that was never trained on cannot be scored against itself")
    front = FrontEnd(trained.config.model.audio).to(trained.device)
    ranks = current() if len(positions) >= current().world_size else Ranks()
    batches = batches_of(ranks.blocks(positions)[ranks.rank], config.batch_size, least=1)
    began, hidden = time.perf_counter(), None if ranks.first else True
    loaded = load_batches(reader, labels, batches, trained.device)
    loaded = tqdm(loaded, "scoring", len(batches), unit="batch", disable=hidden, leave=False)
    form = trained.form(config.score)
    of_network = "upstream" if form == "upstream" else "exact"
    part = score_batches(trained.model, front, loaded, config.precision, of_network, **changes)
    parts = zip(*ranks.gather([value.numpy() for value in part]), strict=True)
    labels, scores, predicted, embeddings, profiles = map(np.concatenate, parts)
    forms = {of_network: scores}
    if trained.neighbours is not None:
        forms |= {name: trained.neighbours.scores(name, labels, embeddings, profiles) for name in FORMS}
    if missing := {" ".join(trained.classes[label]) for label in labels[np.isnan(forms[form])]}:
        raise UserError(
            f"the checkpoint has too few training clips of {', '.join(sorted(missing))}; give --score exact"
        )
    recordings = reader.recordings[positions]
    # of each recording, the window with the highest score
    highest = np.lexsort((forms[form], recordings))[np.flatnonzero(np.diff(np.sort(recordings), append=-1))]
    highest.sort()
    # NaN stays NaN
    forms = {name: maximum(values, recordings, recordings[highest]) for name, values in forms.items()}
    clips = [reader.clips[position] for position in positions[highest]]
    windows = np.bincount(recordings)[recordings[highest]]
    kept = labels[highest], forms[form], predicted[highest], embeddings[highest], windows
    return Scored(clips, *kept, time.perf_counter() - began, forms)


def known_machines(trained: Checkpoint, reader: Reader) -> tuple[list[int], str]:
    """Positions of the clips whose machine was trained on, and a line about the others ("" without any)."""
    classes = set(trained.classes)
    known = [position for position, clip in enumerate(reader.clips) if clip.machine in classes]
    others = Counter(
        printable(" ".join(clip.machine)) for clip in reader.clips if clip.machine not in classes
    )
    names = ", ".join(f"{name} ({count})" for name, count in sorted(others.items()))
    if not known:
        raise UserError(f"no test clip is of a machine that this checkpoint was trained on: {names}")
    count = others.total()
    return known, f"{count} test clips of machines never trained on are not scored: {names}" if others else ""


def evaluate(
    checkpoint_path: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    config: EvaluateConfig = EvaluateConfig(),
    device: str = "auto",
    strict: bool = False,
) -> dict[str, Any]:
    """Score the test clips of a data set and compute the metrics.

    Parameters
    ----------
    checkpoint_path : Path or str
        A run's .pt, or the authors' .pth.
    data : Path or str
        A data folder, manifest or packed store; training clips are not needed.
    out : Path or str
        Gets scores.csv, anomaly_score_TYPE_id_XX.csv (DCASE format), metrics.json and metrics.csv (see
        `metrics.evaluate_scores`), embeddings.npz and evaluation.json (the summary). The metrics of the
        benchmark's evaluation set, whose truth comes from eval_data_list.csv, go to out/evaluation_set.
    strict : bool
        Stop if any file cannot be used.

    Returns
    -------
    dict
        The content of evaluation.json, and "metrics" of the clips that `metrics.measured` chooses (None if
        the truth of no clip is known). Empty on torchrun's processes but the first.
    """
    out, where = Path(out), choose_device(device)
    running = prepare(where, config.precision)
    trained = checkpoint.load(checkpoint_path, where)
    with joined(where) as ranks:
        opened = open_data(data, trained.config.model.audio, splits=["test"], strict=strict)
        if not len(opened.test):
            raise UserError(
                f"{data}: no test clips; expected files such as TYPE/test/normal_id_00_00000000.wav"
            )
        positions, not_scored = known_machines(trained, opened.test)
        for message in filter(None, (opened.dataset.report(), not_scored)) if ranks.first else ():
            tqdm.write(message)
        scored = score_clips(trained, opened.test, config=config, positions=positions)
    if not ranks.first:
        return {}
    form, rows = trained.form(config.score), scored.rows
    columns = ["file", "machine_type", "machine_id", "subset", "anomaly", "score", "recognised_as", "windows"]
    others = [name for name in scored.forms if name != form]
    more = [scored.forms[name].tolist() for name in others]
    write_csv(
        out / "scores.csv",
        [*columns, *others],
        [
            [
                *astuple(row)[:3],
                row.subset,
                row.anomaly,
                row.score,
                " ".join(trained.classes[label]),
                row.windows,
                *values,
            ]
            for row, label, *values in zip(rows, scored.predicted, *more, strict=True)
        ],
    )
    machines = sorted({(row.machine_type, row.machine_id) for row in rows})
    for machine in machines:
        with replacing(out / f"anomaly_score_{'_id_'.join(map(safe_name, machine))}.csv") as file:
            csv.writer(file, lineterminator="\n").writerows(
                (row.file, repr(row.score)) for row in rows if (row.machine_type, row.machine_id) == machine
            )
    with replacing(out / "embeddings.npz", "wb") as file:
        np.savez(file, embeddings=scored.embeddings.astype(np.float32), labels=scored.labels)
    metrics = {}
    for subset, folder in (("development", out), ("evaluation", out / "evaluation_set")):
        own = [row for row in rows if row.subset == subset and row.anomaly is not None]
        if own:
            metrics[subset] = evaluate_scores(own, config.bootstrap)
            write_metrics(metrics[subset], folder)
    summary = {
        "checkpoint": printable(Path(checkpoint_path).name),
        "epoch": trained.epoch,
        "data": printable(opened.dataset.root.name),
        "synthetic": opened.dataset.synthetic,
        "clips": len(rows),
        "unlabelled": sum(row.anomaly is None for row in rows),
        "not_scored": not_scored,
        "problems": opened.dataset.problems,
        "score": form,
        "forms": {
            name: evaluate_scores(chosen, config.bootstrap)["average"]
            for name, values in scored.forms.items()
            if np.isfinite(values).all() and (chosen := measured(scored.rows_of(values)))
        },
        "recognition": trained.recognition,
        "identity_accuracy": scored.identity_accuracy,
        "machines": len(machines),
        "ms_per_clip": 1000 * scored.seconds / len(rows),
        "peak_memory_mb": peak_memory_mb(),
        "config": to_dict(trained.config),
        "running": running,
        "provenance": provenance(where) | {"computed_by": implementation(trained.model.arcface.weight)},
    }
    write_json(out / "evaluation.json", summary)
    main = measured(rows)
    return summary | {"metrics": metrics[main[0].subset] if main else None}
