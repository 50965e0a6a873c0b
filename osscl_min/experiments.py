"""Experiments on a trained detector. So far: does detection rely on high frequencies?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from osscl_min import checkpoint
from osscl_min.config import EvaluateConfig
from osscl_min.evaluate import known_machines, score_clips
from osscl_min.features import ZeroPhaseFilter
from osscl_min.files import provenance, write_csv, write_json
from osscl_min.metrics import NAMES, evaluate_scores
from osscl_min.reader import open_data
from osscl_min.train import choose_device, prepare

CUTOFFS = (500.0, 1000.0, 2000.0, 3000.0, 4000.0, 5000.0, 6000.0, 7000.0)  # Hz


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
