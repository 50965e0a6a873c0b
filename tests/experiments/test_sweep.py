"""Sweeps: equal runs once and no others, a failed run costs only itself, differences carry both noises."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny
from simulations import stars

from osscl_min.cli import main
from osscl_min.config import PRESETS, AudioConfig, EvaluateConfig, ModelConfig
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.experiments import sweep, variants
from osscl_min.metrics import Score, resampled
from osscl_min.runtime.files import UserError, locked

TINY = tiny(
    {"epochs": 1},
    model=ModelConfig(audio=AudioConfig(seconds=1.0), inputs=("log_mel",)),
    evaluate=EvaluateConfig(batch_size=32, bootstrap=50),
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two variants, one of which cannot run, with two seeds: data, out, runs, failures."""
    folder = tmp_path_factory.mktemp("sweep")
    counts = SynthConfig(seconds=1.0, ids_per_type=1, train_clips=3, test_normal=2, test_anomaly=2)
    data = write_dataset(folder / "data", counts)
    table = {"os-scl": {}, "no mixup": {"loss.mixup": False}, "broken": {"model.frozen": ["tgram"]}}
    runs = sweep.plan(table, (0, 1), TINY, data, folder / "out")
    return data, folder / "out", runs, sweep.run_all(runs, data, device="cpu", jobs=2)


def command(monkeypatch, *arguments):
    """Exit status of the command line; preset small is TINY."""
    monkeypatch.setitem(PRESETS, "small", TINY)
    monkeypatch.setattr("sys.argv", ["osscl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


def test_train_takes_several_seeds(swept, monkeypatch, capsys):
    """The runs are there already: nothing is trained, and their average is shown."""
    data, out, runs, _ = swept
    options = ("train", "--data", data, "--out", out, "--device", "cpu", "--seeds")
    assert command(monkeypatch, *options, "0,1") == 0
    averages = [json.loads((runs[k].folder / "evaluation" / "metrics.json").read_text()) for k in (0, 3)]
    mean = 100 * np.mean([metrics["average"]["auc_id_mean"] for metrics in averages])
    assert f" {mean:.1f} ± " in capsys.readouterr().out
    assert json.loads((out / "seeds.json").read_text())["conditions"][0]["seeds"] == [0, 1]
    assert command(monkeypatch, *options, "0,x") == 2
    assert "--seeds takes whole numbers" in capsys.readouterr().err


def test_settings_are_changed_by_their_path():
    config = sweep.changed(TINY, {"loss.mixup": False, "model.audio.cutoff": 500.0})
    assert not config.loss.mixup and config.model.audio.cutoff == 500
    assert sweep.changed(config, {"loss.mixup": True, "model.audio.cutoff": 4000.0}) == TINY
    with pytest.raises(UserError, match="unknown setting mixpu"):
        sweep.changed(TINY, {"loss.mixpu": False})
    with pytest.raises(UserError, match="seed"):
        sweep.changed(TINY, {"train.seed": -1})


def folders(table, config, data, out="out"):
    return [run.folder.name for run in sweep.plan(table, (0,), config, data, out)]


def test_experiments_share_equal_runs_and_no_others(swept, tmp_path):
    data, quick = swept[0], PRESETS["quick"]
    tables = [variants.variants(name, quick) for name in variants.TRAINED]
    each = [folders(table, quick, data) for table in tables]
    assert [len(set(names)) for names in each] == [len(table) for table in tables]
    assert len(set(sum(each, []))) < len(sum(each, []))
    assert len(set.intersection(*map(set, each))) == 1  # the baseline
    other = write_dataset(tmp_path / "data", SynthConfig(seconds=1.0, ids_per_type=1, train_clips=3,
                                                         test_normal=2, test_anomaly=2, seed=9))  # fmt: skip
    copied = shutil.copytree(data, tmp_path / "copy" / "data")
    several = {
        folders({"os-scl": {}}, config, where)[0]
        for where in (data, other)
        for config in (quick, *(replace(quick, train=replace(quick.train, **changes)) for changes in (
            {"epochs": 5}, {"learning_rate": 0.01})))
    }  # fmt: skip
    assert len(several) == 6
    compiled = replace(quick, engine=replace(quick.engine, log_steps=3))
    assert folders({"os-scl": {}}, quick, data) == folders({"os-scl": {}}, compiled, copied)


def test_a_failed_run_does_not_stop_the_others(swept):
    _, _, runs, failed = swept
    assert {run.variant for run in failed} == {"broken"} and len(failed) == 2
    assert all("model.frozen" in line for line in failed.values())
    for run in runs:
        assert (run.folder / "evaluation" / "metrics.json").is_file() == (run not in failed)


def test_finished_runs_are_reused(swept):
    data, _, runs, failed = swept
    files = [run.folder / "best.pt" for run in runs if run not in failed]
    before = [file.stat().st_mtime_ns for file in files]
    assert set(sweep.run_all(runs, data, device="cpu", jobs=2)) == set(failed)
    assert [file.stat().st_mtime_ns for file in files] == before


@pytest.mark.parametrize("change", [lambda c: c["config"]["train"].update(epochs=2), lambda c: c.clear()])
def test_a_folder_that_holds_something_else_is_refused(swept, tmp_path, change):
    data, _, runs, _ = swept
    folder = shutil.copytree(runs[0].folder, tmp_path / "runs" / runs[0].folder.name)
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (message,) = sweep.run_all([replace(runs[0], folder=folder)], data, device="cpu").values()
    assert "holds another run" in message and "\n" not in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_two_processes_do_not_share_a_folder(swept):
    data, out, runs, _ = swept
    with locked(out / "runs", "running experiments"), pytest.raises(UserError, match="another process"):
        sweep.run_all(runs, data, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "--seeds needs at least one number"),
        ({"only": ("nonsense",)}, "components has no variant nonsense; it has os-scl, head: leaky"),
        ({"cutoffs": (0.0,)}, "--cutoffs lie between 0 and 8000 Hz"),
        ({"cutoffs": (9000.0,)}, "--cutoffs lie between 0 and 8000 Hz"),
        ({"cutoffs": ()}, "--cutoffs needs at least one frequency"),
        ({"jobs": 0}, "--jobs is at least 1"),
        ({"checkpoint": "best.pt"}, "trains its own detectors"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        variants.run("components", tmp_path, tmp_path / "out", TINY, **{"seeds": (0,), **options})
    assert not (tmp_path / "out").exists()


def test_two_stages_need_two_epochs(tmp_path):
    with pytest.raises(UserError, match="--train.epochs 2 or more"):
        variants.run("training", tmp_path, tmp_path, TINY, seeds=(0,))
    assert variants.variants("training", PRESETS["quick"])["two-stage"] == {"train.pretrain_epochs": 6}


def test_results_and_their_remake(swept, tmp_path, monkeypatch):
    data, _, runs, failed = swept
    log = runs[0].folder / "log.jsonl"
    text = log.read_text()
    log.write_text("".join(f"{json.dumps(json.loads(line) | {'peak_memory_mb': None})}\n"
                           for line in text.splitlines()))  # fmt: skip
    conditions, about = sweep.collect(sweep.finished(runs, failed))
    log.write_text(text)
    about["failed"] = {"broken, seed 0": "why"}
    result = variants.finish("components", conditions, about, tmp_path, 50)
    base, other = result["conditions"]
    assert result["synthetic"] and base["seeds"] == [0, 1] and "gain" not in base
    assert base["values"]["peak_memory_gb"][0] is None
    each = [json.loads((run.folder / "evaluation" / "metrics.json").read_text()) for run in runs[1::3]]
    assert other["each"]["auc_id_mean"] == [metrics["average"]["auc_id_mean"] for metrics in each]
    gain = np.subtract(other["each"]["auc_id_mean"], base["each"]["auc_id_mean"]).mean()
    assert other["gain"]["average"]["mean"] == pytest.approx(gain)
    for suffix in ("md", "tex"):
        text = (tmp_path / f"components.{suffix}").read_text()
        assert "Synthetic" in text and "seeds 0, 1" in text and "no mixup" in text and "Too few seeds" in text
    assert "Failed: broken, seed 0: why" in (tmp_path / "components.md").read_text()
    assert json.loads((tmp_path / "components.json").read_text()) == result
    made = {
        path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix not in (".png", ".pdf")
    }
    for name in ("md", "tex", "csv", "png"):
        (tmp_path / f"components.{name}").unlink()
    assert variants.remake(tmp_path) == ["components"]
    assert (tmp_path / "components.png").is_file()
    assert {name: (tmp_path / name).read_bytes() for name in made} == made
    with pytest.raises(UserError, match="no kept scores"):
        variants.remake(tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing to compare with"):
        sweep.finished(runs, dict.fromkeys(runs, "no"))


def test_all_runs_every_experiment_and_survives_failures(swept, tmp_path, monkeypatch, capsys):
    done = []

    def run(name, *_, **__):
        done.append(name)
        if name == "bands":
            raise UserError("no bands today")
        (tmp_path / f"{name.replace('-', '_')}.md").write_text(f"table of {name}\n")
        return {"failed": {}}

    monkeypatch.setattr(variants, "run", run)
    assert command(monkeypatch, "ablate", "all", "--data", swept[0], "--out", tmp_path) == 1
    shown = capsys.readouterr()
    assert tuple(done) == variants.ALL and set(variants.ALL) > set(variants.ANALYSES)
    assert "failed: bands: no bands today" in shown.err and "table of inputs" in shown.out
    assert (tmp_path / "timing.csv").read_text().startswith("step,seconds\nscores,0\n")


def systems(shift, seeds, count=60):
    made = []
    for seed in seeds:
        random = np.random.default_rng(seed)
        scores = [
            Score(f"{kind}_{k}", "fan", machine, float(random.standard_normal() + shift * kind), kind)
            for machine in ("00", "02")
            for kind in (0, 1)
            for k in range(count)
        ]
        made.append(resampled(scores, 200))
    return made


def test_a_difference_is_clear_only_beyond_both_noises():
    base = systems(0.5, range(4))
    better = sweep.difference(systems(2.5, range(4, 8)), base)
    assert better["clear"] and better["interval"][0] > 0.1
    assert better["mean"] == pytest.approx(np.mean(better["seeds"]))
    assert sweep.difference(systems(2.5, range(4, 8)), base, ("fan",)) == better  # the only type
    assert not sweep.difference(systems(0.5, range(4, 8)), base)["clear"]
    same = sweep.difference(base, base)
    assert same["interval"] == [0, 0] and not same["clear"]
    split = sweep.difference([*systems(2.5, (4, 5)), *systems(0.1, (6, 7))], base)
    assert not split["clear"] and split["seed_sd"] > 0.1


def test_one_seed_cannot_be_compared():
    gain = sweep.difference(systems(5.0, (4,)), systems(0.0, (0,)))
    assert gain["interval"] is None and not gain["clear"] and gain["mean"] > 0.3
    assert sweep.gain_text(gain).endswith("(one seed: not comparable)")


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_identical_variants_get_few_stars(seeds):
    """At most 7 % of comparisons and what 200 simulations leave open; results/statistics.md has 2,000."""
    for seed_sd, count in ((0.015, 16), (0.053, 16), (0.015, 200), (0.053, 200)):
        assert stars(seeds, seed_sd, count, times=200) <= 7 + 100 * 2 * np.sqrt(0.05 * 0.95 / 200)
