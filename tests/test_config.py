"""Configurations: presets, unknown keys, wrong types, ranges."""

import json
import math

import pytest

from osscl_min.config import PRESETS, AudioConfig, Config, TrainConfig, from_dict, to_dict, with_classes
from osscl_min.features import LogMel
from osscl_min.runtime.files import UserError


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    assert PRESETS[name].preset == name
    assert from_dict(json.loads(json.dumps(to_dict(PRESETS[name])))) == PRESETS[name]


def test_the_paper_preset_is_the_papers():
    assert Config() == PRESETS["paper"]
    train, loss, model = PRESETS["paper"].train, PRESETS["paper"].loss, PRESETS["paper"].model
    assert (train.epochs, train.batch_size, train.keep) == (300, 64, "best")
    assert (train.learning_rate, train.final_learning_rate) == (1e-4, 1e-5)
    assert (train.ema_decay, train.student_decay, train.seed) == (0.9999, 2e-6, 2024)
    assert (loss.mixup_alpha, loss.temperature, loss.base_temperature) == (0.5, 0.02, 0.07)
    assert (model.scale, model.margin, model.classes) == (30, 0.4, 41)
    assert model.inputs == ("log_mel", "tgram", "tfgram")
    assert PRESETS["small"].train.keep == PRESETS["quick"].train.keep == "last"


def test_frames():
    assert AudioConfig().frames == 313 and AudioConfig(seconds=2).frames == 63


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "config: unknown setting trian"),
        ({"train": {"epoch": 3}}, "train: unknown setting epoch"),
        ({"train": {"epochs": "3"}}, "train.epochs: expected int, got '3'"),
        ({"train": {"epochs": True}}, "train.epochs: expected int"),
        ({"model": {"head": "big"}}, "model.head: 'big' is none of basic, leaky, none"),
        ({"model": {"inputs": ["log_mel", "wave"]}}, "model.inputs: 'wave' is none of"),
        ({"model": {"inputs": 3}}, "model.inputs: expected tuple, got 3"),
        ({"model": {"audio": 3}}, "audio: expected a table"),
        ({"preset": "huge"}, "config.preset: 'huge' is none of"),
        ({"preset": []}, "config.preset: .* is none of"),
        ([], "config: expected a table"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(values)


OUTSIDE = {
    "audio": {"sample_rate": (0, 999, 2_000_000), "seconds": (0, -1, 0.5, math.inf), "n_fft": (0,),
              "hop": (0,), "mels": (0,), "f_min": (-1.0,), "f_max": (0.0, 8001.0), "cutoff": (0.0,)},
    "model": {"classes": (0,), "embedding": (1,), "scale": (0.0, math.inf), "margin": (-0.1, 4.0)},
    "loss": {"mixup_alpha": (0.0, -1.0), "temperature": (0.0,), "base_temperature": (0.0,),
             "contrastive_weight": (-1.0, math.nan), "cross_entropy_weight": (-1.0,)},
    "train": {"epochs": (0, -1), "batch_size": (0, -1, 1), "learning_rate": (0.0, -1.0, math.nan, math.inf),
              "final_learning_rate": (-1.0,), "ema_decay": (1.0, -0.1), "student_decay": (1.0, -0.1),
              "pretrain_epochs": (-1, 300), "noise": (2.0, -0.1), "validation_fraction": (0.0, 1.0, 2.0),
              "seed": (-1,), "precision": ("fp64",), "keep": ("first",)},
    "engine": {"checkpoint_seconds": (-1.0, math.nan), "log_steps": (0,)},
    "evaluate": {"batch_size": (0,), "bootstrap": (-1,)},
}  # fmt: skip


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [(s, name, value) for s, names in OUTSIDE.items() for name, values in names.items() for value in values],
)
def test_every_number_has_a_range(section, name, value):
    values = {section: {name: value}}
    with pytest.raises(UserError, match=name) as error:
        from_dict({"model": values} if section == "audio" else values)
    assert "\n" not in str(error.value)


def test_pre_training_leaves_epochs_for_classification():
    assert TrainConfig(epochs=2, pretrain_epochs=1).pretrain_epochs == 1
    with pytest.raises(UserError, match=r"train.pretrain_epochs: 2 must be below train.epochs \(2\)"):
        TrainConfig(epochs=2, pretrain_epochs=2)


def test_mel_bands_above_half_the_rate_or_without_a_bin_are_refused():
    with pytest.raises(UserError, match="f_max to at most 4000 Hz, half the sample rate"):
        AudioConfig(sample_rate=8000)
    half = AudioConfig(sample_rate=8000, f_max=4000.0)
    assert (LogMel(half).filters.amax(1) > 0).all()
    with pytest.raises(UserError, match="of 128 mel bands hold no FFT bin; set fewer mels or a larger n_fft"):
        LogMel(AudioConfig(n_fft=256))


def test_with_classes():
    assert with_classes(PRESETS["quick"], 7).model.classes == 7
