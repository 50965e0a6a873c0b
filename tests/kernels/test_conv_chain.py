"""The chain of convolutions on a CPU against plain modules in float64, where each fast path stands in."""

import pytest
import torch
from osscl_kernels import ChainLayer, clipwise, conv_chain, conv_chain_cpu, native
from torch.nn import functional as F

# outputs, kernel, layer: every kind of convolution of the encoder
LAYERS = (
    (16, (3, 3), ChainLayer(2, 1)),
    (16, (3, 3), ChainLayer(1, 1, 16)),
    (80, (1, 1), ChainLayer()),
    (80, (3, 3), ChainLayer(2, 1, 80)),
    (16, (1, 1), ChainLayer(prelu=False)),
    (32, (1, 1), ChainLayer()),
    (32, (3, 3), ChainLayer(1, 1, 32)),
    (16, (1, 1), ChainLayer(prelu=False, shortcut=3)),
    (32, (1, 1), ChainLayer()),
    (32, (4, 3), ChainLayer(1, 0, 32, prelu=False)),
    (5, (1, 1), ChainLayer(prelu=False)),
)
SIZE = (13, 10)  # odd and even, so that strides end differently


def parameters(dtype=torch.float64):
    torch.manual_seed(3)
    weights, gammas, betas, slopes, inputs = [], [], [], [], 3
    for outputs, kernel, layer in LAYERS:
        weights.append(torch.randn(outputs, inputs // layer.groups, *kernel, dtype=dtype) / kernel[0])
        gammas.append(torch.randn(outputs, dtype=dtype))
        betas.append(torch.randn(outputs, dtype=dtype))
        if layer.prelu:
            slopes.append(torch.linspace(-0.5, 1.5, outputs, dtype=dtype))
        inputs = outputs
    gammas[2][0] = 0.0
    lists = [weights, gammas, betas, slopes]
    return [[p.requires_grad_() for p in part] for part in lists]


def plain(x, weights, gammas, betas, slopes):
    slopes, outputs, means, variances = iter(slopes), [], [], []
    for weight, gamma, beta, (_, _, layer) in zip(weights, gammas, betas, LAYERS, strict=True):
        y = F.conv2d(x, weight, None, layer.stride, layer.padding, 1, layer.groups)
        variance, mean = torch.var_mean(y.detach(), (0, 2, 3), correction=0)
        x = F.batch_norm(y, None, None, gamma, beta, training=True)
        if layer.prelu:
            x = F.prelu(x, next(slopes))
        if layer.shortcut:
            x = x + outputs[-layer.shortcut]
        outputs.append(x)
        means.append(mean)
        variances.append(variance)
    return x, means, variances


def results(function, x, lists, gradient):
    x = x.clone().requires_grad_()
    output, means, variances = function(x, *lists)
    leaves = [x, *(p for part in lists for p in part)]
    return [output, *means, *variances, *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]


def ours(x, *lists):
    return conv_chain(x, [layer for _, _, layer in LAYERS], *lists)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("clips", [2, 5])
@pytest.mark.parametrize("values", [1, 600, 10**6])
def test_everything_is_that_of_plain_layers(clips, values, threads, monkeypatch):
    monkeypatch.setattr(conv_chain_cpu, "GROUP_VALUES", values)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, lists = torch.randn(clips, 3, *SIZE, dtype=torch.float64), parameters()
        gradient = torch.randn(clips, 5, 1, 1, dtype=torch.float64)
        # With two clips the last gradients nearly cancel: an absolute tolerance beside the relative one.
        for a, b in zip(results(ours, x, lists, gradient), results(plain, x, lists, gradient), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("precision", "floor"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("compiled", [True, False])
def test_errors_are_those_of_plain_layers(precision, floor, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C++ compiler")
    exact, errors = parameters(), []
    lists = [[p.detach().float().requires_grad_() for p in part] for part in exact]
    for _ in range(12):  # a few draws are so ill-conditioned that one rounding decides their error
        x, gradient = torch.randn(16, 3, *SIZE), torch.randn(16, 5, 1, 1)
        truth = [t.detach() for t in results(plain, x.double(), exact, gradient)]
        scale = [t.norm().clamp(min=1.0) for t in truth]  # some gradients are 0
        for function in (ours, plain):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                found = results(function, x, lists, gradient)
            assert function is plain or found[0].dtype == torch.float32
            error = [
                (a.detach().double() - t).norm() / s for a, t, s in zip(found, truth, scale, strict=True)
            ]
            errors.append(torch.stack(error))
    ours_error, plain_error = (torch.stack(errors[i::2]).median(0).values for i in (0, 1))
    assert (ours_error <= 2 * plain_error + floor).all(), (ours_error, plain_error)


def test_compiled_functions_are_bit_for_bit_repeatable_and_round_to_nearest():
    if native.library() is None:
        pytest.skip("no C++ compiler")
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan"), float("inf"), -0.0, 3e-39, 1.7, -5.0] * 2)
    norm = clipwise.Normalisation(
        *torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None].expand(4, 16), 0.0, torch.float32, 1.0
    )
    assert torch.equal(norm(x.view(1, 16, 1, 1)).flatten().nan_to_num(9.0), x.nan_to_num(9.0))
    y = x.bfloat16().view(1, 16, 1, 1)
    norm = clipwise.Normalisation(
        *torch.tensor([0.0, 1.0, 1.00390625, 0.0])[:, None].expand(4, 16), 0.0, torch.bfloat16, 1.0
    )
    expected = (y.float() * 1.00390625).bfloat16()
    normal = expected.abs() > 1e-37  # denormal numbers may become 0
    assert torch.equal(norm(y)[normal], expected[normal]) and norm(y).isnan().sum() == 2


def test_a_second_backward_is_refused():
    x, lists = torch.randn(2, 3, *SIZE), parameters(torch.float32)
    output = ours(x, *lists)[0].sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize(
    ("clips", "inputs", "outputs", "length"),
    [(1, 64, 64, 700), (3, 32, 96, 31), (2, 512, 128, 511), (2, 64, 32, 1)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weight_gradients_on_tiles_and_as_products(taps, dilation, clips, inputs, outputs, length, dtype):
    a, dy = (
        torch.randn(clips, channels, 1, length).to(dtype).contiguous(memory_format=torch.channels_last)
        for channels in (inputs, outputs)
    )
    found = clipwise.weight_gradient(a, dy, taps, dilation)
    x, weight = a.double(), torch.zeros(outputs, inputs, 1, taps, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight, padding=(0, taps // 2 * dilation), dilation=(1, dilation))
    expected = torch.autograd.grad(y, weight, dy.double())[0][:, :, 0]
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    if dtype == torch.bfloat16 and native.library() and native.has("weight_gradient", dtype):
        bound = 1e-6  # sums in float32, never rounded to bfloat16
    assert (found - expected).norm() <= bound * expected.norm()
    assert found.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (13, 10), (64, 157)])
def test_depthwise_convolutions_at_every_edge(size, stride):
    if native.library() is None:
        pytest.skip("no C++ compiler")
    layer, weight = ChainLayer(stride, 1, 48), torch.randn(48, 1, 3, 3)
    a = torch.randn(2, 48, *size).contiguous(memory_format=torch.channels_last)
    convolution = conv_chain_cpu._Convolution(layer, weight, a.shape[2:], torch.float32)
    y = convolution(a)
    x, exact = a.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.conv2d(x, exact, None, stride, 1, 1, 48)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    convolution.backward(torch.ones(48, dtype=torch.float64))
    to_x, to_weight = torch.autograd.grad(expected, (x, exact), dy.double())
    torch.testing.assert_close(convolution.input_gradient(dy).double(), to_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(convolution.weight_gradient(dy, a).double(), to_weight, rtol=1e-5, atol=1e-4)
