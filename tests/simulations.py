"""Simulations of the statistics: `python tests/simulations.py` writes results/statistics.md.

Coverage of the 95 % intervals of `metrics`, how often `sweep.difference` calls a difference clear, and the
false-alarm rates that thresholds keep.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import norm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from osscl_min.config import TrainConfig  # noqa: E402
from osscl_min.experiments.sweep import difference  # noqa: E402
from osscl_min.inference.calibration import Calibration, recordings_needed  # noqa: E402
from osscl_min.metrics import MAX_FPR, Resampled, Score, average, resampled  # noqa: E402
from osscl_min.runtime.files import write_text  # noqa: E402
from osscl_min.runtime.tables import markdown  # noqa: E402
from osscl_min.train import held_out_roles, split_validation  # noqa: E402

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


FAN = ("fan", "00")


def fans(scores, rate):
    """Thresholds from recordings of one machine."""
    return Calibration([FAN] * len(scores), scores, rate)


def windows_of(random, recordings, windows, correlation):
    """(recordings, windows) normal scores: a random effect per recording, lognormal as losses are."""
    shared = random.standard_normal((recordings, 1)) * np.sqrt(correlation)
    return np.exp(shared + random.standard_normal((recordings, windows)) * np.sqrt(1 - correlation))


def false_alarms(lengths, windows, correlation, rate, sets=40, new=40):
    """Mean share of false alarms over calibration sets with recordings of `lengths`, and its error."""
    random, shares = np.random.default_rng(0), []
    for _ in range(sets):
        drawn = windows_of(random, len(lengths), max(lengths), correlation)
        calibration = fans([own[:n] for own, n in zip(drawn, lengths, strict=True)], rate)
        highest = windows_of(random, new, windows, correlation).max(axis=1)
        shares.append((highest > calibration.threshold(FAN, windows).value).mean())
    return np.mean(shares), np.std(shares) / np.sqrt(sets)


def split_alarms(keep, rate, seeds=20, machines=18, clips=24, epochs=8):
    """Share of false alarms among new normal clips, over seeds of the split of a training's clips, and its
    error. The score of a clip has parts of its machine, of the clip, and of the epoch's network."""
    shares, labels = [], np.repeat(np.arange(machines), clips)
    for seed in range(seeds):
        random = np.random.default_rng([seed, 5])
        level = 0.5 * random.standard_normal(machines)

        def drawn(level=level, random=random):
            own, network = random.standard_normal(len(labels)), random.standard_normal((epochs, len(labels)))
            return np.exp(level[labels] + 0.7 * own + 0.7 * network)

        config = TrainConfig(seed=seed, validation_fraction=0.1, keep=keep)
        _, held_out = split_validation(np.arange(len(labels)), labels, (), config)
        choosing, calibrating = held_out_roles(held_out, labels, (), keep)
        positions, scores = np.concatenate(held_out), drawn()
        epoch = scores[:, positions[choosing]].mean(1).argmin() if keep == "best" else -1
        own = positions[calibrating]
        calibration = Calibration([("fan", str(label)) for label in labels[own]], scores[epoch, own], rate)
        thresholds = np.array([calibration.threshold(("fan", str(label))).value for label in labels])
        shares.append((drawn()[epoch] > thresholds).mean())
    return np.mean(shares), np.std(shares) / np.sqrt(seeds)


def main():
    """Write the tables."""
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
    kept = [["thresholds from", "windows", "correlation", "false alarms", "standard error"]]
    for windows in (1, 10, 60):
        for correlation in (0.0, 0.3, 0.6):
            lengths = {"as many windows": [windows] * 39}
            if windows > 1:
                lengths["one window"] = [1] * (recordings_needed(0.05 / windows) + 5)
            for name, each in lengths.items():
                share, error = false_alarms(each, windows, correlation, 0.05, sets=400, new=100)
                kept.append([f"{len(each)} recordings of {name}", str(windows), f"{correlation:g}"])
                kept[-1] += [f"{100 * share:.1f} %", f"{100 * error:.1f} %"]
                print(kept[-1], flush=True)
    split = [
        f"{100 * share:.1f} % (standard error {100 * error:.1f} %) where the {keep} epoch is kept"
        for keep in ("best", "last")
        for share, error in [split_alarms(keep, 0.05, seeds=200)]
    ]
    text = (
        "How often a difference between two variants gets a star (its 95 % interval leaves out 0, see "
        "`sweep.difference`): 2,000 simulated comparisons per row of variants that both have AUC 0.75 (no "
        "difference), and 500 of variants with 0.75 and 0.85 (10 points). *seed sd*: the standard deviation "
        "of AUC over training seeds; *clips*: the test clips of one machine, three eighths of them normal."
        f"\n\n{markdown(level)}\n\n"
        "How often the 95 % intervals of `metrics` hold the true value (%): 100, 100, 50 or 20 simulated "
        f"data sets per row, the fewer the more clips, of {TYPES} types with {IDS} ids each; *clips per id*: "
        "normal + anomalous. The scores are normal in both classes (binormal), or a share of the anomalies "
        f"lies far away and the rest looks normal (mixture).\n\n{markdown(rows)}\n\n"
        "False alarms per recording at thresholds for 5 %: 400 calibration sets per row and 100 new normal "
        "recordings for each. *windows*: of the new recordings; *correlation*: of the windows of a recording."
        f"\n\n{markdown(kept)}\n\n"
        "False alarms among new normal clips, at thresholds for 5 % from the clips that a training holds "
        f"out (18 machines of 24 clips, 200 seeds of the split): {' and '.join(split)}.\n"
    )
    write_text(ROOT / "results" / "statistics.md", text)


if __name__ == "__main__":
    main()
