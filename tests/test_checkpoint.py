"""One loader of checkpoints: nothing but checkpoints of this network pass, and every refusal says why."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from osscl_min import checkpoint
from osscl_min.config import AudioConfig, Config, ModelConfig
from osscl_min.model import OSSCL
from osscl_min.runtime.files import UserError

CONFIG = Config(model=ModelConfig(audio=AudioConfig(seconds=1.0), inputs=("log_mel",), classes=2))
CLASSES = (("fan", "00"), ("pump", "00"))


class Malicious:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoints") / "valid.pt"
    calibration = {"labels": torch.tensor([0, 1, 1]), "scores": torch.tensor([0.1, 0.2, 0.3]).double()}
    content = {"ema": OSSCL(CONFIG.model).state_dict(), "epoch": 3, "calibration": calibration}
    checkpoint.save(path, content, CONFIG, CLASSES, synthetic=True)
    return path


def test_a_checkpoint_comes_back(valid):
    trained = checkpoint.load(valid)
    assert (trained.config, trained.classes, trained.epoch, trained.synthetic) == (CONFIG, CLASSES, 3, True)
    assert trained.held_out()[0] == [CLASSES[0], CLASSES[1], CLASSES[1]] and not trained.model.training


def test_settings_added_later_keep_their_defaults(valid, tmp_path):
    content = checkpoint.read(valid)
    del content["config"]["train"]["keep"]
    torch.save(content, tmp_path / "older.pt")
    assert checkpoint.load(tmp_path / "older.pt").config == CONFIG


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such checkpoint"),
        (lambda path: path.mkdir(), "no such checkpoint"),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(b"PK\3\4 not a zip"), "it is no PyTorch file"),
        (lambda path: soundfile.write(path, np.zeros(99), 8000, format="WAV"), "it is no PyTorch file"),
        (lambda path: path.write_text("text"), "it is no PyTorch file"),
        (
            lambda path: torch.save({"format": 1, "bad": Malicious()}, path),
            "more than tensors and plain values",
        ),
        (lambda path: torch.save([1, 2], path), "it holds a list"),
        (lambda path: torch.save({"a": torch.zeros(1)}, path), "neither this package's entries nor those"),
        (lambda path: torch.save({3: "mobilefacenet"}, path), "neither this package's entries nor those"),
        (lambda path: torch.save({"mobilefacenet.conv1.conv.weight": 3}, path), "no attribute 'shape'"),
        (
            lambda path: torch.save({"mobilefacenet.conv1.conv.weight": torch.zeros(64, 3, 3, 3)}, path),
            "entries are missing",
        ),
    ],
)
def test_files_that_are_no_checkpoint(write, message, tmp_path, capsys):
    path = tmp_path / "some.pt"
    write(path)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value) and "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        *((name, None, f"no entry '{name}'") for name in ("config", "classes", "epoch", "ema", "synthetic")),
        ("format", 99, "format 99, this version reads 1"),
        ("config", {"modle": 1}, "unknown setting modle"),
        ("config", 3, "expected a table of settings"),
        ("config", {"model": {"scale": float("inf")}}, "model.scale: inf lies outside"),
        ("classes", [["fan", "00"]], "it names 1 machines for 2 classes"),
        ("classes", 5, "not iterable"),
        ("classes", ["fan", "pump"], "too many values"),
        ("classes", [["fan", 0], ["pump", 0]], "not named by texts"),
        ("ema", {}, "its weights do not fit its configuration"),
        ("ema", [], "Expected state_dict to be dict-like"),
        ("epoch", "three", "invalid literal"),
        ("calibration", {"labels": torch.tensor([7]), "scores": torch.zeros(1)}, "calibration scores"),
        ("calibration", {"labels": torch.tensor([1]), "scores": torch.zeros(2)}, "calibration scores"),
        ("calibration", {"labels": torch.tensor([1]), "scores": torch.tensor([torch.nan])}, "calibration"),
        ("calibration", [1], "indices must be integers"),
    ],
)
def test_wrong_entries_are_named(valid, tmp_path, entry, value, message):
    content = checkpoint.read(valid) | {entry: value}
    if value is None:
        del content[entry]
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=f"not a readable checkpoint of this package: .*{message}") as error:
        checkpoint.load(tmp_path / "wrong.pt")
    assert "\n" not in str(error.value)


def test_damage_other_weights_and_failed_runs(valid, tmp_path):
    (tmp_path / "half.pt").write_bytes(valid.read_bytes()[:-5000])
    with pytest.raises(UserError, match="only a part of one"):
        checkpoint.load(tmp_path / "half.pt")
    content = checkpoint.read(valid)
    wide = replace(CONFIG, model=replace(CONFIG.model, inputs=("log_mel", "tgram")))
    checkpoint.save(tmp_path / "wide.pt", {"ema": content["ema"], "epoch": 0}, wide, CLASSES, False)
    with pytest.raises(UserError, match="its weights do not fit its configuration"):
        checkpoint.load(tmp_path / "wide.pt")
    content["ema"]["arcface.weight"][0, 0] = torch.nan
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="its weights are not finite"):
        checkpoint.load(tmp_path / "nan.pt")
    (tmp_path / "failed.pt").write_bytes(valid.read_bytes())
    with pytest.raises(UserError, match="a run that failed, for inspection only; use best.pt"):
        checkpoint.load(tmp_path / "failed.pt")
