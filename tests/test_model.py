"""The network: shapes at any batch size and clip length, corners of ArcFace, the authors' state."""

import pytest
import torch
from conftest import refused

from osscl_min.checkpoint import load_upstream_state, upstream_state_shapes
from osscl_min.config import AudioConfig, ModelConfig
from osscl_min.features import LogMel
from osscl_min.model import OSSCL, ArcMarginHead
from osscl_min.runtime.files import UserError

SHORT = AudioConfig(seconds=1.0)


def built(audio=SHORT, **settings):
    torch.manual_seed(0)
    return OSSCL(ModelConfig(audio=audio, **settings)), LogMel(audio)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("inputs", [("log_mel", "tgram", "tfgram"), ("tfgram", "log_mel")])
def test_any_batch_size(inputs, clips, training):
    model, log_mel = built(inputs=inputs)
    model.train(training)
    wave = 0.1 * torch.randn(clips, SHORT.samples)
    logits, embedding = model(wave, log_mel(wave), torch.arange(clips))
    assert logits.shape == (clips, 41) and embedding.shape == (clips, 128)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(clips))
    assert logits.isfinite().all()
    logits.sum().backward()
    assert model.encoder.conv1.conv.weight.grad.isfinite().all()


def test_a_channel_axis_changes_nothing_and_neither_does_the_batch():
    model, log_mel = built()
    model.eval()
    wave = 0.1 * torch.randn(3, SHORT.samples)
    with torch.no_grad():
        together = model(wave, log_mel(wave))[0]
        torch.testing.assert_close(model(wave[:, None], log_mel(wave[:, None]))[0], together)
        apart = torch.cat([model(w[None], log_mel(w[None]))[0] for w in wave])
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("seconds", "kernel"), [(10.0, (8, 20)), (2.0, (8, 4)), (1.0, (8, 2)), (3.3, (8, 7))]
)
def test_the_last_kernel_covers_what_is_left_of_the_map(seconds, kernel):
    audio = AudioConfig(seconds=seconds)
    model, log_mel = built(audio)
    assert model.encoder.linear7.conv.kernel_size == kernel
    wave = 0.1 * torch.randn(1, audio.samples)
    with torch.no_grad():
        assert model.eval()(wave, log_mel(wave))[1].shape == (1, 128)


def test_another_clip_length_is_told():
    model, log_mel = built()
    wave = torch.randn(2, 32_000)
    with pytest.raises(
        UserError, match=r"takes clips of 1 s \(16000 samples, 32 frames\), not 32000 samples"
    ):
        model(wave, log_mel(wave))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": ()}, "name each of"),
        ({"inputs": ("tgram", "tgram")}, "name each of"),
        ({"audio": AudioConfig(mels=64)}, "TFgram gives 128 rows"),
    ],
)
def test_impossible_configurations(settings, message):
    with refused(message):
        OSSCL(ModelConfig(**settings))


def test_arcface_survives_aligned_and_opposite_features():
    head = ArcMarginHead(8, 3)
    embedding = torch.stack([head.weight[0], -head.weight[1], head.weight[2]]).detach()
    embedding = torch.nn.functional.normalize(embedding).requires_grad_()
    logits = head(embedding, torch.tensor([0, 1, 2]))
    logits.sum().backward()
    assert logits.isfinite().all() and embedding.grad.isfinite().all() and head.weight.grad.isfinite().all()
    plain = head(embedding)
    own = torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(logits[~own], plain[~own])
    assert (logits[own] < plain[own]).all()


def test_log_mel_filters_stay_exact_when_the_module_moves():
    module = LogMel(SHORT)
    before = module.filters.clone()
    assert torch.equal(module.to(torch.float16).float().filters, before)
    assert LogMel(SHORT)(torch.zeros(1, 16_000)).unique().tolist() == [-100.0]


def test_upstream_state_whole_pruned_and_wrong():
    config = ModelConfig()
    state = {name: torch.randn(shape).abs() for name, shape in upstream_state_shapes(config).items()}
    pruned = load_upstream_state(OSSCL(config), state)
    whole = {f"module.{name}": value for name, value in state.items()} | {
        "module.TFgramNet.fc1.weight": torch.zeros(3),
        "module.TFgramNet.conv_block6.conv1.weight": torch.zeros(3),
        "module.mobilefacenet.fc_out.bias": torch.zeros(3),
        "module.TFgramNet.pre_bn0.num_batches_tracked": torch.tensor(5),
    }
    loaded = load_upstream_state(OSSCL(config), whole).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in pruned.state_dict().items())
    log_mel = ModelConfig(inputs=("log_mel",))
    first = {"mobilefacenet.conv1.conv.weight": torch.zeros(64, 1, 3, 3)}
    load_upstream_state(OSSCL(log_mel), state | first)  # the authors' log-mel model carries the unused parts
    for change, message in (
        ({"arcface.weight": torch.zeros(40, 128)}, "another configuration: arcface.weight has shape"),
        ({"surprise": torch.zeros(1)}, "unknown entry surprise"),
    ):
        with refused(message):
            load_upstream_state(OSSCL(config), state | change)
    state.pop("arcface.weight")
    with refused("1 entries are missing, first arcface.weight"):
        load_upstream_state(OSSCL(config), state)
