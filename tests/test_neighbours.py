"""Scores against training clips: what they compute, that they rank, and that their level holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import refused

from osscl_min.checkpoint import Checkpoint
from osscl_min.config import PRESETS, Config
from osscl_min.model import OSSCL
from osscl_min.neighbours import FORMS, MOST, Neighbours, choose, profile


def clips(random, machines, each, scale=1.0):
    """Labels, embeddings and profiles of exchangeable clips, `scale` (machines,) apart from one another."""
    labels = np.repeat(np.arange(machines), each)
    spread = np.exp(0.5 * random.standard_normal((len(labels), 1)))  # tails heavier than a Gaussian's
    scale = np.broadcast_to(scale, machines)[labels, None]
    levels = scale * spread * random.standard_normal((len(labels), 6))
    return labels, random.standard_normal((len(labels), 4)), np.repeat(levels[:, None], 3, axis=1)


def kept(labels, embeddings, profiles, recordings=None):
    return Neighbours(
        labels, np.arange(len(labels)) if recordings is None else recordings, embeddings, profiles
    )


@pytest.mark.parametrize("frames", [1, 2, 51, 313])
def test_profile(frames):
    log_mel = torch.randn(3, 1, 5, frames, dtype=torch.float64)
    values = log_mel[:, 0].numpy()
    expected = np.percentile(values, 98, axis=2), values.mean(2), values.std(2)
    np.testing.assert_allclose(profile(log_mel).numpy(), np.stack(expected, axis=1), atol=1e-12)


def test_scores_are_normalised_distances_from_the_two_nearest():
    points = np.array([0.0, 1.0, 3.0, 7.0, 8.5])
    profiles = np.tile(points[:, None, None], (1, 3, 1))
    near = kept(np.zeros(5, int), np.zeros((5, 1)), profiles)
    within = np.array([(1 + 3) / 2, (1 + 2) / 2, (2 + 3) / 2, (1.5 + 4) / 2, (1.5 + 5.5) / 2])
    score = near.scores("profile", np.zeros(1, int), np.zeros((1, 1)), np.full((1, 3, 1), 20.0))
    assert score == pytest.approx(((11.5 + 13) / 2 - within.mean()) / within.std(ddof=1))


def test_clips_of_one_recording_are_not_neighbours():
    random = np.random.default_rng(0)
    labels, embeddings, profiles = clips(random, 2, 6)
    one = kept(labels, embeddings, profiles)
    twice = kept(*(np.repeat(a, 2, axis=0) for a in (labels, embeddings, profiles)), np.arange(24) // 2)
    # each clip twice: the two nearest are now both copies of the nearest one, in another recording
    apart = np.linalg.norm(profiles[:6, None, 0] - profiles[None, :6, 0], axis=2) + np.diag([np.inf] * 6)
    np.testing.assert_allclose(twice._within("levels", 0)[::2], apart.min(1))
    assert (twice._within("levels", 0)[::2] < one._within("levels", 0)).all()


def test_deviation_is_from_all_frames_of_the_machines_clips():
    random = np.random.default_rng(3)
    log_mels = 20 * random.standard_normal((6, 5, 40)) + random.standard_normal((6, 5, 1))
    near = kept(np.repeat([0, 1], 3), np.zeros((6, 1)), profile(torch.from_numpy(log_mels)[:, None]).numpy())
    frames = log_mels[3:].transpose(1, 0, 2).reshape(5, -1)
    expected = (log_mels[0] - frames.mean(1, keepdims=True)) / frames.std(1, keepdims=True)
    np.testing.assert_allclose(near.deviation(log_mels[0], label=1), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_anomaly_ranks_first_whatever_the_machines_scale(form):
    random = np.random.default_rng(1)
    scale = np.array([1.0, 100.0, 0.01])
    near = kept(*clips(random, 3, 20, scale))
    labels, embeddings, profiles = clips(random, 3, 10, scale)
    planted = np.array([4, 13, 27])
    embeddings[planted] += 6
    profiles[planted] += 12 * scale[labels[planted], None, None]
    scores = near.scores(form, labels, embeddings, profiles)
    assert set(np.argsort(scores)[-3:]) == set(planted)


@pytest.mark.parametrize(("each", "machines"), [(14, 150), (50, 40), (400, 10)])
@pytest.mark.parametrize("form", FORMS)
def test_one_threshold_for_machines_of_any_scale_holds_its_rate(each, machines, form):
    """Thresholds from the last clips of each machine, distances normalised by leaving out the others."""
    random = np.random.default_rng(each)
    scale = np.exp(random.standard_normal(machines))
    near = kept(*clips(random, machines, each - max(2, each // 10), scale))
    held_out = near.scores(form, *clips(random, machines, max(2, each // 10), scale))
    alarms = near.scores(form, *clips(random, machines, 6000 // machines, scale)) > np.quantile(
        held_out, 0.95
    )
    # the threshold's own spread and, since its clips share a machine, that of few machines
    spread = np.sqrt(0.05 * 0.95 * (1 / len(held_out) + 1 / len(alarms)))
    assert abs(alarms.mean() - 0.05) < 3.3 * spread


def test_a_machine_of_few_recordings_takes_the_others_scale():
    random = np.random.default_rng(2)
    labels, embeddings, profiles = clips(random, 3, 12)
    few = np.flatnonzero((labels < 2) | (np.arange(36) % 12 < 1))  # one clip of the last machine
    near = kept(labels[few], embeddings[few], profiles[few])
    scores = near.scores("nearest", labels, embeddings, profiles)
    assert np.isfinite(scores).all()
    assert np.isnan(near.scores("profile", np.array([7]), embeddings[:1], profiles[:1])).all()
    recordings = np.where(labels == 2, np.arange(36) // 6, 100 + np.arange(36))  # two, of six clips each
    near = kept(labels, embeddings, profiles, recordings)
    each = [near._within("levels", label) for label in range(3)]
    average = np.mean([(own.mean(), own.std(ddof=1)) for own in each], axis=0)
    assert near._moments["levels", 2] == pytest.approx(average)


def test_whole_recordings_are_kept_up_to_a_number():
    labels = np.repeat([0, 1, 2], [MOST + 300, 90, MOST + 50])
    recordings = np.concatenate([np.arange(MOST + 300) // 30, np.full(90, 1000), np.full(MOST + 50, 2000)])
    positions = choose(labels, recordings, seed=3)
    assert (np.diff(positions) > 0).all()
    counts = np.bincount(labels[positions])
    assert MOST - 30 < counts[0] <= MOST and counts[1] == 90 and counts[2] == MOST
    first = recordings[positions[labels[positions] == 0]]
    assert all((first == number).sum() in (20, 30) for number in set(first.tolist()))
    assert not np.array_equal(positions, choose(labels, recordings, seed=4))


def test_which_score_is_taken(tmp_path):
    random = np.random.default_rng(5)
    machines = (("fan", "00"), ("fan", "02"))
    small = replace(Config(), preset="small", model=replace(PRESETS["quick"].model, classes=2))
    near = kept(*clips(random, 2, 4), recordings=np.repeat(np.arange(4), 2))
    known = {"recordings": 20, "recognised": 18, "chance": 0.5, "p_value": 1e-4}
    trained = Checkpoint(tmp_path / "best.pt", OSSCL(small.model), small, machines, 3, neighbours=near)
    guessing = replace(trained, recognition=known | {"recognised": 11, "p_value": 0.4})
    assert trained.form() == replace(trained, recognition=known).form() == "nearest"
    assert guessing.form() == "profile" and "no better than guessing" in guessing.remark
    assert guessing.form("exact") == "exact"
    assert replace(trained, config=replace(small, preset="paper")).form() == "exact"
    old = replace(trained, neighbours=None)
    assert old.form() == "exact" and old.remark == ""
    with refused("best.pt: holds no training clips to compare with"):
        old.form("nearest")
