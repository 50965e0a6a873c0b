"""Figures: they show the numbers of the run's files, name synthetic data, and are written whole."""

import json
import re
import shutil

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex
from PIL import Image

from osscl_min import checkpoint
from osscl_min.data.clips import Clip, scan
from osscl_min.data.reader import open_data
from osscl_min.features import LogMel, to_wave
from osscl_min.report import figures
from osscl_min.runtime.files import UserError
from osscl_min.runtime.plotting import BLUE, VERMILLION, save_all
from osscl_min.train import read_log

EVERY = ["maps", "training", "scores", "machines", "roc", "embeddings", "high_frequency"]


@pytest.fixture
def copy(tiny_run, tmp_path):
    """The run without its data and figures, to be changed."""
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("data", "figures"))


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def title(figure):
    return figure.get_suptitle()


def test_figures_are_pictures_and_nothing_stays_open(tiny_run, tmp_path):
    drawn = figures.draw(tiny_run, tiny_run / "data")
    assert list(drawn) == EVERY
    for path in save_all(drawn, tmp_path):
        assert path.with_suffix(".pdf").is_file()
        with Image.open(path) as image:
            assert image.width > 700 and image.height > 300
            assert len(image.convert("RGB").resize((200, 200)).getcolors(40000)) > 50  # something is drawn
    assert not pyplot.get_fignums()


def test_draw_leaves_out_what_has_no_files(copy):
    assert list(figures.draw(copy)) == EVERY[1:]  # no data, no input maps
    for folder in ("evaluation", "untrained", "high_frequency"):
        shutil.rmtree(copy / folder)
    assert list(figures.draw(copy)) == ["training"]


def test_without_truth_figures_that_need_it_are_left_out(copy, tiny_run, tmp_path):
    data = shutil.copytree(tiny_run / "data", tmp_path / "data")
    for path in data.glob("*/test/*.wav"):
        kind, rest = path.name.split("_", 1)  # normal, id_00_00000001.wav
        path.rename(path.with_name(f"{rest[:6]}{len(kind)}{rest[7:]}"))
    assert {clip.anomaly for clip in scan(data).split("test")} == {None}
    scores = copy / "evaluation" / "scores.csv"
    scores.write_text(re.sub(",development,[01],", ",development,,", scores.read_text()))
    (copy / "evaluation" / "metrics.json").unlink()
    assert list(figures.draw(copy, data)) == ["maps", "training", "embeddings", "high_frequency"]


def test_machines_have_their_auc_and_interval(tiny_run):
    (ax,) = figures.machine_intervals(tiny_run / "evaluation").axes
    entries = json.loads((tiny_run / "evaluation" / "metrics.json").read_text())["ids"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [f"{e['type']} {e['id']}" for e in entries]
    drawn = [list(line.get_xdata()) for line in ax.lines if line.get_label() != "chance"]
    for entry, (bounds, point) in zip(entries, zip(drawn[::2], drawn[1::2], strict=True), strict=True):
        assert bounds == pytest.approx([100 * bound for bound in entry["interval"]["auc"]])
        assert point == pytest.approx([100 * entry["auc"]])


def test_input_maps_show_the_log_mel_in_true_units(tiny_run):
    trained = checkpoint.load(tiny_run / "best.pt")
    data = open_data(tiny_run / "data", trained.config.model.audio, splits=["test"])
    pair = figures.normal_and_anomalous(data.test.clips, "pump")
    figure = figures.input_maps(trained, data.test, pair, True)
    panels = [ax for ax in figure.axes if ax.get_title()]
    titles = [f"log-mel: pump id 00, {kind}" for kind in ("normal", "anomalous")]
    assert [ax.get_title() for ax in panels[:2]] == titles
    wave = to_wave(data.test.read(pair))
    log_mel = LogMel(trained.config.model.audio)(wave)[:, 0].numpy()
    for ax, expected in zip(panels, log_mel, strict=False):
        np.testing.assert_allclose(ax.images[0].get_array(), expected, atol=1e-4)
        assert ax.get_xlim() == (0, 1)  # s
        # a tick's mel band is the one whose centre is nearest to its frequency
        hertz, place = [int(tick.get_text()) for tick in ax.get_yticklabels()], ax.get_yticks()
        tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
        loudest = LogMel(trained.config.model.audio)(to_wave((tone[None] * 9e3).astype(np.int16)))
        assert abs(loudest[0, 0].mean(-1).argmax() + 0.5 - place[hertz.index(1000)]) <= 0.5
    assert "synthetic" in title(figure)
    assert "synthetic" not in title(figures.input_maps(trained, data.test, pair, False))


def test_a_pair_is_of_one_machine():
    fan = [Clip(None, "fan", number, "test", truth) for number, truth in (("00", 0), ("02", 1), ("02", None))]
    clips = [*fan, Clip(None, "fan", "02", "test", 0), *(Clip(None, "pump", "00", "test", k) for k in (1, 0))]
    assert figures.normal_and_anomalous(clips) == [3, 1]
    assert figures.normal_and_anomalous(clips, "pump") == [5, 4]
    with pytest.raises(UserError, match="normal and an anomalous"):
        figures.normal_and_anomalous(clips[:3])


def test_training_curves_are_the_log(tiny_run):
    figure = figures.training_curves(tiny_run)
    log = read_log(tiny_run)
    first = lines(figure.axes[0])
    for label, name in (("total", "total"), ("cross-entropy", "cross_entropy"), ("SupCon", "contrastive")):
        assert list(first[label].get_ydata()) == [entry[name] for entry in log]
    kept = checkpoint.load(tiny_run / "best.pt").epoch
    assert set(first[f"epoch {kept}, kept"].get_xdata()) == {kept}
    assert list(figure.axes[1].lines[0].get_ydata()) == [entry["validation_loss"] for entry in log]
    assert "synthetic" in title(figure)


def test_histograms_hold_every_clip(tiny_run):
    figure = figures.score_histograms(tiny_run / "evaluation")
    assert " ".join(ax.get_title() for ax in figure.axes) == "fan pump slider ToyCar ToyConveyor valve"
    for ax in figure.axes:
        heights = {to_hex(container[0].get_facecolor()).upper(): sum(bar.get_height() for bar in container)
                   for container in ax.containers}  # fmt: skip
        assert heights == {BLUE: 4, VERMILLION: 4}
    assert "synthetic" in title(figure)


def test_roc_curves_enclose_the_aucs_of_the_metrics(tiny_run):
    figure = figures.roc_curves(tiny_run / "evaluation", tiny_run / "untrained")
    for name, label in (("evaluation", "ids pooled"), ("untrained", "untrained, pooled")):
        metrics = json.loads((tiny_run / name / "metrics.json").read_text())
        for ax, entry in zip(figure.axes, metrics["types"], strict=True):
            curve = lines(ax)[label]
            assert np.trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(entry["auc_pooled"])
            assert ax.get_title().startswith(entry["type"])
    plain = figures.roc_curves(tiny_run / "evaluation")
    assert not any("untrained, pooled" in lines(ax) for ax in plain.axes)


def test_the_development_set_is_drawn_where_there_is_one(copy):
    path = copy / "evaluation" / "scores.csv"

    def clips():
        axes = figures.score_histograms(copy / "evaluation").axes
        return [sum(bar.get_height() for bars in ax.containers for bar in bars) for ax in axes]

    path.write_text(path.read_text().replace("valve,00,development", "valve,00,evaluation"))
    assert clips() == [8, 8, 8, 8, 8, 4]
    path.write_text(path.read_text().replace(",development,", ",evaluation,"))
    assert clips() == [8] * 6


def test_embedding_map_has_a_point_a_clip_and_repeats(tiny_run):
    first, second = (figures.embedding_map(tiny_run / "evaluation") for _ in range(2))
    points = [collection.get_offsets() for collection in first.axes[0].collections]
    # normal and anomalous of each type, and the legend's cross
    assert [len(p) for p in points] == [4, 4] * 6 + [0]
    for one, other in zip(points, (c.get_offsets() for c in second.axes[0].collections), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "48 test clips" in title(first) and "synthetic" in title(first)


def test_high_frequency_is_the_file(tiny_run):
    path = tiny_run / "high_frequency" / "high_frequency.json"
    content = json.loads(path.read_text())
    for measure in ("auc_id_mean", "auc_pooled"):
        figure = figures.high_frequency(path, measure)
        average, fan = figure.axes[:2]
        assert (average.get_title(), fan.get_title()) == ("average", "fan")
        for ax, take in ((average, lambda m: m["average"]), (fan, lambda m: m["types"][0])):
            expected = [100 * take(condition["metrics"])[measure] for condition in content["conditions"]]
            drawn = lines(ax)
            assert drawn["unfiltered"].get_ydata()[0] == pytest.approx(expected[0])
            low = drawn["low-pass: what is below the cut-off stays"]
            high = drawn["high-pass: what is above the cut-off stays"]
            assert list(low.get_xdata()) == list(high.get_xdata()) == [1, 4]  # kHz
            assert [*low.get_ydata(), *high.get_ydata()] == pytest.approx(expected[1:])
        band = average.collections[0].get_paths()[0].vertices[:, 1]
        interval = content["conditions"][1]["metrics"]["average"]["interval"][measure]
        assert band.min() <= 100 * interval[0] + 1e-9 and band.max() >= 100 * interval[1] - 1e-9
    assert "synthetic" in title(figure)


def test_high_frequency_without_intervals(tiny_run, tmp_path):
    content = json.loads((tiny_run / "high_frequency" / "high_frequency.json").read_text())
    for condition in content["conditions"]:
        for entry in (condition["metrics"]["average"], *condition["metrics"]["types"]):
            del entry["interval"]
    path = tmp_path / "without.json"
    path.write_text(json.dumps(content))
    figure = figures.high_frequency(path)
    figure.savefig(tmp_path / "without.png")
    assert lines(figure.axes[0])["unfiltered"].get_ydata()[0] > 0
