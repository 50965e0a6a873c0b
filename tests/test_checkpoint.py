"""One loader of checkpoints: nothing but checkpoints of this network pass, and every refusal says why."""

import pytest
import torch
from conftest import refused

from osscl_min import checkpoint
from osscl_min.config import AudioConfig, Config, ModelConfig
from osscl_min.model import OSSCL

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
    failed = valid.with_name("failed.pt")
    failed.write_bytes(valid.read_bytes())
    with refused("a run that failed, for inspection only; use best.pt"):
        checkpoint.load(failed)


def test_settings_added_later_keep_their_defaults(valid, tmp_path):
    content = checkpoint.read(valid)
    del content["config"]["train"]["keep"]
    torch.save(content, tmp_path / "older.pt")
    assert checkpoint.load(tmp_path / "older.pt").config == CONFIG


FIRST = "mobilefacenet.conv1.conv.weight"  # by which the authors' checkpoints are known


@pytest.mark.parametrize(
    ("added", "content", "message"),
    [
        (False, {"format": 1, "bad": Malicious()}, "more than tensors and plain values"),
        (False, [1, 2], "it holds a list"),
        (False, {"a": torch.zeros(1)}, "neither this package's entries nor those"),
        (False, {3: "mobilefacenet"}, "neither this package's entries nor those"),
        (False, {FIRST: 3}, "no attribute 'shape'"),
        (False, {FIRST: torch.zeros(64, 3, 3, 3)}, "entries are missing"),
        (True, {"format": 99}, "format 99, this version reads 1"),
        (True, {"config": {"modle": 1}}, "unknown setting modle"),
        (True, {"classes": [["fan", "00"]]}, "it names 1 machines for 2 classes"),
        (True, {"classes": [["fan", 0], ["pump", 0]]}, "not named by texts"),
        (True, {"ema": {}}, "its weights do not fit its configuration"),
        (
            True,
            {"calibration": {"labels": torch.tensor([7]), "scores": torch.zeros(1)}},
            "calibration scores",
        ),
    ],
)
def test_what_is_no_checkpoint_is_named_and_runs_no_code(valid, tmp_path, capsys, added, content, message):
    torch.save(checkpoint.read(valid) | content if added else content, tmp_path / "some.pt")
    with refused(f"some.pt: not a readable checkpoint of this package: .*{message}"):
        checkpoint.load(tmp_path / "some.pt")
    assert "ran" not in capsys.readouterr().out
