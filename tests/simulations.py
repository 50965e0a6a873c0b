"""Simulations of the statistics: `python tests/simulations.py` writes results/statistics.md.

Coverage of the 95 % intervals of `metrics`, and how often `sweep.difference` calls a difference clear.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import norm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from osscl_min.experiments.sweep import difference  # noqa: E402
from osscl_min.metrics import MAX_FPR, Resampled, Score, average, resampled  # noqa: E402
from osscl_min.runtime.files import write_text  # noqa: E402
from osscl_min.runtime.tables import markdown  # noqa: E402

TYPES = IDS = 4  # machine types, and ids of each


def truth_of(model, auc):
    """AUC, pAUC of the population, and the function that draws anomalous scores (n) beside N(0, 1)."""
    rate = np.linspace(0, MAX_FPR, 100_001)
    if model == "binormal":
        shift = np.sqrt(2) * norm.ppf(auc)
        area = np.trapezoid(norm.cdf(shift + norm.ppf(rate)), rate)
        return auc, area, lambda random, n: random.standard_normal(n) + shift
    share = 2 * auc - 1  # mixture: this share of the anomalies is far away, the rest looks normal
    area = np.trapezoid(share + (1 - share) * rate, rate)
    return auc, area, lambda random, n: random.standard_normal(n) + 20 * (random.random(n) < share)


def coverage(normal, anomalous, auc, model="binormal", times=200, draws=100, seed=0):
    """Share (%) of simulated data sets of TYPES x IDS machines whose intervals hold the truth, by metric."""
    random = np.random.default_rng(seed)
    auc, area, draw = truth_of(model, auc)
    chance = MAX_FPR**2 / 2
    partial = (1 + (area - chance) / (MAX_FPR - chance)) / 2
    held = {}
    for _ in range(times):
        scores = [
            Score("", str(kind), str(number), float(value), anomaly)
            for kind in range(TYPES)
            for number in range(IDS)
            for anomaly, values in enumerate((random.standard_normal(normal), draw(random, anomalous)))
            for value in values
        ]
        metrics = average([resampled(scores, draws)])
        for level, entries in (
            ("id", metrics["ids"]),
            ("type", metrics["types"]),
            ("", [metrics["average"]]),
        ):
            for entry in entries:
                for name, (low, high) in entry["interval"].items():
                    inside = low <= (partial if name.startswith("pauc") else auc) <= high
                    held.setdefault(f"{level} {name}".strip(), []).append(inside)
    return {name: 100 * np.mean(values) for name, values in held.items()}


def stars(seeds, seed_sd, count, times=2000, gain=0.0, draws=40, seed=0):
    """Share (%) of comparisons of two variants that are called clear; `seed_sd` and `gain` are fractions.

    Both have AUC 0.75, one `gain` more, give or take the noise of each seed; half the variance of a clip's
    score is shared by all detectors.
    """
    random = np.random.default_rng(seed)
    normal = 3 * count // 8
    truth = (np.arange(count) >= normal).astype(int)
    machine, clear = ("fan", "00"), []
    for _ in range(times):
        weights = []  # of the normal and of the anomalous clips, as `resampled` draws them
        for size in (normal, count - normal):
            drawn = random.multinomial(size - 1, np.full(size, 1 / size), draws)
            weights.append(np.concatenate([np.ones((1, size)), drawn]).astype(np.float32))
        means = np.repeat([0.75 + gain, 0.75], seeds) + seed_sd * random.standard_normal(2 * seeds)
        shift = np.sqrt(2) * norm.ppf(np.clip(means, 0.02, 0.98))[:, None] * truth
        own, shared = random.standard_normal((2 * seeds, count)), random.standard_normal(count)
        value = np.sqrt(0.5) * (shared + own) + shift
        above = (value[:, normal:, None] > value[:, None, :normal]).astype(np.float32)
        areas = ((weights[1] @ above) * weights[0]).sum(-1) / (weights[0].sum(1) * weights[1].sum(1))
        systems = [
            Resampled({(): {"auc_id_mean": area.astype(float)}}, {machine: (normal, count - normal)})
            for area in areas
        ]
        clear.append(difference(systems[:seeds], systems[seeds:])["clear"])
    return 100 * np.mean(clear)


def main():
    """Write both tables."""
    level = [["seed sd (points)", "clips", "seeds", "stars, no difference", "stars, 10 points"]]
    for seed_sd in (0.015, 0.053):
        for count in (16, 400):
            for seeds in (2, 3, 5):
                shares = [
                    stars(seeds, seed_sd, count, times, gain) for times, gain in ((2000, 0.0), (500, 0.1))
                ]
                level.append([f"{100 * seed_sd:g}", str(count), str(seeds), *(f"{s:.1f} %" for s in shares)])
                print(level[-1], flush=True)
    names = ["id auc", "id pauc"]
    names += ["type auc_pooled", "type pauc_pooled", "type auc_id_mean", "type pauc_id_mean", "type mauc"]
    names += ["auc_pooled", "auc_id_mean", "pauc_id_mean", "mauc"]
    rows = [["scores", "clips per id", "AUC", *names]]
    for normal, anomalous, times in ((6, 10, 100), (10, 10, 100), (30, 30, 50), (100, 100, 20)):
        for model, auc in [*(("binormal", auc) for auc in (0.6, 0.9, 0.97)), ("mixture", 0.9)]:
            held = coverage(normal, anomalous, auc, model, times)
            rows.append([model, f"{normal} + {anomalous}", f"{auc:g}", *(f"{held[n]:.0f}" for n in names)])
            print(rows[-1], flush=True)
    text = (
        "How often a difference between two variants gets a star (its 95 % interval leaves out 0, see "
        "`sweep.difference`): 2,000 simulated comparisons per row of variants that both have AUC 0.75 (no "
        "difference), and 500 of variants with 0.75 and 0.85 (10 points). *seed sd*: the standard deviation "
        "of AUC over training seeds; *clips*: the test clips of one machine, three eighths of them normal."
        f"\n\n{markdown(level)}\n\n"
        "How often the 95 % intervals of `metrics` hold the true value (%): 100, 100, 50 or 20 simulated "
        f"data sets per row, the fewer the more clips, of {TYPES} types with {IDS} ids each; *clips per id*: "
        "normal + anomalous. The scores are normal in both classes (binormal), or a share of the anomalies "
        f"lies far away and the rest looks normal (mixture).\n\n{markdown(rows)}\n"
    )
    write_text(ROOT / "results" / "statistics.md", text)


if __name__ == "__main__":
    main()
