"""Experiments in their smallest form: runs are shared, rows measure what they say, files agree."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MACHINES, contents, refused, tiny
from simulations import stars

from osscl_min import checkpoint
from osscl_min.config import PRESETS, AudioConfig, Config, EvaluateConfig, ModelConfig
from osscl_min.data.reader import open_data
from osscl_min.data.synth import write_dataset
from osscl_min.evaluate import evaluate
from osscl_min.experiments import analyses, figures, sweep, variants
from osscl_min.features import LogMel, to_wave
from osscl_min.metrics import Score, evaluate_scores, resampled
from osscl_min.model import OSSCL
from osscl_min.runtime.files import UserError, locked

SUFFIXES = ("json", "csv", "md", "tex", "png", "pdf")
QUICK = PRESETS["quick"]
AUDIO = AudioConfig(seconds=1.0)
SCORING = EvaluateConfig(batch_size=24, bootstrap=30)
SMALL = tiny({"epochs": 1}, model=ModelConfig(audio=AUDIO, inputs=("log_mel",)), evaluate=SCORING)


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory):
    """Three variants, one of which cannot run; two seeds of the first: data, out, runs, failures."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    table = {"os-scl": {}, "no mixup": {"loss.mixup": False}, "broken": {"model.frozen": ["tgram"]}}
    runs = sweep.plan(table, (0,), SMALL, data, out) + sweep.plan({"os-scl": {}}, (1,), SMALL, data, out)
    return data, out, runs, sweep.run_all(runs, data, device="cpu", jobs=2)


def test_train_takes_several_seeds(swept, osscl, monkeypatch):
    """The runs are there already: nothing is trained, and their average is shown."""
    data, out, runs, _ = swept
    monkeypatch.setitem(PRESETS, "small", SMALL)
    status, shown, _ = osscl("train", "--data", data, "--out", out, "--device", "cpu", "--seeds", "0,1")
    mean = 100 * np.mean([average["auc_id_mean"] for average in evaluations(swept, "os-scl")])
    assert status == 0 and f" {mean:.1f} ± " in shown


def test_experiments_share_equal_runs_and_no_others(swept, tmp_path):
    data = swept[0]

    def folders(table, config=QUICK, where=data):
        return [run.folder.name for run in sweep.plan(table, (0,), config, where, "out")]

    trained = [name for name in variants.ALL if len(variants.variants(name, QUICK)) > 1]
    each = [folders(variants.variants(name, QUICK)) for name in trained]
    assert all(len(set(names)) == len(names) for names in each)
    assert len(set(sum(each, []))) < len(sum(each, []))
    assert len(set.intersection(*map(set, each))) == 1  # the baseline
    places = (data, write_dataset(tmp_path / "data", replace(MACHINES, seed=9)))
    rates = [replace(QUICK, train=replace(QUICK.train, learning_rate=rate)) for rate in (1e-3, 1e-2)]
    longer = replace(QUICK, train=replace(QUICK.train, epochs=5))
    assert len({folders({"os-scl": {}}, c, where)[0] for c in (*rates, longer) for where in places}) == 6
    engine = replace(QUICK, engine=replace(QUICK.engine, log_steps=3))
    copied = shutil.copytree(data, tmp_path / "copy" / "data")
    assert folders({"os-scl": {}}) == folders({"os-scl": {}}, engine, copied)


def test_the_papers_rows_are_there():
    def rows(name):
        table = variants.variants(name, Config())
        return {row: sweep.changed(Config(), changes) for row, changes in table.items()}

    parts = {(row.model.head, row.loss.contrastive) for row in rows("components").values()}
    assert parts > {("basic", "noise"), ("basic", "none"), ("none", "noise"), ("none", "none")}
    assert parts > {("basic", "clean"), ("basic", "weighted")}
    assert {row.model.margin for row in rows("components").values()} == {0.0, 0.2, 0.4, 0.6}
    assert len({row.model.inputs for row in rows("inputs").values()}) == 4
    schemes = rows("training")
    assert schemes["two-stage"].train.pretrain_epochs == 150
    arcmix = schemes["ArcMix"].loss
    assert (arcmix.mixup, arcmix.margin_on, arcmix.contrastive) == (True, "each", "none")
    assert len({row.model.audio for row in rows("high-frequency-training").values()}) == 17


def test_a_failed_run_does_not_stop_the_others_and_finished_ones_are_reused(swept):
    data, out, runs, failed = swept
    assert [run.variant for run in failed] == ["broken"] and "model.frozen" in failed[runs[2]]
    done = [run for run in runs if run not in failed]
    assert all((run.folder / "evaluation" / "metrics.json").is_file() for run in done)
    before = [(run.folder / "best.pt").stat().st_mtime_ns for run in done]
    assert not sweep.run_all(done, data, device="cpu", jobs=2)
    assert [(run.folder / "best.pt").stat().st_mtime_ns for run in done] == before
    with refused("nothing to compare with: no"):
        sweep.finished(runs, dict.fromkeys(runs, "no"))
    with locked(out / "runs", "running experiments"), refused("another process"):
        sweep.run_all(runs, data, device="cpu")


@pytest.mark.parametrize("change", [lambda c: c["config"]["train"].update(epochs=2), lambda c: c.clear()])
def test_a_folder_that_holds_something_else_is_refused(swept, tmp_path, change):
    data, _, runs, _ = swept
    folder = shutil.copytree(runs[0].folder, tmp_path / "runs" / runs[0].folder.name)
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))
    before = contents(folder)
    (message,) = sweep.run_all([replace(runs[0], folder=folder)], data, device="cpu").values()
    assert "holds another run" in message and "\n" not in message
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("components", {"only": ("rubbish",)}, "no variant rubbish; it has os-scl, head: leaky"),
        ("components", {"cutoffs": (9000.0,)}, "--cutoffs lie between 0 and 8000 Hz"),
        ("components", {"cutoffs": ()}, "--cutoffs needs at least one frequency"),
        ("components", {"checkpoint": "best.pt"}, "trains its own detectors"),
        ("training", {}, r"pretrain_epochs: 1 must be below train.epochs \(1\)"),
    ],
)
def test_what_cannot_run_is_refused_and_makes_nothing(swept, tmp_path, name, options, message):
    with refused(message):
        variants.run(name, swept[0], tmp_path / "out", SMALL, **{"seeds": (0,), **options})
    assert not (tmp_path / "out").exists()


def test_all_runs_every_experiment_and_survives_failures(swept, tmp_path, osscl, monkeypatch):
    done = []

    def run(name, *_, **__):
        done.append(name)
        if name == "bands":
            raise UserError("no bands today")
        (tmp_path / f"{name.replace('-', '_')}.md").write_text(f"table of {name}\n")
        return {"failed": {}}

    monkeypatch.setattr(variants, "run", run)
    status, out, err = osscl("ablate", "all", "--data", swept[0], "--out", tmp_path)
    assert status == 1 and "failed: bands: no bands today" in err and "table of inputs" in out
    assert tuple(done) == variants.ALL and set(variants.ALL) > set(variants.ANALYSES)
    assert (tmp_path / "timing.csv").read_text().startswith("step,seconds\nscores,0\n")


@pytest.fixture(scope="module")
def results(swept):
    """The result of every experiment, in the sweep's folder; two seeds where a test needs them."""
    data, out, _, _ = swept
    seeds = {"high-frequency": (0, 1), "scores": (0, 1)}
    only = {"components": ("no mixup",)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyses, "BANDS", 2)
        patch.setattr(analyses, "SNRS", (20.0, -10.0))
        yield {
            name: variants.run(
                name, data, out, SMALL, seeds=seeds.get(name, (0,)), only=only.get(name, ("os-scl",)),
                cutoffs=(2000.0,), device="cpu",
            )
            for name in ("components", "scores", *analyses.ANALYSES)
        }  # fmt: skip


@pytest.fixture(scope="module")
def detector(swept):
    data, _, runs, _ = swept
    return analyses.Detector(checkpoint.load(runs[0].folder / "best.pt"), open_data(data, AUDIO), SCORING)


def evaluations(swept, variant):
    folders = [run.folder for run in swept[2] if run.variant == variant]
    return [json.loads((folder / "evaluation" / "metrics.json").read_text())["average"] for folder in folders]


def test_files_agree_and_name_the_data(swept, results):
    for name, result in results.items():
        stem = swept[1] / name.replace("-", "_")
        files = {suffix: stem.with_suffix(f".{suffix}").read_bytes() for suffix in SUFFIXES}
        assert json.loads(files["json"]) == result
        lines = list(csv.DictReader(files["csv"].decode().splitlines()))
        for line, row in zip(lines[::7], result["conditions"], strict=True):  # average, then six types
            assert float(line["auc_id_mean"]) == row["metrics"]["average"]["auc_id_mean"]
            if row.get("difference"):
                assert float(line["difference_mean"]) == row["difference"]["mean"]
        for suffix in ("md", "tex"):
            text = files[suffix].decode()
            assert "Synthetic: simulated machines" in text and "trained at commit" in text


def test_remade_files_are_the_same(swept, results, tmp_path):
    for name in ("components.json", "components_scores.csv"):
        shutil.copy(swept[1] / name, tmp_path)
    assert variants.remake(tmp_path) == ["components"]
    for name in ("components.json", "components.md", "components.csv", "components_scores.csv"):
        assert (tmp_path / name).read_bytes() == (swept[1] / name).read_bytes()
    assert (tmp_path / "components.png").is_file()
    with refused("no kept scores"):
        variants.remake(tmp_path / "nothing")


def test_rows_of_plain_clips_are_the_evaluation(swept, results):
    for name, place, variant in (
        ("high-frequency", 0, "os-scl"), ("scores", 0, "os-scl"), ("components", 1, "no mixup"),
    ):  # fmt: skip
        row = results[name]["conditions"][place]
        expected = [average["auc_id_mean"] for average in evaluations(swept, variant)]
        assert row["variant"] == variant and row["seeds"] == list(range(len(expected)))
        assert row["each"]["auc_id_mean"] == pytest.approx(expected)
        assert row["metrics"]["average"]["auc_id_mean"] == pytest.approx(np.mean(expected))
    values = results["components"]["conditions"][0]["values"]
    network = checkpoint.load(swept[2][0].folder / "best.pt").model
    count = sum(weight.numel() for weight in network.parameters())
    assert values["trained parameters (M)"] == [count / 1e6] and len(values) == 4


def test_conditions_are_all_there_and_matter(results):
    fills = {row["replaced_by"] for row in results["bands"]["conditions"]}
    assert fills == {"nothing", "silence", "training mean"}
    for name, count in (("high-frequency", 3), ("bands", 1 + 2 * 2), ("noise", 1 + 3 * 2)):
        first, *rest = results[name]["conditions"]
        assert len(rest) == count - 1 and any(row["each"] != first["each"] for row in rest)
        assert all("difference" in row for row in rest)


def test_failed_runs_are_named(swept, results, tmp_path):
    paths = {"os-scl": [swept[2][0].folder / "best.pt"]}
    variants.examine("components", paths, swept[0], tmp_path, Config().evaluate, device="cpu",
                     failed={"broken, seed 0": "why"})  # fmt: skip
    assert "Failed: broken, seed 0: why" in (tmp_path / "components.md").read_text()


def test_development_and_evaluation_sets_are_never_pooled(detector, monkeypatch):
    reader = detector.data.test
    clips = [
        replace(clip, subset="evaluation") if clip.machine_type == "fan" else clip for clip in reader.clips
    ]
    monkeypatch.setattr(reader, "clips", clips)
    development = [position for position, clip in enumerate(clips) if clip.machine_type != "fan"]
    assert 0 < len(development) < len(clips)
    assert detector.score().clips == [clips[position] for position in development]
    unlabelled = [clip if clip.machine_type == "fan" else replace(clip, anomaly=None) for clip in clips]
    monkeypatch.setattr(reader, "clips", unlabelled)
    assert {row.subset for row in detector.score().rows} == {"evaluation"}


def test_every_score_has_a_row_and_seeds_are_averaged(swept, results):
    rows = {row["score"]: row for row in results["scores"]["conditions"]}
    assert list(rows) == ["exact", "nearest", "profile", "gaussian", "exact, seeds averaged",
                          "nearest, seeds averaged"]  # fmt: skip
    runs = [run.folder for run in swept[2] if run.variant == "os-scl"]
    each = [json.loads((run / "evaluation" / "evaluation.json").read_text())["forms"] for run in runs]
    for name in ("exact", "nearest", "profile", "gaussian"):
        assert rows[name]["each"]["auc_id_mean"] == pytest.approx([f[name]["auc_id_mean"] for f in each])
    scores = [sweep.scores_of_forms(run)["nearest"] for run in runs]
    mean = [replace(a, score=(a.score + b.score) / 2) for a, b in zip(*scores, strict=True)]
    expected = evaluate_scores(mean)["average"]["auc_id_mean"]
    together = rows["nearest, seeds averaged"]
    assert together["each"]["auc_id_mean"] == pytest.approx([expected]) and "difference" not in together


def test_a_band_takes_the_level_of_the_machines_training_clips(detector, monkeypatch):
    fills = []
    monkeypatch.setattr(analyses, "replace_band", lambda rows, level: fills.append(level))
    list(analyses.occluded(detector))
    reader, trained = detector.data.train, detector.trained
    assert set(trained.neighbours.labels) == set(range(len(trained.classes)))
    label = trained.neighbours.labels[0]
    kept = trained.neighbours.recordings[trained.neighbours.labels == label]
    log_mel = LogMel(trained.config.model.audio)(to_wave(reader.read(kept)))
    torch.testing.assert_close(fills[-1][label], log_mel.mean((0, 1, 3)))


def test_embeddings_of_known_clusters(detector):
    plain = detector.score()
    anomaly = np.array([clip.anomaly for clip in plain.clips])
    apart = replace(plain, embeddings=np.eye(128, dtype=np.float32)[2 * plain.labels + anomaly])
    assert list(analyses.separation(apart).values()) == pytest.approx([1, 1])
    mixed = replace(plain, embeddings=np.random.default_rng(0).standard_normal((len(anomaly), 128)))
    assert abs(analyses.separation(mixed)["silhouette of machines"]) < 0.1


def test_a_given_checkpoint_is_examined_and_nothing_is_trained(swept, tmp_path):
    data, _, runs, _ = swept
    best = runs[0].folder / "best.pt"
    result = variants.run(
        "high-frequency", data, tmp_path, SMALL, checkpoint=best, cutoffs=(3000.0,), device="cpu"
    )
    assert not (tmp_path / "runs").exists()
    assert [row["variant"] for row in result["conditions"]] == ["given"] * 3
    plain = evaluate(best, data, tmp_path / "plain", config=SCORING, device="cpu")["metrics"]
    assert result["conditions"][0]["metrics"] == plain


def test_first_filters_respond_as_they_are_written(tmp_path):
    """A difference of neighbouring samples has the response |2 sin(pi f / rate)|, largest at the end."""
    config = Config(model=ModelConfig(classes=2))
    for name in ("initial", "best"):
        model = OSSCL(config.model)
        with torch.no_grad():
            model.tfgram.conv[0].weight[:] = 0
            model.tfgram.conv[0].weight[::2, 0, 4:6] = torch.tensor([0.5, -0.5])  # half of the filters
        content = {"ema": model.state_dict(), "epoch": 0}
        checkpoint.save(tmp_path / f"{name}.pt", content, config, (("fan", "00"), ("fan", "02")), False)
    figure = figures.first_filters(tmp_path, False)
    assert [ax.get_title() for ax in figure.axes] == ["Tgram", "TFgram"]
    before, after = figure.axes[1].lines
    hertz = np.linspace(0, 8000, 513)
    np.testing.assert_allclose(before.get_xdata(), hertz / 1000)
    for line in (before, after):
        expected = 20 * np.log10(np.sqrt(0.5) * np.sin(np.pi * hertz[1:] / 16000))
        np.testing.assert_allclose(line.get_ydata()[1:], expected, atol=1e-4)


def test_a_figure_shows_its_rows(results):
    result = results["noise"]
    figure = figures.curves(result)
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    rows = [row for row in result["conditions"] if row["noise"] == "pink"]
    assert list(drawn["pink"].get_xdata()) == [-10, 20]
    expected = [100 * row["metrics"]["average"]["auc_id_mean"] for row in rows]
    assert list(drawn["pink"].get_ydata()[::-1]) == pytest.approx(expected)
    assert "(synthetic data)" in figure.get_suptitle()
    dots = figures.differences(results["components"]).axes[0]
    assert [label.get_text() for label in dots.get_yticklabels()] == ["os-scl", "no mixup"]
    shown = [list(line.get_xdata()) for line in dots.lines[::2]]  # the others are their means
    for values, row in zip(shown, results["components"]["conditions"], strict=True):
        assert values == pytest.approx([100 * area for area in row["each"]["auc_id_mean"]])


def scores(shift, seed, count=60):
    random = np.random.default_rng(seed)
    return [
        Score(f"{kind}_{k}", "fan", machine, float(random.standard_normal() + shift * kind), kind)
        for machine in ("00", "02")
        for kind in (0, 1)
        for k in range(count)
    ]


def systems(shift, seeds):
    return [resampled(scores(shift, seed), 200) for seed in seeds]


def test_a_difference_is_clear_only_beyond_both_noises():
    base = systems(0.5, range(4))
    better = sweep.difference(systems(2.5, range(4, 8)), base)
    assert better["clear"] and better["interval"][0] > 0.1
    assert better["mean"] == pytest.approx(np.mean(better["seeds"]))
    assert not sweep.difference(systems(0.5, range(4, 8)), base)["clear"]
    same = sweep.difference(base, base)
    assert same["interval"] == [0, 0] and not same["clear"]
    split = sweep.difference([*systems(2.5, (4, 5)), *systems(0.1, (6, 7))], base)
    assert not split["clear"] and np.std(split["seeds"]) > 0.1
    one = sweep.difference(systems(5.0, (4,)), systems(0.0, (0,)))
    assert one["interval"] is None and not one["clear"] and one["mean"] > 0.3
    assert sweep.difference_text(one).endswith("(one seed: not comparable)")


def test_a_row_is_compared_with_the_first_or_with_its_like():
    """The first variant's rows with its first one, another variant's with the first variant's like it."""
    shifts = {("a", "none"): 1.0, ("a", "white"): 0.2, ("b", "none"): 1.5, ("b", "white"): 0.9}
    conditions = [
        sweep.Condition({"variant": variant, "noise": noise}, {seed: scores(shift, seed) for seed in (0, 1)})
        for (variant, noise), shift in shifts.items()
    ]
    rows = sweep.summarise(conditions, {}, 20)["conditions"]
    area = [np.mean(row["each"]["auc_id_mean"]) for row in rows]
    assert "difference" not in rows[0]
    for row, like in ((1, 0), (2, 0), (3, 1)):
        assert rows[row]["difference"]["mean"] == pytest.approx(area[row] - area[like])


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_identical_variants_get_few_stars(seeds):
    """At most 7 % of comparisons and what 100 simulations leave open; results/statistics.md has 2,000."""
    for seed_sd, count in ((0.015, 16), (0.053, 16), (0.015, 400), (0.053, 400)):
        share = stars(seeds, seed_sd, count, times=100, draws=20)
        assert share <= 7 + 100 * 2 * np.sqrt(0.05 * 0.95 / 100)
