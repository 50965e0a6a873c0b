"""The paper's questions: what each part of the method is worth, and what detection relies on.

`python -m osscl_min.experiments.variants FOLDER` makes the tables and figures of experiments again from the
scores that FOLDER keeps (NAME.json and NAME_scores.csv).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from osscl_min.config import Config
from osscl_min.experiments import sweep
from osscl_min.experiments.analyses import ANALYSES, CUTOFFS, examine, remake
from osscl_min.experiments.sweep import BASELINE, Changes
from osscl_min.runtime.files import UserError, write_csv

# `ablate all`, in an order that needs few trainings early; precision is left out: it compares processors too
ALL = ("scores", "high-frequency", "bands", "noise", "embeddings", "training", "inputs", "components",
       "high-frequency-training")  # fmt: skip


def variants(name: str, config: Config, cutoffs: Sequence[float] = CUTOFFS) -> dict[str, Changes]:
    """The variants of an experiment: name -> settings that differ from `config`; the first is the baseline.

    A `name` that is not here, such as an analysis or "seeds", has the baseline alone.
    """
    maps = ("log_mel", "tgram", "tfgram")
    plain = {"loss.mixup": False, "loss.contrastive": "none"}
    differing: dict[str, dict[str, Changes]] = {
        "components": {
            "head: leaky": {"model.head": "leaky"},
            "head: none": {"model.head": "none"},
            "no SupCon": {"loss.contrastive": "none"},
            "head: none, no SupCon": {"model.head": "none", "loss.contrastive": "none"},
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
            for cutoff in cutoffs
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
    """Run an experiment: train its variants over some seeds, compare or examine them, write the results.

    Finished runs of the same settings and data are reused; a failed run does not stop the others. `name` is
    as in `variants`; `only` leaves out variants beside the baseline; `checkpoint`, a trained detector, is
    examined instead of those of `seeds`; `cutoffs` (Hz) are those of the filters. `out` gets runs/, a folder
    per run that all experiments share, and NAME.csv, .md, .tex, .png, .pdf, .json and NAME_scores.csv, from
    which `remake` makes the others again. Returns the content of NAME.json, see `sweep.summarise`; its
    "failed" maps runs to their errors.
    """
    cutoffs = CUTOFFS if cutoffs is None else tuple(dict.fromkeys(cutoffs))
    table = variants(name, config, cutoffs)
    nyquist = config.model.audio.sample_rate / 2
    unknown = [variant for variant in only if variant not in table]
    for wrong, message in (
        (checkpoint is None and not seeds, "--seeds needs at least one number"),
        (not cutoffs, "--cutoffs needs at least one frequency"),
        (not all(0 < cutoff < nyquist for cutoff in cutoffs), f"--cutoffs lie between 0 and {nyquist:g} Hz"),
        (jobs < 1, "--jobs is at least 1"),
        (unknown, f"{name} has no variant {', '.join(unknown)}; it has {', '.join(table)}"),
        (checkpoint and name not in ANALYSES, f"{name} trains its own detectors: leave out --checkpoint"),
    ):
        if wrong:
            raise UserError(message)
    if checkpoint is not None:
        return examine(name, {"given": [Path(checkpoint)]}, data, out, config.evaluate, cutoffs, device)
    chosen = {variant: table[variant] for variant in table if variant in (BASELINE, *(only or table))}
    runs = sweep.plan(chosen, dict.fromkeys(seeds), config, data, out)
    failed = sweep.run_all(runs, data, device=device, jobs=jobs)
    checkpoints = sweep.finished(runs, failed)
    names = {f"{each.variant}, seed {each.seed}": line for each, line in failed.items()}
    score = "exact" if config.evaluate.score == "auto" else config.evaluate.score  # that of the paper
    scoring = replace(config.evaluate, precision=config.train.precision, score=score)
    return examine(name, checkpoints, data, out, scoring, cutoffs, device, names)


def run_all(data: Path | str, out: Path | str, config: Config, **settings: Any) -> Iterator[tuple[str, Any]]:
    """Run ALL one after the other; yields each name with its result or, where it failed, the UserError.

    `settings` go to `run`. OUT/timing.csv tells how long each took, unless it is there already.
    """
    timing = Path(out) / "timing.csv"
    seconds = []
    for name in ALL:
        began = time.perf_counter()
        try:
            yield name, run(name, data, out, config, **settings)
        except UserError as error:
            yield name, error
        seconds.append((name, round(time.perf_counter() - began)))
    if not timing.is_file():
        write_csv(timing, ["step", "seconds"], seconds)


if __name__ == "__main__":
    try:
        print("\n".join(remake(*sys.argv[1:])))
    except (TypeError, UserError) as error:
        sys.exit(f"osscl: {error}")
