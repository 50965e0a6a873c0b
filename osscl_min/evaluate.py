"""Anomaly scores of test clips, in batches and constant memory, and the tables made from them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from osscl_min import checkpoint
from osscl_min.checkpoint import Checkpoint
from osscl_min.config import EvaluateConfig, to_dict
from osscl_min.data.batches import batches_of, load_batches
from osscl_min.data.clips import Clip
from osscl_min.data.reader import Reader, open_data
from osscl_min.features import FrontEnd
from osscl_min.losses import anomaly_score
from osscl_min.metrics import Score, evaluate_scores, write_metrics
from osscl_min.runtime.device import autocast, choose_device, prepare
from osscl_min.runtime.distributed import Ranks, current, joined
from osscl_min.runtime.files import UserError, peak_memory_mb, provenance, replacing, write_csv, write_json


@dataclass
class Scored:
    """Test clips with what the network says of them."""

    clips: list[Clip]
    labels: np.ndarray  # (n,) own class
    scores: np.ndarray  # (n,) float64
    predicted: np.ndarray  # (n,) the class recognised, margin off
    embeddings: np.ndarray  # (n, D) float32
    seconds: float

    @property
    def rows(self) -> list[Score]:
        """As `metrics.evaluate_scores` takes them."""
        return [
            Score(clip.path.name, *clip.machine, float(score), clip.anomaly, clip.subset)
            for clip, score in zip(self.clips, self.scores, strict=True)
        ]

    @property
    def identity_accuracy(self) -> float | None:
        """Share of normal clips recognised as their own machine; None without any."""
        normal = np.array([clip.anomaly == 0 for clip in self.clips], bool)
        return float((self.predicted == self.labels)[normal].mean()) if normal.any() else None


@torch.no_grad()
def score_clips(
    trained: Checkpoint,
    reader: Reader,
    *,
    config: EvaluateConfig = EvaluateConfig(),
    positions: Sequence[int] | None = None,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    occlude: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    description: str = "scoring",
) -> Scored:
    """Score clips against their own machine; processes that work together share them, and all get the result.

    Parameters
    ----------
    trained : Checkpoint
    reader : Reader
        Its clips' machines must be among the checkpoint's classes.
    config : EvaluateConfig
        Clips at once, which bounds the memory, and the form of the score.
    positions : sequence of int, optional
        Which of the reader's clips; all without.
    transform : callable, optional
        Applied to each batch of waves (B, samples) first, such as a filter.
    occlude : callable, optional
        Applied to each batch of log-mels (B, 1, mels, frames) and labels (B,), see `signals.replace_band`.
    description : str
        For the progress bar.
    """
    labels = trained.labels_of(reader.clips)
    positions = np.arange(len(reader)) if positions is None else np.asarray(positions)
    if (labels[positions] < 0).any():
        raise UserError("a clip of a machine that was never trained on cannot be scored against itself")
    device, model = trained.device, trained.model.eval()
    front = FrontEnd(trained.config.model.audio).to(device)
    ranks = current() if len(positions) >= current().world_size else Ranks()
    own = ranks.blocks(positions)[ranks.rank]
    scores, predicted, embeddings = [], [], []
    began = time.perf_counter()
    hidden = None if ranks.first else True
    with tqdm(total=len(own), desc=description, unit="clip", disable=hidden, leave=False) as bar:
        batches = batches_of(own, config.batch_size, least=1)
        for samples, target in load_batches(reader, labels, batches, device):
            wave, log_mel = front(samples, transform)
            if occlude is not None:
                log_mel = occlude(log_mel, target)
            with autocast(device, config.precision):
                _, embedding = model(wave, log_mel)
            scores.append(anomaly_score(model.arcface(embedding, target), target, config.score).cpu())
            predicted.append(model.arcface(embedding).argmax(1).cpu())
            embeddings.append(embedding.cpu())
            bar.update(len(target))
    parts = ranks.gather([torch.cat(values).numpy() for values in (scores, predicted, embeddings)])
    return Scored(
        [reader.clips[position] for position in positions],
        labels[positions],
        *(np.concatenate(part) for part in zip(*parts, strict=True)),
        time.perf_counter() - began,
    )


def known_machines(trained: Checkpoint, reader: Reader) -> tuple[list[int], str]:
    """Positions of the clips whose machine was trained on, and a line about the others ("" without any)."""
    classes = set(trained.classes)
    known = [position for position, clip in enumerate(reader.clips) if clip.machine in classes]
    others = Counter(" ".join(clip.machine) for clip in reader.clips if clip.machine not in classes)
    if not known:
        names = ", ".join(others)
        raise UserError(f"no test clip is of a machine that this checkpoint was trained on ({names})")
    if not others:
        return known, ""
    names = ", ".join(f"{name} ({count})" for name, count in sorted(others.items()))
    count = sum(others.values())
    return known, f"{count} test clips are of machines never trained on and not scored: {names}"


def evaluate(
    checkpoint_path: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    config: EvaluateConfig = EvaluateConfig(),
    device: str = "auto",
    strict: bool = False,
) -> dict[str, Any]:
    """Score the test clips of a data set and measure them.

    Parameters
    ----------
    checkpoint_path : Path or str
        A run's .pt, or the authors' .pth.
    data : Path or str
        A data folder.
    out : Path or str
        Gets scores.csv (every clip), anomaly_score_TYPE_id_XX.csv (DCASE format), metrics.json and
        metrics.csv (see `metrics.evaluate_scores`), embeddings.npz and evaluation.json (what was run). Clips
        whose truth comes from eval_data_list.csv, the benchmark's evaluation set, are measured apart, in
        out/evaluation_set.
    config : EvaluateConfig
    device : str
    strict : bool
        Stop if any file cannot be used.

    Returns
    -------
    dict
        The content of evaluation.json, with "metrics" of the development set (of the evaluation set, where
        only that has a known truth; None where no clip has). Empty on torchrun's processes but the first.
    """
    out, where = Path(out), choose_device(device)
    running = prepare(where, config.precision)
    trained = checkpoint.load(checkpoint_path, where)
    with joined(where) as ranks:
        opened = open_data(data, trained.config.model.audio, splits=["test"], strict=strict)
        if not len(opened.test):
            raise UserError(
                f"{data}: no test clips; expected TYPE/test/normal_id_00_00000000.wav and the like"
            )
        positions, left_out = known_machines(trained, opened.test)
        for message in filter(None, (opened.report(), left_out)) if ranks.first else ():
            tqdm.write(message)
        scored = score_clips(trained, opened.test, config=config, positions=positions)
    if not ranks.first:
        return {}
    rows = scored.rows
    write_csv(
        out / "scores.csv",
        ["file", "machine_type", "machine_id", "subset", "anomaly", "score", "recognised_as"],
        [
            [row.file, *clip.machine, clip.subset, row.anomaly, row.score, " ".join(trained.classes[label])]
            for row, clip, label in zip(rows, scored.clips, scored.predicted, strict=True)
        ],
    )
    machines = sorted({clip.machine for clip in scored.clips})
    for machine in machines:
        own = [row for row in rows if (row.machine_type, row.machine_id) == machine]
        with replacing(out / f"anomaly_score_{'_id_'.join(machine)}.csv") as file:
            file.writelines(f"{row.file},{row.score!r}\n" for row in own)
    with replacing(out / "embeddings.npz", "wb") as file:
        np.savez(file, embeddings=scored.embeddings.astype(np.float32), labels=scored.labels)
    measured = {}
    for subset, folder in (("development", out), ("evaluation", out / "evaluation_set")):
        chosen = [row for row, clip in zip(rows, scored.clips, strict=True) if clip.subset == subset]
        if any(row.anomaly is not None for row in chosen):
            measured[subset] = evaluate_scores(chosen, config.bootstrap)
            write_metrics(measured[subset], folder)
    summary = {
        "checkpoint": Path(checkpoint_path).name,
        "epoch": trained.epoch,
        "data": opened.dataset.root.name,
        "synthetic": opened.dataset.synthetic,
        "clips": len(rows),
        "unlabelled": sum(row.anomaly is None for row in rows),
        "not_scored": left_out,
        "problems": opened.dataset.problems,
        "identity_accuracy": scored.identity_accuracy,
        "machines": len(machines),
        "ms_per_clip": 1000 * scored.seconds / len(rows),
        "peak_memory_mb": peak_memory_mb(),
        "config": to_dict(trained.config),
        "running": running,
        "provenance": provenance(where),
    }
    write_json(out / "evaluation.json", summary)
    return summary | {"metrics": measured.get("development") or measured.get("evaluation")}
