"""Tables of examined detectors, and the sentence on high frequencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from osscl_min.experiments.sweep import GAIN_COLUMNS, gain_cells, gain_text, write_tables
from osscl_min.metrics import NAMES
from osscl_min.runtime.files import write_csv

NOTE = (
    "Percent; mean ± standard deviation over the seeds. Difference of AUC id-mean to the detector's first "
    "row, on average with its 95 % bootstrap interval over the clips, the same resamples for both, and of "
    "each machine type; * where the interval leaves out 0 and every seed agrees in the sign. Without a star "
    "the order means nothing: the difference lies inside the noise. About one comparison in "
    "twenty leaves its interval by chance."
)
ROW_KEYS = {"variant", "seeds", "metrics", "each", "difference", "gain"}  # the rest of a row is its settings


def rely_on_high_frequencies(rows: Sequence[Mapping[str, Any]], middle: float = 4000.0) -> str:
    """A sentence on the two halves of the spectrum, from rows with "filter", "cutoff_hz" and "difference".

    The cut-off nearest to `middle` (Hz) is taken. What the intervals leave open is said to be open.
    """
    found = {}
    for row in rows:
        gain = row.get("difference") or {}
        if row["cutoff_hz"] is not None and (gain := gain.get("average", gain)):
            found[row["filter"], row["cutoff_hz"]] = gain
    pairs = [cutoff for kind, cutoff in found if kind == "low-pass" and ("high-pass", cutoff) in found]
    if not pairs:
        return ""
    question = "Does detection rely on high frequencies here?"
    if rows[0]["metrics"]["average"]["interval"]["auc_id_mean"][0] <= 0.5:
        return f"{question} It cannot be told: the detector is not clearly better than chance."
    cutoff = min(pairs, key=lambda hertz: abs(hertz - middle))
    parts = []
    for kind, half in (("low-pass", "above"), ("high-pass", "below")):
        gain = found[kind, cutoff]
        change = f"AUC id-mean changes by {gain_text(gain | {'clear': False})} points"
        if gain["clear"] and gain["mean"] < 0:
            verdict = "it is needed here"
        elif gain["clear"]:
            verdict = "detection is better without it"
        else:
            most = 100 * max(0, -gain["interval"][0])
            verdict = f"no need of it is shown; a loss of up to {most:.1f} is possible"
        parts.append(f"without what lies {half} {cutoff / 1000:g} kHz {change}: {verdict}")
    return f"{question} {parts[0][0].upper()}{parts[0][1:]}; {parts[1]}."


def settings_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What sets a row apart from the others of its variant."""
    return {key: value for key, value in row.items() if key not in ROW_KEYS}


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """A result's table in percent, first row the header."""
    rows = result["conditions"]
    types = [entry["type"] for entry in rows[0]["metrics"]["types"]]
    several = len({row["variant"] for row in rows}) > 1
    names = [key.removesuffix("_hz").removesuffix("_db").replace("_", " ") for key in settings_of(rows[0])]
    header = ["detector"] * several + names
    header += ["AUC id-mean", "AUC pooled", "pAUC id-mean", "mAUC", "difference", *types]
    lines = [[*header, *["gain over the first detector"] * several, "seeds"]]
    for row in rows:
        cells = [row["variant"]] * several
        for key, value in settings_of(row).items():
            unit = {"hz": " Hz", "db": " dB"}.get(key.rpartition("_")[2], "")
            cells.append("" if value is None else f"{value:.0f}{unit}" if unit else str(value))
        average, gain = row["metrics"]["average"], row.get("difference", {})
        spread = f" ± {100 * np.std(row['each'], ddof=1):.1f}" if len(row["seeds"]) > 1 else ""
        figures = [_percent(average[key]) for key in ("auc_id_mean", "auc_pooled", "pauc_id_mean", "mauc")]
        cells += [figures[0] + spread, *figures[1:], gain_text(gain.get("average"))]
        for name in types:
            one = gain.get(name)
            cells.append("" if one is None else f"{100 * one['mean']:+.1f}" + " *" * one["clear"])
        cells += [gain_text(row.get("gain", {}).get("average"))] * several
        lines.append([*cells, str(len(row["seeds"]))])
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def write(result: Mapping[str, Any], out: Path | str) -> None:
    """Write the tables of `examine`'s result; the CSV has a line for the average and each machine type.

    Of "bands", bands_energy.csv has what share of the energy lies where.
    """
    rows = result["conditions"]
    keys = list(settings_of(rows[0]))
    lines = [[*keys, "variant", "seeds", "type", *NAMES, *GAIN_COLUMNS]]
    for row in rows:
        for entry in (row["metrics"]["average"], *row["metrics"]["types"]):
            name = entry.get("type", "average")
            settings = [row[key] for key in keys]
            lines.append([*settings, row["variant"], " ".join(map(str, row["seeds"])), name,
                          *(entry[measure] for measure in NAMES),
                          *gain_cells(row.get("difference", {}).get(name))])  # fmt: skip
    write_tables(out, {"note": NOTE, **result}, table(result), lines)
    if "energy" in result:
        keys = list(result["energy"][0])
        write_csv(Path(out) / "bands_energy.csv", keys, [list(row.values()) for row in result["energy"]])
