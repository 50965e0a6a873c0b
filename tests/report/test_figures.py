"""Figures: they show the numbers of the run's files, name synthetic data, and are written whole."""

import re
import shutil

import numpy as np
import pytest
from conftest import refused
from matplotlib import pyplot
from matplotlib.colors import to_hex
from PIL import Image

from osscl_min.data.clips import Clip
from osscl_min.data.reader import open_data
from osscl_min.features import LogMel, to_wave
from osscl_min.report import figures
from osscl_min.runtime.files import UserError, read_json
from osscl_min.runtime.plotting import BLUE, VERMILLION
from osscl_min.train import read_log

EVERY = ["overview", "maps", "training", "scores", "machines", "roc", "embeddings", "high_frequency"]


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


@pytest.mark.slow
def test_figures_are_pictures_and_nothing_stays_open(tiny_run, reported):
    drawn = figures.draw(tiny_run, tiny_run / "data")
    assert list(drawn) == EVERY
    for name, figure in drawn.items():
        assert "synthetic" in figure.get_suptitle(), name
    for name in EVERY:
        path = reported / "figures" / f"{name}.png"
        assert path.with_suffix(".pdf").is_file()
        with Image.open(path) as image:
            assert image.width > 700 and image.height > 300
            assert len(image.convert("RGB").resize((200, 200)).getcolors(40000)) > 50  # something is drawn
    assert not pyplot.get_fignums()


def test_draw_leaves_out_what_has_no_files_or_no_truth(copy, tiny_run, monkeypatch):
    def no_pair(clips):
        raise UserError("no machine has both")

    scores = copy / "evaluation" / "scores.csv"
    scores.write_text(re.sub(",development,[01],", ",development,,", scores.read_text()))
    (copy / "evaluation" / "metrics.json").unlink()
    monkeypatch.setattr(figures, "normal_and_anomalous", no_pair)
    assert list(figures.draw(copy, tiny_run / "data")) == ["maps", "training", "embeddings", "high_frequency"]
    for folder in ("evaluation", "untrained", "high_frequency"):
        shutil.rmtree(copy / folder)
    assert list(figures.draw(copy)) == ["training"]


def test_machines_have_their_auc_and_interval(tiny_run):
    (ax,) = figures.machine_intervals(tiny_run / "evaluation").axes
    entries = read_json(tiny_run / "evaluation" / "metrics.json")["ids"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [f"{e['type']} {e['id']}" for e in entries]
    drawn = [line.get_xdata() for line in ax.lines if line.get_label() != "chance"]
    for entry, bounds, point in zip(entries, drawn[::2], drawn[1::2], strict=True):
        assert [*bounds, *point] == pytest.approx(100 * np.array([*entry["interval"]["auc"], entry["auc"]]))


def test_input_maps_show_the_log_mel_in_true_units(tiny_run, trained):
    audio = trained.config.model.audio
    data = open_data(tiny_run / "data", audio, splits=["test"])
    pair = figures.normal_and_anomalous(data.test.clips, "pump")
    figure = figures.input_maps(trained, data.test, pair, False)
    assert "synthetic" not in figure.get_suptitle()
    panels = [ax for ax in figure.axes if ax.get_title()]
    titles = [f"log-mel: pump id 00, {kind}" for kind in ("normal", "anomalous")]
    assert [ax.get_title() for ax in panels[:2]] == titles
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000) * 9e3
    loudest = LogMel(audio)(to_wave(tone[None].astype(np.int16)))[0, 0].mean(-1).argmax()
    for ax, expected in zip(panels, LogMel(audio)(to_wave(data.test.read(pair)))[:, 0].numpy(), strict=False):
        np.testing.assert_allclose(ax.images[0].get_array(), expected, atol=1e-4)
        assert ax.get_xlim() == (0, 1)  # s
    ticks = zip(
        (tick.get_text() for tick in panels[0].get_yticklabels()), panels[0].get_yticks(), strict=True
    )
    assert (
        abs(loudest + 0.5 - dict(ticks)["1000"]) <= 0.5
    )  # the tick is in the loudest band of a tone of 1 kHz


def test_a_pair_is_of_one_machine():
    fan = [Clip(None, "fan", number, "test", truth) for number, truth in (("00", 0), ("02", 1), ("02", None))]
    clips = [*fan, Clip(None, "fan", "02", "test", 0), *(Clip(None, "pump", "00", "test", k) for k in (1, 0))]
    assert figures.normal_and_anomalous(clips) == [3, 1]
    assert figures.normal_and_anomalous(clips, "pump") == [5, 4]
    with refused("normal and an anomalous"):
        figures.normal_and_anomalous(clips[:3])


def test_training_curves_are_the_log(tiny_run, trained):
    axes, log = figures.training_curves(tiny_run).axes, read_log(tiny_run)
    first = lines(axes[0])
    for name in ("total", "cross_entropy", "contrastive"):
        assert list(first[name.replace("_", "-")].get_ydata()) == [entry[name] for entry in log]
    assert set(first[f"epoch {trained.epoch}, kept"].get_xdata()) == {trained.epoch}
    assert list(axes[1].lines[0].get_ydata()) == [entry["validation_loss"] for entry in log]


def test_histograms_hold_every_clip_of_the_development_set_or_else_all(copy):
    path = copy / "evaluation" / "scores.csv"

    def clips():
        axes = figures.score_histograms(copy / "evaluation").axes
        assert " ".join(ax.get_title() for ax in axes) == "fan pump slider ToyCar ToyConveyor valve"
        drawn = [bars for ax in axes for bars in ax.containers]
        colours = [to_hex(bars[0].get_facecolor()).upper() for bars in drawn]
        assert colours == [BLUE, VERMILLION] * 6
        return [sum(bar.get_height() for bar in bars) for bars in drawn]

    assert clips() == [4] * 12
    path.write_text(path.read_text().replace("valve,00,development", "valve,00,evaluation"))
    assert clips() == [4] * 10 + [2] * 2
    path.write_text(path.read_text().replace(",development,", ",evaluation,"))
    assert clips() == [4] * 12


def test_roc_curves_enclose_the_aucs_of_the_metrics(tiny_run):
    axes = figures.roc_curves(tiny_run / "evaluation", tiny_run / "untrained").axes
    for name, label in (("evaluation", "ids pooled"), ("untrained", "untrained, pooled")):
        metrics = read_json(tiny_run / name / "metrics.json")
        for ax, entry in zip(axes, metrics["types"], strict=True):
            curve = lines(ax)[label]
            assert np.trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(entry["auc_pooled"])
            assert ax.get_title().startswith(entry["type"])


def test_embedding_map_has_a_point_per_clip_and_repeats(tiny_run):
    first, second = (figures.embedding_map(tiny_run / "evaluation") for _ in range(2))
    points = [[c.get_offsets() for c in figure.axes[0].collections] for figure in (first, second)]
    # normal and anomalous of each type, and the legend's cross
    assert [len(p) for p in points[0]] == [4, 4] * 6 + [0]
    np.testing.assert_array_equal(np.concatenate(points[0]), np.concatenate(points[1]))
    assert "48 test clips" in first.get_suptitle()


def test_high_frequency_is_the_file(tiny_run):
    content = read_json(tiny_run / "high_frequency" / "high_frequency.json")
    for measure in ("auc_id_mean", "auc_pooled"):
        average, fan = figures.curves(content, measure).axes[:2]
        assert (average.get_title(), fan.get_title()) == ("average", "fan")
        for ax, take in ((average, lambda m: m["average"]), (fan, lambda m: m["types"][0])):
            expected = [100 * take(condition["metrics"])[measure] for condition in content["conditions"]]
            drawn = lines(ax)
            assert drawn["unfiltered"].get_ydata()[0] == pytest.approx(expected[0])
            low = drawn["low-pass: what is below the cut-off stays"]
            high = drawn["high-pass: what is above the cut-off stays"]
            assert [*low.get_ydata(), *high.get_ydata()] == pytest.approx(expected[1:])
    for condition in content["conditions"]:
        for entry in (condition["metrics"]["average"], *condition["metrics"]["types"]):
            del entry["interval"]
    drawn = lines(figures.curves(content).axes[0])
    assert drawn["unfiltered"].get_ydata()[0] > 0
