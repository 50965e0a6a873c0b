"""What test embeddings look like: how far machines, and normal and anomalous clips, lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from osscl_min.config import EvaluateConfig
from osscl_min.evaluate import Scored
from osscl_min.experiments.analyses import about, subjects
from osscl_min.experiments.sweep import mean_text, write_tables
from osscl_min.runtime.device import choose_device
from osscl_min.runtime.files import provenance, replacing

FIGURES = {
    "silhouette_machines": "silhouette of machines",
    "silhouette_anomalies": "silhouette of normal and anomalous",
    "neighbour_normal": "neighbour of the same machine, normal clips (%)",
    "neighbour_anomalous": "neighbour of the same machine, anomalous clips (%)",
    "neighbour_kind": "neighbour within the machine of the same kind (%)",
}
NOTE = (
    "Mean ± standard deviation over the seeds, of cosine distances between test embeddings. Silhouette, from "
    "-1 to 1: of the machines, among normal clips; of normal and anomalous clips within a machine, averaged. "
    "Neighbour: the nearest other test clip. Kind: normal or anomalous."
)


def measure(scored: Scored) -> dict[str, float | None]:
    """FIGURES of one detector's test embeddings; None where its clips do not give it."""
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
        return float(np.mean(values)) if len(values) else None

    same = labels[nearest(np.ones(len(labels), bool))] == labels
    machines = [labels == label for label in np.unique(labels) if (labels == label).sum() > 1]
    kinds = np.concatenate([anomaly[nearest(own)] == anomaly[own] for own in machines] or [np.array([])])
    return {
        "silhouette_machines": silhouette(normal, labels),
        "silhouette_anomalies": mean([silhouette(own, anomaly) for own in machines]),
        "neighbour_normal": mean(100 * same[normal]),
        "neighbour_anomalous": mean(100 * same[~normal]),
        "neighbour_kind": mean(100 * kinds),
    }


def compare(
    checkpoints: Mapping[str, Sequence[Path]],
    data: Path | str,
    out: Path | str,
    *,
    config: EvaluateConfig = EvaluateConfig(),
    device: str = "auto",
) -> dict[str, Any]:
    """Measure the test embeddings of trained detectors.

    Parameters
    ----------
    checkpoints : mapping of str to sequence of Path
        Variant -> its best.pt, one a seed.
    data : Path or str
    out : Path or str
        Gets embeddings.npz: for each variant VARIANT/embeddings (n, D) of its first seed, with labels (n,)
        and anomaly (n,), for the picture.
    config : EvaluateConfig
    device : str

    Returns
    -------
    dict
        "variants" is a list of {"variant", "seeds", "each": {figure: [value of each seed]}}.
    """
    rows: dict[str, dict[str, Any]] = {}
    points: dict[str, np.ndarray] = {}
    first = None
    for variant, subject in subjects(checkpoints, data, ("test",), config, device):
        first = first or subject
        scored = subject.score(description=f"embeddings, {variant}")
        row = rows.setdefault(
            variant, {"variant": variant, "seeds": [], "each": {key: [] for key in FIGURES}}
        )
        row["seeds"].append(subject.trained.config.train.seed)
        for key, value in measure(scored).items():
            row["each"][key].append(value)
        points.setdefault(f"{variant}/embeddings", scored.embeddings)
        points.setdefault("labels", scored.labels)
        points.setdefault("anomaly", np.array([clip.anomaly for clip in scored.clips]))
    with replacing(Path(out) / "embeddings.npz", "wb") as file:
        np.savez(file, **points)
    return {
        "experiment": "embeddings",
        **about(first, checkpoints),
        "machines": [" ".join(machine) for machine in first.trained.classes],
        "variants": list(rows.values()),
        "note": NOTE,
        "provenance": provenance(choose_device(device)),
    }


def write(result: Mapping[str, Any], out: Path | str) -> None:
    """Write the tables of `compare`'s result."""
    table = [["variant", *FIGURES.values(), "seeds"]]
    lines: list[list[Any]] = [["variant", "seed", *FIGURES]]
    for row in result["variants"]:
        cells = []
        for key in FIGURES:
            values = [value for value in row["each"][key] if value is not None]
            digits = 1 if key.startswith("neighbour") else 3
            cells.append(mean_text(values, digits) if values else "-")
        table.append([row["variant"], *cells, str(len(row["seeds"]))])
        for n, seed in enumerate(row["seeds"]):
            lines.append([row["variant"], seed, *(row["each"][key][n] for key in FIGURES)])
    write_tables(out, result, table, lines)
