"""Sweeps: equal runs once, what is done stays, a failed run costs only itself, differences have noise."""

import json

import numpy as np
import pytest
from conftest import tiny

from osscl_min.cli import main
from osscl_min.config import PRESETS, AudioConfig, EvaluateConfig, ModelConfig
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.experiments import sweep
from osscl_min.experiments import variants as experiments
from osscl_min.metrics import Score, average, evaluate_scores, resampled
from osscl_min.runtime.files import UserError
from osscl_min.runtime.tables import latex

TINY = tiny(
    {"epochs": 1},
    model=ModelConfig(audio=AudioConfig(seconds=1.0), inputs=("log_mel",)),
    evaluate=EvaluateConfig(batch_size=32, bootstrap=50),
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two variants, one of which cannot run, with two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    counts = SynthConfig(seconds=1.0, ids_per_type=1, train_clips=3, test_normal=2, test_anomaly=2)
    data = write_dataset(folder / "data", counts)
    table = {"os-scl": {}, "no mixup": {"loss.mixup": False}, "broken": {"model.frozen": ["tgram"]}}
    runs = sweep.plan(table, (0, 1), TINY, folder / "out")
    return data, folder / "out", runs, sweep.run_all(runs, data, device="cpu", jobs=2)


def test_train_takes_several_seeds(swept, monkeypatch, capsys):
    """The runs are there already: nothing is trained, and their average is shown."""
    data, out, runs, _ = swept
    monkeypatch.setitem(PRESETS, "small", TINY)
    arguments = ["--data", str(data), "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["osscl", "train", *arguments, "--seeds", "0,1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    averages = [json.loads((runs[k].folder / "evaluation" / "metrics.json").read_text()) for k in (0, 3)]
    mean = 100 * np.mean([one["average"]["auc_id_mean"] for one in averages])
    assert f" {mean:.1f} ± " in capsys.readouterr().out
    assert json.loads((out / "seeds.json").read_text())["variants"][0]["seeds"] == [0, 1]
    monkeypatch.setattr("sys.argv", ["osscl", "train", *arguments, "--seeds", "0,x"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "--seeds takes whole numbers" in capsys.readouterr().err


def test_settings_are_changed_by_their_path():
    config = sweep.changed(TINY, {"loss.mixup": False, "model.audio.cutoff": 500.0})
    assert not config.loss.mixup and config.model.audio.cutoff == 500
    assert sweep.changed(config, {"loss.mixup": True, "model.audio.cutoff": 4000.0}) == TINY
    with pytest.raises(UserError, match="unknown setting mixpu"):
        sweep.changed(TINY, {"loss.mixpu": False})


def test_experiments_share_their_equal_runs(tmp_path):
    folders = {
        name: {
            run.folder
            for run in sweep.plan(
                experiments.variants(name, PRESETS["quick"]), (0, 1), PRESETS["quick"], tmp_path
            )
        }
        for name in experiments.TRAINED
    }
    assert folders["components"] & folders["training"] >= {tmp_path / "runs" / "os-scl-seed0"}
    every = [folder for found in folders.values() for folder in found]
    assert len(set(every)) < len(every)
    for name in experiments.TRAINED:  # no two variants of an experiment are one
        table = experiments.variants(name, PRESETS["quick"])
        assert len({str(sweep.changed(PRESETS["quick"], changes)) for changes in table.values()}) == len(
            table
        )


def test_a_failed_run_leaves_the_others(swept):
    _, _, runs, failed = swept
    assert {run.variant for run in failed} == {"broken"} and len(failed) == 2
    assert all("model.frozen" in said for said in failed.values())
    for run in runs:
        assert (run.folder / "evaluation" / "metrics.json").is_file() == (run not in failed)


def test_what_is_done_is_not_done_again(swept):
    data, _, runs, failed = swept
    files = [run.folder / "best.pt" for run in runs if run not in failed]
    before = [file.stat().st_mtime_ns for file in files]
    assert set(sweep.run_all(runs, data, device="cpu", jobs=2)) == set(failed)
    assert [file.stat().st_mtime_ns for file in files] == before


def test_the_summary_and_its_files(swept):
    _, out, runs, failed = swept
    result = sweep.summarise("components", runs, failed, 50)
    base, other = result["variants"]
    assert result["synthetic"] and base["seeds"] == [0, 1] and "difference" not in base
    each = [json.loads((run.folder / "evaluation" / "metrics.json").read_text()) for run in runs[1::3]]
    assert other["auc_id_mean"] == pytest.approx(np.mean([one["average"]["auc_id_mean"] for one in each]))
    assert other["difference"]["mean"] == pytest.approx(other["auc_id_mean"] - base["auc_id_mean"])
    assert base["parameters"] == base["trained_parameters"] > 800_000
    sweep.write(result, out)
    for suffix in ("md", "tex"):
        text = (out / f"components.{suffix}").read_text()
        assert "Synthetic" in text and "seeds 0, 1" in text and "no mixup" in text
    assert "Failed: broken, seed 0" in (out / "components.md").read_text()
    assert json.loads((out / "components.json").read_text()) == result
    with pytest.raises(UserError, match="nothing to compare with"):
        sweep.summarise("components", runs, dict.fromkeys(runs, "no"))


def scores(shift, seed, count=60):
    random = np.random.default_rng(seed)
    return [
        Score(f"{kind}_{k}", "fan", machine, float(random.standard_normal() + shift * kind), kind)
        for machine in ("00", "02")
        for kind in (0, 1)
        for k in range(count)
    ]


def several(shift, seeds):
    return [resampled(scores(shift, seed), 200) for seed in seeds]


def test_the_draws_are_those_of_the_intervals():
    figures, draws = resampled(scores(1.0, 0), 200)
    measured = evaluate_scores(scores(1.0, 0), 200)["average"]
    low, high = np.quantile(draws["average"]["auc_id_mean"], (0.025, 0.975))
    assert figures["average"] | {"interval": measured["interval"]} == measured
    assert [low, high] == measured["interval"]["auc_id_mean"]


def test_seeds_are_averaged():
    one, other = (evaluate_scores(scores(1.0, seed), 200) for seed in (0, 1))
    both = average(several(1.0, (0, 1)))
    for ours, first, second in zip(both["ids"], one["ids"], other["ids"], strict=True):
        assert ours["auc"] == pytest.approx((first["auc"] + second["auc"]) / 2)
    low, high = both["average"]["interval"]["auc_id_mean"]
    assert low < both["average"]["auc_id_mean"] < high
    low_one, high_one = one["average"]["interval"]["auc_id_mean"]
    assert high - low < high_one - low_one  # two seeds' errors partly cancel


def test_a_difference_is_clear_only_beyond_both_noises():
    base = several(0.5, (0, 1))
    better = sweep.difference(several(2.5, (2, 3)), base)
    assert better["clear"] and better["interval"][0] > 0.1 and better["mean"] == np.mean(better["seeds"])
    assert sweep.difference(several(2.5, (2, 3)), base, "fan") == better  # the only type
    assert not sweep.difference(several(0.5, (2, 3)), base)["clear"]
    same = sweep.difference(base, base)
    assert same["interval"] == [0, 0] and not same["clear"]
    split = sweep.difference([*several(2.5, (2,)), *several(0.1, (3,))], base)
    assert not split["clear"]


def test_latex_is_escaped():
    text = latex([["a_b", "50 %"], ["x ± y", "-"]], "where from")
    assert text.startswith("% where from\n\\begin{tabular}{lr}")
    assert r"a\_b & 50 \% \\" in text and r"x $\pm$ y & - \\" in text


def test_an_unknown_variant_is_named(tmp_path):
    with pytest.raises(UserError, match="components has no variant nonsense"):
        experiments.run("components", tmp_path, tmp_path, TINY, seeds=(0,), only=("nonsense",))
