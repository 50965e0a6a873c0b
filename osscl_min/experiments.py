"""The paper's questions: what each part of the method is worth, and what detection relies on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from osscl_min import checkpoint, sweep
from osscl_min.config import Config, EvaluateConfig
from osscl_min.device import choose_device, prepare
from osscl_min.evaluate import known_machines, score_clips
from osscl_min.features import ZeroPhaseFilter
from osscl_min.files import UserError, provenance, write_csv, write_json
from osscl_min.metrics import NAMES, evaluate_scores
from osscl_min.reader import open_data
from osscl_min.sweep import BASELINE, Changes

TRAINED = ("components", "inputs", "training", "high-frequency-training")  # experiments that train
CUTOFFS = (500.0, 1000.0, 2000.0, 3000.0, 4000.0, 5000.0, 6000.0, 7000.0)  # Hz


def variants(name: str, config: Config) -> dict[str, Changes]:
    """The variants of an experiment that trains: name -> settings that differ; the first is the baseline.

    Parameters
    ----------
    name : str
        One of TRAINED, or "seeds": the baseline alone.
    config : Config
        What they differ from; two-stage training needs its epochs.
    """
    if name == "seeds":
        return {BASELINE: {}}
    plain = {"loss.mixup": False, "loss.contrastive": "none"}
    if name == "components":
        return {
            BASELINE: {},
            "head: leaky": {"model.head": "leaky"},
            "head: none": {"model.head": "none"},
            "no SupCon": {"loss.contrastive": "none"},
            "SupCon of clean clips": {"loss.contrastive": "clean"},
            "SupCon weighted by lambda": {"loss.contrastive": "weighted"},
            "no mixup": {"loss.mixup": False},
            "no mixup, no SupCon": plain,
            **{f"margin {margin:g}": {"model.margin": margin} for margin in (0.0, 0.2, 0.6)},
        }
    if name == "inputs":
        maps = ("log_mel", "tgram", "tfgram")
        return {
            BASELINE: {},
            "log-mel": {"model.inputs": maps[:1]},
            "log-mel, Tgram": {"model.inputs": maps[:2]},
            "log-mel, TFgram": {"model.inputs": maps[::2]},
            "all, TFgram frozen": {"model.frozen": maps[2:]},
        }
    if name == "training":
        return {
            BASELINE: {},
            "two-stage": {"train.pretrain_epochs": max(1, config.train.epochs // 2)},
            "ArcFace": plain,
            "ArcMix": {"loss.contrastive": "none", "loss.margin_on": "each"},
            "Noisy-ArcMix": {"loss.contrastive": "none"},
        }
    return {
        BASELINE: {},
        **{
            f"{kind} {cutoff / 1000:g} kHz": {"model.audio.filter": kind, "model.audio.cutoff": cutoff}
            for kind in ("low-pass", "high-pass")
            for cutoff in CUTOFFS
        },
    }


def compare(
    name: str,
    data: Path | str,
    out: Path | str,
    config: Config,
    *,
    seeds: Sequence[int],
    only: Sequence[str] = (),
    device: str = "auto",
    jobs: int = 1,
) -> dict[str, Any]:
    """Train an experiment's variants over some seeds and compare them.

    What is done already is not done again; a run that fails leaves the others be.

    Parameters
    ----------
    name : str
        As in `variants`.
    data : Path or str
    out : Path or str
        Gets runs/VARIANT-seedN (a folder a run, shared by all experiments in `out`), and NAME.json, NAME.csv,
        NAME.md and NAME.tex.
    config : Config
        What the variants differ from.
    seeds : sequence of int
    only : sequence of str
        Variants beside the baseline; all without.
    device : str
    jobs : int
        Runs at a time.

    Returns
    -------
    dict
        See `sweep.summarise`.

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
    runs = sweep.plan(table, seeds, config, out)
    failed = sweep.run_all(runs, data, device=device, jobs=jobs)
    result = sweep.summarise(name, runs, failed, config.evaluate.bootstrap or 1000)
    sweep.write(result, out)
    return result


def high_frequency(
    checkpoint_path: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    cutoffs: Sequence[float] = CUTOFFS,
    config: EvaluateConfig = EvaluateConfig(),
    device: str = "auto",
) -> dict[str, Any]:
    """AUC against cut-off: test clips are low-pass or high-pass filtered, the detector stays as trained.

    If detection did not rely on high frequencies, low-pass filtering would cost little and high-pass
    filtering much. A filter also takes clips away from what the network was trained on, so a drop bounds
    the reliance from above.

    Parameters
    ----------
    checkpoint_path : Path or str
    data : Path or str
    out : Path or str
        Gets high_frequency.json and high_frequency.csv.
    cutoffs : sequence of float
        Hz, each below half the sample rate.
    config : EvaluateConfig
    device : str

    Returns
    -------
    dict
        The content of high_frequency.json: "conditions" is a list of {"filter", "cutoff_hz", "metrics"}.
    """
    where = choose_device(device)
    prepare(where, config.precision)
    trained = checkpoint.load(checkpoint_path, where)
    audio = trained.config.model.audio
    conditions = [
        ("none", None, None),
        *(
            (kind, cutoff, ZeroPhaseFilter(kind, cutoff, audio))
            for kind in ("low-pass", "high-pass")
            for cutoff in cutoffs
        ),
    ]
    opened = open_data(data, trained.config.model.audio, splits=["test"])
    positions, _ = known_machines(trained, opened.test)
    positions = [position for position in positions if opened.test.clips[position].anomaly is not None]
    results = []
    for kind, cutoff, transform in tqdm(conditions, "filtering test clips", unit="filter", disable=None):
        scored = score_clips(
            trained,
            opened.test,
            config=config,
            positions=positions,
            transform=transform,
            description=f"{kind} {cutoff or 0:g} Hz",
        )
        results.append(
            {"filter": kind, "cutoff_hz": cutoff, "metrics": evaluate_scores(scored.rows, config.bootstrap)}
        )
    result = {
        "data": opened.dataset.root.name,
        "synthetic": opened.dataset.synthetic,
        "filter": "zero-phase Butterworth, run forwards and backwards",
        "order": ZeroPhaseFilter.order,
        "sample_rate": audio.sample_rate,
        "conditions": results,
        "provenance": provenance(where),
    }
    out = Path(out)
    write_csv(
        out / "high_frequency.csv",
        ["filter", "cutoff_hz", "type", *NAMES],
        [
            [
                item["filter"],
                item["cutoff_hz"],
                entry.get("type", "average"),
                *(entry[name] for name in NAMES),
            ]
            for item in results
            for entry in (*item["metrics"]["types"], item["metrics"]["average"])
        ],
    )
    write_json(out / "high_frequency.json", result)
    return result
