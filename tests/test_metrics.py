"""Metrics: real scores, hand-made corners, the bootstrap's vectorised areas against scikit-learn."""

import csv
import json

import numpy as np
import pytest
from conftest import refused
from simulations import coverage
from sklearn.metrics import roc_auc_score

from osscl_min.metrics import (
    LOWEST_PAUC,
    Score,
    average,
    evaluate_scores,
    measured,
    read_scores,
    resampled,
    table,
    unmatched,
    weighted_auc,
    write_metrics,
)


def test_real_scores_give_their_authors_figures(real_data, tmp_path):
    metrics = evaluate_scores(read_scores(real_data / "stgram_scores"))
    write_metrics(metrics, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    ids = {(entry["type"], entry["id"]): (entry["auc"], entry["pauc"]) for entry in metrics["ids"]}
    types = {entry["type"]: (entry["auc_id_mean"], entry["pauc_id_mean"]) for entry in metrics["types"]}
    average = metrics["average"]["auc_id_mean"], metrics["average"]["pauc_id_mean"]
    machine_type, compared = None, 0
    with open(real_data / "stgram_scores" / "result.csv", newline="") as file:
        for row in csv.reader(file):
            if len(row) == 1:
                machine_type = row[0]
            elif row and row[0] != "id":
                ours = {"Average": types[machine_type], "Total Average": average}.get(row[0])
                ours = ours or ids[machine_type, row[0]]
                assert np.abs(np.subtract(ours, [float(value) for value in row[1:]])).max() <= 1e-12
                compared += 1
    assert compared == 23 + 6 + 1
    assert sum(entry["normal"] + entry["anomaly"] for entry in metrics["ids"]) == 10_868


def test_development_clips_come_before_evaluation_clips():
    sets = [Score("", "fan", "00", 0.0, anomaly, subset) for anomaly, subset in (
        (1, "development"), (None, "development"), (0, "evaluation"), (None, "evaluation"))]  # fmt: skip
    assert measured(sets) == sets[:1] and measured(sets[1:]) == sets[2:3] and measured(sets[1::2]) == []


def scores(machine_type, machine_id, truth, values):
    return [
        Score(f"{n}.wav", machine_type, machine_id, float(v), t)
        for n, (t, v) in enumerate(zip(truth, values, strict=True))
    ]


def test_pooled_and_id_mean_differ():
    # each id is perfect on its own scale; pooled, the second id's normals stand above the first's anomalies
    both = scores("fan", "00", [0, 1], [0, 1]) + scores("fan", "02", [0, 1], [10, 11])
    (fan,) = evaluate_scores(both)["types"]
    assert fan["auc_id_mean"] == fan["mauc"] == 1.0
    assert fan["auc_pooled"] == 0.75


def test_one_class_gives_none_and_is_left_out_of_means():
    both = scores("fan", "00", [0, 1, 0, 1], [0, 1, 2, 3]) + scores("fan", "02", [0, 0], [5, 6])
    metrics = evaluate_scores(both, bootstrap=20)
    assert metrics["ids"][1]["auc"] is None and metrics["ids"][1]["interval"]["auc"] is None
    assert metrics["types"][0]["auc_id_mean"] == metrics["ids"][0]["auc"] == 0.75
    alone = evaluate_scores(scores("fan", "00", [0, 0], [1, 2]), bootstrap=20)
    assert alone["average"]["auc_pooled"] is None
    assert table(alone)[-1][1] == "-"


def test_no_truth_or_a_score_that_is_not_finite_is_an_error():
    with refused("no clip has a known truth"):
        evaluate_scores(scores("fan", "00", [None, None], [1, 2]))
    with refused("fan 1.wav: the score is nan"):
        evaluate_scores(scores("fan", "00", [0, 1], [1, float("nan")]))


@pytest.mark.parametrize("max_fpr", [1.0, 0.1, 0.3])
def test_weighted_areas_equal_scikit_learns(max_fpr):
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 60)
    value = np.round(random.standard_normal(60) + truth, 1)  # with ties
    weight = random.integers(0, 3, (20, 60))
    most = None if max_fpr == 1 else max_fpr
    expected = [roc_auc_score(np.repeat(truth, w), np.repeat(value, w), max_fpr=most) for w in weight]
    np.testing.assert_allclose(weighted_auc(truth, value, weight, max_fpr), expected, rtol=0, atol=1e-14)


def drawn(count, shift, seed):
    random = np.random.default_rng(seed)
    truth = np.arange(count) % 2
    return scores("fan", "00", truth, random.standard_normal(count) + shift * truth)


def test_intervals_hold_the_metric_and_shrink_with_more_clips():
    def width(count):
        (fan,) = evaluate_scores(drawn(count, 1, 0), bootstrap=300)["types"]
        for name, (low, high) in fan["interval"].items():
            assert low < fan[name] < high
        low, high = fan["interval"]["auc_pooled"]
        return high - low

    assert width(2000) < width(40) / 3


def test_a_perfect_separation_of_few_clips_leaves_doubt():
    """The percentiles of the bootstrap gave [1, 1]."""
    perfect = [drawn(16, 100, 0), drawn(16, -100, 0)]
    best, worst = (evaluate_scores(clips, bootstrap=50)["ids"][0] for clips in perfect)
    assert best["auc"] == best["pauc"] == 1 and worst["auc"] == 0 and worst["pauc"] == LOWEST_PAUC
    for entry, end in ((best, 1), (worst, 0)):
        for bounds in entry["interval"].values():
            assert bounds[1] - bounds[0] > 0.1
            assert bounds[end] == pytest.approx(1) or bounds[0] in (0, pytest.approx(LOWEST_PAUC))


@pytest.mark.parametrize("auc", [0.75, 0.97])
def test_intervals_hold_their_level_with_few_clips(auc):
    """At 6 normal and 10 anomalous clips per id; the percentiles of the bootstrap gave 91 % and 66 %."""
    held = coverage(6, 10, auc, times=40, draws=60)
    assert held["id auc"] > 92 and held["id pauc"] > 92  # 640 intervals each
    assert held["type auc_id_mean"] > 88 and held["type pauc_id_mean"] > 85  # 160, and 40 below
    assert held["auc_id_mean"] > 85 and held["pauc_id_mean"] > 80 and held["mauc"] > 85


def test_seeds_are_averaged():
    one, other = (drawn(60, 1, seed) for seed in (0, 1))
    each = [evaluate_scores(clips, 200) for clips in (one, other)]
    both = average([resampled(clips, 200) for clips in (one, other)])
    mean = np.mean([metrics["ids"][0]["auc"] for metrics in each])
    assert both["ids"][0]["auc"] == pytest.approx(mean)
    widths = [np.diff(metrics["average"]["interval"]["auc_pooled"]) for metrics in (both, *each)]
    assert widths[0] < np.mean(widths[1:])  # the errors of two seeds partly cancel


def test_reading_both_names_and_labels(tmp_path):
    (tmp_path / "anomaly_score_fan_id_01.csv").write_text("id_01_00000000.wav,0.5\nid_01_00000001.wav,0.25\n")
    (tmp_path / "my_pump_anomaly_score_id_02.csv").write_text(
        "normal_id_02_0.wav,1\nanomaly_id_02_0.wav,2\n\n"
    )
    labels = tmp_path / "labels.txt"
    labels.write_text(
        "fan\nid_01_00000000.wav,anomaly_id_01_00000097.wav,1\nid_01_00000001.wav,normal_id_01_1.wav,0\n"
    )
    rows = read_scores(tmp_path, labels)
    fan, pump = ("fan", "01"), ("my_pump", "02")
    assert {(s.machine_type, s.machine_id, s.anomaly): s.score for s in rows} == {
        (*fan, 1): 0.5, (*fan, 0): 0.25, (*pump, 0): 1, (*pump, 1): 2,
    }  # fmt: skip
    assert [s.anomaly for s in read_scores(tmp_path)][:2] == [None, None]
    subsets = {score.machine_type: score.subset for score in rows}
    assert subsets == {"fan": "evaluation", "my_pump": "development"} and measured(rows) == rows[2:]
    left_out = "2 clips of the evaluation set are left out: give it a folder of its own"
    assert unmatched(rows, labels) == left_out and unmatched(rows[:2], labels) == ""
    assert unmatched(read_scores(tmp_path)) == "2 of 4 clips have no known truth and are left out"
    labels.write_text(labels.read_text() + "id_01_00000009.wav,normal_id_01_9.wav,0\n")
    assert unmatched(rows, labels) == f"{left_out}; 1 rows of {labels} match no clip"
