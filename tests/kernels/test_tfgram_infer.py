"""TFgram at inference against float64: an error of at most twice the plain PyTorch path's plus FLOOR."""

import importlib

import pytest
import torch
from hardware import DEVICE, Modules, error
from osscl_kernels import backend
from osscl_kernels.tfgram_infer import LAYERS, Folded, fold_batchnorm, frames, tfgram_infer_ref

FLOOR = 3e-7  # of the largest output
tfgram_infer = importlib.import_module("osscl_kernels.tfgram_infer")  # the package's name is the function
infer = tfgram_infer.tfgram_infer
pytestmark = [
    pytest.mark.skipif(backend.triton is None, reason="triton is not installed"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(scope="module")
def module():
    return Modules().eval().to(DEVICE).requires_grad_(False)


@pytest.fixture(scope="module")
def folded(module):
    return fold_batchnorm(module)


@pytest.fixture(scope="module")
def exact(module):
    return fold_batchnorm(module, torch.float64)


def waves(clips, samples, seed=1):
    torch.manual_seed(seed)
    return (torch.randn(clips, samples) * 0.1).to(DEVICE)


def plain(wave, folded, precision, **options):
    """What PyTorch makes of it in the same precision, layer by layer."""
    if precision == "bf16":
        return tfgram_infer_ref(wave.bfloat16(), folded.to(torch.bfloat16), **options)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32"):
        return tfgram_infer_ref(wave, folded, **options)


def assert_within_budget(wave, folded, exact, precision="ieee", backend="triton", **options):
    out = infer(wave, folded, precision=precision, backend=backend, **options)
    truth = tfgram_infer_ref(wave.double(), exact, **options)
    assert out.shape == (len(wave), 128, frames(wave.shape[1], **options)) and out.dtype == torch.float32
    assert truth.abs().max() > 0
    # on a CPU PyTorch has no tf32 to compare with: each factor loses its last 13 bits, 2^-10 of it
    floor = 2**-9 if precision == "tf32" and DEVICE == "cpu" else FLOOR
    assert error(out, truth) <= 2 * error(plain(wave, folded, precision, **options), truth) + floor


@pytest.mark.parametrize("samples", [16000, 777])
def test_folding_changes_nothing(module, exact, samples):
    wave = waves(2, samples).double()
    plain = Modules().eval().to(DEVICE).double()
    truth = plain(wave).detach()
    assert error(tfgram_infer_ref(wave, exact), truth) < 1e-13
    assert error(infer(wave, exact), truth) < 1e-12
    plain.norm[2].eps = 0.1
    assert error(tfgram_infer_ref(wave, fold_batchnorm(plain)), plain(wave)) < 1e-13
    assert infer(wave, exact).dtype == torch.float64


def test_folded_layout_and_dtypes(module, folded, exact):
    half = fold_batchnorm(module, torch.bfloat16)
    assert [tuple(w.shape) for w in half.weights] == [(x.kernel, x.inputs, x.outputs) for x in LAYERS]
    assert {w.dtype for w in half.weights} == {torch.bfloat16} and {b.dtype for b in half.biases} == {
        torch.float32
    }
    assert all(w.is_contiguous() for f in (half, folded, exact) for w in f.weights)


SHAPES = [
    *((1, 20), (2, 777), (1, 2560)),
    pytest.param(1, 6400, marks=pytest.mark.slow),
    pytest.param(3, 1003, marks=pytest.mark.exhaustive),
    pytest.param(2, 17003, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("precision", ["ieee", "bf16"] if DEVICE == "cpu" else ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize(("clips", "samples"), SHAPES)
def test_against_float64(folded, exact, clips, samples, precision, backend):
    assert_within_budget(waves(clips, samples), folded, exact, precision, backend)


@pytest.mark.skipif(DEVICE == "cuda", reason="another architecture's tiles")
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("capability", [80, 86])
def test_every_memory_class(folded, exact, monkeypatch, capability, precision):
    monkeypatch.setattr(backend, "capability", lambda _: capability)
    assert_within_budget(waves(1, 1511), folded, exact, precision)


@pytest.mark.parametrize("segment", [4, 36, 100])
def test_segments_are_seamless(folded, exact, monkeypatch, segment):
    monkeypatch.setattr(tfgram_infer, "_segment", lambda *_: segment)
    assert_within_budget(waves(2 if segment == 36 else 1, 700), folded, exact)


@pytest.mark.parametrize("hop", [pytest.param(200, marks=pytest.mark.slow), 4096])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_other_hops(folded, exact, hop, backend):
    """Windows too wide for a tile, as of the larger hop, take the PyTorch path."""
    assert_within_budget(waves(1, max(3001, hop)), folded, exact, backend=backend, hop=hop)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_strides_runs_batches_and_graphs_agree_bit_for_bit(folded, backend):
    base, options = waves(4, 1206), {"precision": "ieee", "backend": backend}
    for view in (base[:1].expand(2, -1)[:, 5:300], base[::2, ::2]):
        out = infer(view, folded, **options)
        assert torch.equal(out, infer(view.contiguous(), folded, **options))
    compiled = torch.compile(infer, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(out, function(view, folded, **options)) for function in (infer, compiled))
    if (backend == "triton") == (DEVICE == "cuda"):  # NumPy's products depend on the row's place in its tile
        assert torch.equal(out[1:], infer(view[1:], folded, **options))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_int16_is_the_same_wave(folded, backend):
    whole = torch.randint(-32768, 32768, (1, 300), dtype=torch.int16, device=DEVICE)
    whole[0, :2] = torch.tensor([-32768, 32767])
    out = infer(whole, folded, precision="ieee", backend=backend)
    assert out.dtype == torch.float32
    assert torch.equal(out, infer(whole.float() / 32768, folded, precision="ieee", backend=backend))


def test_silence_and_loud_edges(folded, exact):
    wave = torch.zeros(2, 1100, device=DEVICE)
    wave[1, 0] = wave[1, -1] = 30.0  # what stands at the padded ends is seen, and seen once
    assert_within_budget(wave, folded, exact)


def test_auto_precision(folded, monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    wave = waves(1, 1000)
    half = infer(wave, folded, precision="bf16")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(infer(wave, folded), half)
        assert not torch.equal(infer(wave, folded, precision="ieee"), half)
    assert infer(wave.bfloat16(), folded).dtype == torch.bfloat16
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert torch.equal(infer(wave, folded), infer(wave, folded, precision="ieee"))


def test_environment_chooses(folded, monkeypatch):
    called = []
    monkeypatch.setattr(tfgram_infer, "_infer", lambda wave, *_: called.append(1) or wave)
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "torch")
    infer(waves(1, 100), folded)
    assert not called
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    infer(waves(1, 100), folded)
    assert called


def test_a_gradient_takes_the_torch_path(monkeypatch):
    module, wave = Modules().eval().to(DEVICE), waves(2, 600).requires_grad_()
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    infer(wave, fold_batchnorm(module), precision="ieee").square().sum().backward()
    got = [wave.grad.clone(), *(p.grad.clone() for p in module.parameters())]
    module.zero_grad(set_to_none=True)
    wave.grad = None
    module(wave).square().sum().backward()
    for a, b in zip(got, [wave.grad, *(p.grad for p in module.parameters())], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    with pytest.raises(RuntimeError, match="no backward"):
        infer(wave, fold_batchnorm(module), backend="triton")


def test_no_clips_and_refusals(folded):
    for choice in ("triton", "torch"):
        assert infer(waves(0, 1000), folded, backend=choice).shape == (0, 128, 2)
    wave = waves(1, 1000)
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        infer(wave, folded, precision="fp8")
    for bad in (wave[:, :15], wave[0], wave[None]):
        with pytest.raises(ValueError, match=r"expected \(clips, samples\)"):
            infer(bad, folded)
    with pytest.raises(ValueError, match="expected int16 or floating point"):
        infer(wave.long(), folded)
    with pytest.raises(ValueError, match="fold_batchnorm"):
        infer(wave, Folded(folded.weights[:-1], folded.biases))


@pytest.mark.slow
def test_operator_is_well_formed(folded):
    arguments = (waves(1, 300), list(folded.weights), list(folded.biases), 2, "ieee")
    torch.library.opcheck(tfgram_infer._infer, arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_replays_as_a_cuda_graph(folded):
    torch.use_deterministic_algorithms(False)
    wave = waves(3, 16000)
    expected = infer(wave, folded, precision="bf16", backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = infer(wave, folded, precision="bf16", backend="triton")
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)


def test_windows_of_the_papers_clips():
    size = tfgram_infer.lengths(160_000, 313)
    assert size == [32_000, 32_000, 32_000, 8_000, 8_000, 626, 626, 313]
    assert tfgram_infer._slots(size) == [1, 16, 1, 2]
