"""The paper's questions: what each part of the method is worth, and what detection relies on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from osscl_min.config import Config, EvaluateConfig
from osscl_min.experiments import analyses as probes
from osscl_min.experiments import embeddings, probe_tables, sweep
from osscl_min.experiments import figures as experiment_figures
from osscl_min.experiments.sweep import BASELINE, Changes
from osscl_min.runtime.files import UserError, replacing

TRAINED = ("components", "inputs", "training", "precision", "high-frequency-training")  # compare trainings
EXAMINED = (*probes.PROBES, "embeddings")  # examine trained detectors more closely


def variants(name: str, config: Config) -> dict[str, Changes]:
    """The variants of an experiment: name -> settings that differ; the first is the baseline.

    Parameters
    ----------
    name : str
        One of TRAINED or EXAMINED, or "seeds": the baseline alone.
    config : Config
        What they differ from; two-stage training needs its epochs.
    """
    maps = ("log_mel", "tgram", "tfgram")
    plain = {"loss.mixup": False, "loss.contrastive": "none"}
    differing: dict[str, dict[str, Changes]] = {
        "components": {
            "head: leaky": {"model.head": "leaky"},
            "head: none": {"model.head": "none"},
            "no SupCon": {"loss.contrastive": "none"},
            "SupCon of clean clips": {"loss.contrastive": "clean"},
            "SupCon weighted by lambda": {"loss.contrastive": "weighted"},
            "no mixup": {"loss.mixup": False},
            "no mixup, no SupCon": plain,
            **{f"margin {margin:g}": {"model.margin": margin} for margin in (0.0, 0.2, 0.6)},
        },
        "inputs": {
            "log-mel": {"model.inputs": maps[:1]},
            "log-mel, Tgram": {"model.inputs": maps[:2]},
            "log-mel, TFgram": {"model.inputs": maps[::2]},
            "all, TFgram frozen": {"model.frozen": maps[2:]},
        },
        "training": {
            "two-stage": {"train.pretrain_epochs": max(1, config.train.epochs // 2)},
            "ArcFace": plain,
            "ArcMix": {"loss.contrastive": "none", "loss.margin_on": "each"},
            "Noisy-ArcMix": {"loss.contrastive": "none"},
        },
        "precision": {"bfloat16": {"train.precision": "bf16"}, "TF32": {"train.precision": "tf32"}},
        "high-frequency-training": {
            f"{kind} {cutoff / 1000:g} kHz": {"model.audio.filter": kind, "model.audio.cutoff": cutoff}
            for kind in ("low-pass", "high-pass")
            for cutoff in probes.CUTOFFS
        },
        "noise": {"noise in training": {"train.noise": 0.5}},
        "embeddings": {"head: none": {"model.head": "none"}},
    }
    return {BASELINE: {}, **differing.get(name, {})}


def run(
    name: str,
    data: Path | str,
    out: Path | str,
    config: Config,
    *,
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    checkpoint: Path | str | None = None,
    cutoffs: Sequence[float] | None = None,
    device: str = "auto",
    jobs: int = 1,
) -> dict[str, Any]:
    """Run an experiment: train its variants over some seeds, compare or examine them, write what was found.

    What is trained already is not trained again; a run that fails leaves the others be.

    Parameters
    ----------
    name : str
        As in `variants`.
    data : Path or str
    out : Path or str
        Gets runs/VARIANT-seedN (a folder a run, shared by all experiments in `out`), NAME.json, NAME.csv,
        NAME.md, NAME.tex and figures NAME.png and NAME.pdf, with _ for - in NAME.
    config : Config
        What the variants differ from.
    seeds : sequence of int
    only : sequence of str
        Variants beside the baseline; all without.
    checkpoint : Path or str, optional
        A trained detector to examine instead of those of `seeds`; nothing is trained then.
    cutoffs : sequence of float, optional
        Hz, of "high-frequency"; `probes.CUTOFFS` without.
    device : str
    jobs : int
        Runs at a time.

    Returns
    -------
    dict
        The content of NAME.json: see `sweep.summarise`, `probes.examine` and `embeddings.compare`.

    Raises
    ------
    UserError
        If a name is unknown or no run of the baseline is done.
    """
    table = variants(name, config)
    unknown = set(only) - set(table)
    if unknown:
        raise UserError(f"{name} has no variant {', '.join(sorted(unknown))}; it has {', '.join(table)}")
    if only:
        table = {variant: changes for variant, changes in table.items() if variant in {BASELINE, *only}}
    if checkpoint is not None:
        if name not in EXAMINED:
            raise UserError(f"{name} trains its own detectors: leave out --checkpoint")
        return examine(name, {"given": [Path(checkpoint)]}, data, out, config.evaluate, cutoffs, device)
    runs = sweep.plan(table, seeds, config, out)
    failed = sweep.run_all(runs, data, device=device, jobs=jobs)
    if name not in EXAMINED:
        result = sweep.summarise(name, runs, failed, config.evaluate.bootstrap or 1000)
        if name == "high-frequency-training":
            result["conclusion"] = probe_tables.rely_on_high_frequencies(result["variants"])
        sweep.write(result, out)
        experiment_figures.write(result, out)
        return result
    checkpoints: dict[str, list[Path]] = {}
    for one in runs:
        if one not in failed:
            checkpoints.setdefault(one.variant, []).append(one.folder / "best.pt")
    if BASELINE not in checkpoints:
        raise UserError(f"{name}: no run of {BASELINE} is done: {', '.join(set(failed.values()))}")
    scoring = replace(config.evaluate, precision=config.train.precision)
    missing = {f"{one.variant}, seed {one.seed}": said for one, said in failed.items()}
    return examine(name, checkpoints, data, out, scoring, cutoffs, device, missing)


def examine(
    name: str,
    checkpoints: Mapping[str, Sequence[Path]],
    data: Path | str,
    out: Path | str,
    config: EvaluateConfig,
    cutoffs: Sequence[float] | None = None,
    device: str = "auto",
    failed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Examine trained detectors, variant -> one best.pt a seed, and write what was found."""
    out = Path(out)
    if name == "embeddings":
        result = embeddings.compare(checkpoints, data, out, config=config, device=device)
    else:
        cutoffs = cutoffs or probes.CUTOFFS
        result = probes.examine(name, checkpoints, data, config=config, device=device, cutoffs=cutoffs)
    result["failed"] = dict(failed or {})
    if name == "high-frequency":
        result["conclusion"] = probe_tables.rely_on_high_frequencies(result["conditions"])
        with replacing(out / "high_frequency_filters.npz", "wb") as file:
            np.savez(file, **probes.responses_before_and_after(next(iter(checkpoints.values()))[0]))
    (embeddings if name == "embeddings" else probe_tables).write(result, out)
    experiment_figures.write(result, out)
    return result
