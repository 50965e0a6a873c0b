"""Configurations: presets, unknown keys, wrong types, ranges."""

import json
from dataclasses import is_dataclass
from typing import get_type_hints

import pytest
from conftest import refused

from osscl_min.config import PRESETS, AudioConfig, Config, TrainConfig, from_dict, to_dict
from osscl_min.features import LogMel


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "config: unknown setting trian"),
        ({"train": {"epoch": 3}}, "train: unknown setting epoch"),
        ({"train": {"epochs": "3"}}, "train.epochs: expected int, got '3'"),
        ({"train": {"epochs": True}}, "train.epochs: expected int"),
        ({"model": {"head": "big"}}, "model.head: 'big' is not one of basic, leaky, none"),
        ({"model": {"inputs": ["log_mel", "wave"]}}, "model.inputs: 'wave' is not one of"),
        ({"model": {"inputs": 3}}, "model.inputs: expected tuple, got 3"),
        ({"model": {"audio": 3}}, "audio: expected a table"),
        ({"preset": "huge"}, "config.preset: 'huge' is not one of"),
        ({"preset": []}, "config.preset: .* is not one of"),
        ([], "config: expected a table"),
    ],
)
def test_mistakes_are_named(values, message):
    with refused(message):
        from_dict(values)


OUTSIDE = """
    audio.sample_rate 0 -16000 999 2000000 | audio.seconds 0.0 -1.0 0.5 1e9 inf nan | audio.n_fft 0
    audio.hop 0 -1 | audio.mels 0 -1 | audio.f_min -1.0 nan | audio.f_max 0.0 8001.0 nan
    audio.cutoff 0.0 -1.0 nan
    model.classes 0 | model.embedding 1 | model.scale 0.0 inf nan | model.margin -0.1 4.0 nan
    loss.mixup_alpha 0.0 -1.0 nan | loss.temperature 0.0 -0.1 nan | loss.base_temperature 0.0 nan
    loss.contrastive_weight -1.0 nan | loss.cross_entropy_weight -1.0 nan
    train.epochs 0 -1 | train.batch_size 0 -1 1 | train.learning_rate 0.0 -1.0 nan inf
    train.final_learning_rate -1.0 nan | train.ema_decay 1.0 -0.1 nan | train.student_decay 1.0 -0.1 nan
    train.pretrain_epochs -1 300 | train.noise 2.0 -0.1 nan | train.validation_fraction -1.0 0.0 1.0 nan
    train.seed -1 | engine.checkpoint_seconds -1.0 nan | engine.log_steps 0 -1
    evaluate.batch_size 0 -1 | evaluate.bootstrap -1"""
ENTRIES = [entry.split() for entry in OUTSIDE.replace("\n", "|").split("|") if entry.strip()]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, *values in ENTRIES for value in values])
def test_every_number_has_a_range(name, value):
    section, field = name.split(".")
    values = {section: {field: int(value) if value.lstrip("-").isdigit() else float(value)}}
    with refused(f"{field}(?!.*expected)"):
        from_dict({"model": values} if section == "audio" else values)


def test_no_number_lacks_a_range():
    for section in (AudioConfig, *(type(value) for value in vars(Config()).values()), type(Config().model)):
        if is_dataclass(section):
            hints = get_type_hints(section, include_extras=True)
            assert not [name for name, hint in hints.items() if hint in (int, float)], section


def test_pre_training_leaves_epochs_for_classification():
    assert TrainConfig(epochs=2, pretrain_epochs=1).pretrain_epochs == 1
    with refused(r"train.pretrain_epochs: 2 must be below train.epochs \(2\)"):
        TrainConfig(epochs=2, pretrain_epochs=2)


def test_mel_bands_above_half_the_rate_or_without_a_bin_are_refused():
    with refused("f_max to at most 4000 Hz, half the sample rate"):
        AudioConfig(sample_rate=8000)
    half = AudioConfig(sample_rate=8000, f_max=4000.0)
    assert (LogMel(half).filters.amax(1) > 0).all()
    with refused("of 128 mel bands hold no FFT bin; set fewer mels or a larger n_fft"):
        LogMel(AudioConfig(n_fft=256))
