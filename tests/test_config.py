"""Configurations: presets, unknown keys, wrong types."""

import json

import pytest

from osscl_min.config import PRESETS, AudioConfig, from_dict, to_dict, with_classes
from osscl_min.runtime.files import UserError


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    assert PRESETS[name].preset == name
    assert from_dict(json.loads(json.dumps(to_dict(PRESETS[name])))) == PRESETS[name]


def test_the_paper_preset_is_the_papers():
    train, loss, model = PRESETS["paper"].train, PRESETS["paper"].loss, PRESETS["paper"].model
    assert (train.epochs, train.batch_size) == (300, 64)
    assert (train.learning_rate, train.final_learning_rate) == (1e-4, 1e-5)
    assert (train.ema_decay, train.student_decay, train.seed) == (0.9999, 2e-6, 2024)
    assert (loss.mixup_alpha, loss.temperature, loss.base_temperature) == (0.5, 0.02, 0.07)
    assert (model.scale, model.margin, model.classes) == (30, 0.4, 41)
    assert model.inputs == ("log_mel", "tgram", "tfgram")


def test_frames():
    assert AudioConfig().frames == 313 and AudioConfig(seconds=2).frames == 63


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "config: unknown setting trian"),
        ({"train": {"epoch": 3}}, "config.train: unknown setting epoch"),
        ({"train": {"epochs": "3"}}, "config.train.epochs: expected int, got '3'"),
        ({"train": {"epochs": True}}, "config.train.epochs: expected int"),
        ({"model": {"head": "big"}}, "config.model.head: 'big' is none of basic, leaky, none"),
        ({"model": {"inputs": ["log_mel", "wave"]}}, "config.model.inputs: 'wave' is none of"),
        ({"model": {"audio": 3}}, "config.model.audio: expected a table"),
        ({"preset": "huge"}, "config.preset: 'huge' is none of"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        from_dict(values)


def test_with_classes():
    assert with_classes(PRESETS["quick"], 7).model.classes == 7
