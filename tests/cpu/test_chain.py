"""The chain of convolutions on a CPU against plain modules in float64."""

import pytest
import torch
from osscl_kernels import ChainLayer, conv_chain, native
from torch.nn import functional as F

# outputs, kernel, layer: every kind of convolution of the encoder
LAYERS = (
    (32, (3, 3), ChainLayer(2, 1)),
    (32, (3, 3), ChainLayer(1, 1, 32)),
    (96, (1, 1), ChainLayer()),
    (96, (3, 3), ChainLayer(2, 1, 96)),
    (64, (1, 1), ChainLayer(prelu=False)),
    (32, (1, 1), ChainLayer()),
    (32, (3, 3), ChainLayer(1, 1, 32)),
    (64, (1, 1), ChainLayer(prelu=False, shortcut=3)),
    (32, (1, 1), ChainLayer()),
    (32, (4, 3), ChainLayer(1, 0, 32, prelu=False)),
    (32, (1, 1), ChainLayer(prelu=False)),
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


@pytest.fixture(autouse=True)
def _compiler():
    if native.library() is None:
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize(("precision", "floor"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("clips", [16, 37])
def test_errors_are_those_of_plain_layers(clips, precision, floor):
    exact, errors = parameters(), []
    lists = [[p.detach().float().requires_grad_() for p in part] for part in exact]
    for _ in range(12):  # a few draws are so ill-conditioned that one rounding decides their error
        x, gradient = torch.randn(clips, 3, *SIZE), torch.randn(clips, 32, 1, 1)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(dtype):
    x, lists, before = torch.randn(5, 3, *SIZE).to(dtype), parameters(torch.float32), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(ours, x, lists, torch.ones(5, 32, 1, 1)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_second_backward_is_refused():
    x, lists = torch.randn(2, 3, *SIZE), parameters(torch.float32)
    output = ours(x, *lists)[0].sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


def test_what_it_leaves_to_the_modules():
    x, lists = torch.randn(2, 3, *SIZE), parameters(torch.float32)
    assert ours(x.double(), *lists) is None
    layers = [layer for _, _, layer in LAYERS]
    assert conv_chain(x, [ChainLayer(3, 1), *layers[1:]], *lists) is None
