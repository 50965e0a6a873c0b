"""SupCon against float64: an error of at most twice the plain float32 formula's, plus FLOOR."""

import importlib
import itertools
import math
import zlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from conftest import GOLDEN
from hardware import DEVICE, error
from osscl_kernels import backend, supcon_loss, supcon_loss_ref

FLOOR = 2e-6  # of the largest entry, or of the largest term: 1 / base_temperature, weighted
# What rounding the gradient's weights to 8 bits costs beyond that; the truth has features rounded likewise.
ROUNDING = {"bf16": 2**-9}
PRECISIONS = ("ieee", "tf32x3", "bf16")
pytestmark = pytest.mark.usefixtures("poisoned")
module = importlib.import_module("osscl_kernels.supcon")  # the package's name is the function
triton_only = pytest.mark.skipif(backend.triton is None, reason="triton is not installed")


@pytest.fixture(params=[pytest.param("triton", marks=triton_only), "torch"])
def path(request, monkeypatch):
    """Options for either path; PyTorch's takes small cases in several chunks."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {DEVICE: 2000})
    return {"backend": request.param}


def rows(n, width=128, classes=5, seed=0):
    """Unit vectors that lean one way, as embeddings do, and labels of which some are unused."""
    g = torch.Generator().manual_seed(1000 * seed + n)
    z = torch.randn(n, width, generator=g) + 0.5 * torch.randn(1, width, generator=g)
    labels = torch.randint(classes, (n,), generator=g) * 8 - 16
    return torch.nn.functional.normalize(z, dim=1).to(DEVICE), labels.to(DEVICE)


def weights(n):
    return (torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.5).to(DEVICE)


def run(function, z, labels, reduction="none", **options):
    """Losses, and the gradient under a non-unit gradient of each."""
    z = z.detach().requires_grad_()
    out = function(z, labels, reduction=reduction, **options)
    given = weights(len(z)) if reduction == "none" else torch.tensor(-3.0, device=z.device)
    return out.detach(), torch.autograd.grad(out, z, given.to(out.dtype))[0]


def assert_within_budget(z, labels, precision="ieee", reduction="none", settings=None, **options):
    """Forward and backward against float64; returns both."""
    settings = settings or {}
    ours = run(supcon_loss, z, labels, reduction, precision=precision, **settings, **options)
    seen = z.bfloat16().float() if precision == "bf16" and options.get("backend") == "triton" else z
    truth = run(supcon_loss_ref, seen.double(), labels, reduction, **settings)
    plain = run(supcon_loss_ref, seen, labels, reduction, **settings)
    term = 1 / settings.get("base_temperature", 0.07)
    terms = (term, term if reduction == "none" else 3 * term / len(z))
    for i, name in enumerate(("loss", "gradient")):
        rounding = i * ROUNDING.get(precision, 0)  # of the gradient's weights
        budget = 2 * error(plain[i], truth[i], terms[i]) + FLOOR + rounding
        assert error(ours[i], truth[i], terms[i]) <= budget, name
    if reduction == "none":
        assert (ours[0][(labels[:, None] == labels).sum(1) == 1] == 0).all()
    return ours


def test_reference_is_the_formula():
    """Equation 2 of Khosla et al., one term after the other."""
    z, labels = rows(9, 4, classes=3)
    z, labels = z.double(), labels.clone()
    labels[4] = 1000
    losses = []
    for i in range(9):
        others = [j for j in range(9) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        total = sum(math.exp(z[i] @ z[j] / 0.1) for j in others)
        terms = [math.log(math.exp(z[i] @ z[p] / 0.1) / total) for p in positives]
        losses.append(-(0.1 / 0.3) * sum(terms) / len(terms) if terms else 0.0)
    settings = {"temperature": 0.1, "base_temperature": 0.3}
    out = supcon_loss_ref(z, labels, reduction="none", **settings)
    torch.testing.assert_close(out, out.new_tensor(losses), rtol=1e-12, atol=1e-12)
    assert out[4] == 0 and (out[:4] > 0).all()
    torch.testing.assert_close(supcon_loss_ref(z, labels, **settings), out.mean(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("count", [64, 257])
def test_golden(path, count):
    """The authors' loss and gradient; tests/golden/README.md tells the recipe."""
    gold = np.load(GOLDEN / "upstream_float64.npz")
    g = np.random.default_rng(zlib.crc32(f"osscl/supcon{count}".encode()))
    z = g.standard_normal((count, 128)) + 2 * g.standard_normal((1, 128))
    z = torch.from_numpy(z / np.linalg.norm(z, axis=1, keepdims=True)).to(DEVICE)
    labels = torch.from_numpy(g.integers(0, 41, count)).to(DEVICE)
    for x, function, options, tolerance in (
        (z, supcon_loss_ref, {}, 1e-12),
        (z, supcon_loss, path, 1e-9),
        (z.float(), supcon_loss, path, 2e-5),
    ):
        out = function(x.requires_grad_(), labels, **options)
        gradient = torch.autograd.grad(out, x)[0][::7]
        assert error(out, torch.from_numpy(gold[f"supcon{count}_loss"])) < tolerance
        assert error(gradient, torch.from_numpy(gold[f"supcon{count}_grad"])) < tolerance


CASES = [(n, 128, "ieee") for n in (1, 2, 3, 17, 31, 32, 33, 64, 65, 127, 128, 129)]
CASES += [(67, width, "ieee") for width in (1, 16, 48, 129)] + [(131, 128, name) for name in PRECISIONS]


@pytest.mark.parametrize("n, width, precision", CASES)
def test_sizes_widths_and_precisions(path, n, width, precision):
    assert_within_budget(*rows(n, width, classes=2 if n < 4 else 5), precision, **path)


@triton_only
@pytest.mark.skipif(DEVICE == "cuda", reason="another architecture's tiles")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", [80, 86])
def test_every_memory_class(monkeypatch, capability, precision):
    monkeypatch.setattr(backend, "capability", lambda _: capability)
    for n, width in ((17, 48), (67, 128)):
        assert_within_budget(*rows(n, width), precision, backend="triton")


@triton_only
def test_tiles_of_large_batches(monkeypatch):
    tile = backend.tile
    monkeypatch.setattr(backend, "tile", lambda *case: tile(*case[:3], 1 << 20))
    assert_within_budget(*rows(131), "bf16", backend="triton")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_reductions_and_temperatures(path, reduction, temperature):
    settings = {"temperature": temperature, "base_temperature": 0.3}
    for n in (40, 70):
        loss, _ = assert_within_budget(*rows(n), reduction=reduction, settings=settings, **path)
        assert loss.shape == (() if reduction == "mean" else (n,)) and loss.dtype == torch.float32


@pytest.mark.parametrize("kind", ["all equal", "lonely", "huge", "int8", "bool", "pairs"])
def test_labels(path, kind):
    z, labels = rows(34)
    each, limits = torch.arange(34, device=DEVICE), torch.iinfo(torch.int64)
    labels = {
        "all equal": torch.full_like(labels, -7),
        "lonely": torch.where(
            torch.arange(34, device=DEVICE) % 9 > 0, labels, torch.arange(34, device=DEVICE) + 500
        ),
        "huge": torch.where(labels > 0, limits.max, torch.where(labels < 0, limits.min, limits.max - 1)),
        "int8": labels.to(torch.int8),
        "bool": labels > 0,
        "pairs": each // 2 - 10,
    }[kind]
    _, gradient = assert_within_budget(z, labels, **path)
    assert (gradient != 0).any(1).all()  # rows without positives are others' negatives
    names = torch.unique(labels, return_inverse=True)[1]  # only which are equal counts
    assert torch.equal(run(supcon_loss, z, labels, **path)[0], run(supcon_loss, z, names, **path)[0])


@pytest.mark.parametrize("n", [0, 1, 33])
def test_without_positives_everything_is_zero(path, n):
    z, _ = rows(n)
    for reduction in ("none", "mean"):
        loss, gradient = run(supcon_loss, z, torch.arange(n, device=DEVICE) - 5, reduction, **path)
        assert (loss == 0).all() and (gradient == 0).all() and gradient.shape == z.shape


def test_far_from_unit_length(path):
    """Logits in the thousands neither overflow nor vanish; an exponential is as exact as its argument."""
    z, labels = rows(40)
    ours, truth = run(supcon_loss, 8 * z, labels, **path), run(supcon_loss_ref, 8 * z.double(), labels)
    assert error(ours[0], truth[0]) < FLOOR
    assert error(ours[1], truth[1]) < 64 * 50 * math.log2(math.e) * 2**-23
    z = torch.zeros_like(z)
    loss, gradient = run(supcon_loss, z, torch.zeros_like(labels), "mean", **path)
    assert loss.item() == pytest.approx(0.02 / 0.07 * math.log(39), rel=1e-6) and (gradient == 0).all()


def test_strides(path):
    z, labels = rows(68, 100)
    for view, names in (
        (z[::2, :99], labels[::2]),
        (z[34:, ::2], labels[:34]),
        (z.T.contiguous().T[:34], labels.flip(0)[::2]),
        (z[:1].expand(34, -1), labels[:1].expand(34)),
    ):
        ours = run(supcon_loss, view, names, **path)
        plain = run(supcon_loss, view.contiguous(), names.contiguous(), **path)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features(path, dtype):
    z, labels = rows(70)
    z = z.to(dtype)
    loss, gradient = run(supcon_loss, z, labels, **path)
    truth, slope = run(supcon_loss_ref, z.double(), labels)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert error(loss, truth) < FLOOR
    last = torch.finfo(dtype).eps / 2  # of rounding to its own type
    assert error(gradient, slope) < FLOOR + last + (ROUNDING["bf16"] if dtype == torch.bfloat16 else 0)
    assert torch.equal(run(supcon_loss_ref, z, labels)[0], run(supcon_loss_ref, z.float(), labels)[0])


@pytest.mark.parametrize("asked", ["triton", "torch", "auto"])
def test_float64_and_wide_rows_take_the_torch_path(asked, monkeypatch):
    monkeypatch.setattr(module, "_forward_kernel", None)
    z, labels = rows(40)
    labels[2] = 99  # without a positive
    for reduction in ("mean", "none"):
        ours = run(supcon_loss, z.double(), labels, reduction, backend=asked)
        for value, truth in zip(ours, run(supcon_loss_ref, z.double(), labels, reduction), strict=True):
            assert value.dtype == torch.float64 and error(value, truth) < 1e-11
    assert_within_budget(*rows(40, 130), backend=asked)


def test_memory_stays_linear(monkeypatch):
    """No step of the PyTorch path holds N x N."""
    n, largest = 3000, []
    z, labels = rows(n, 16)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {DEVICE: 1 << 16})

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))
            return out

    with Watch():
        run(supcon_loss, z, labels, backend="torch")
    assert n * 16 <= max(largest) <= max(2 * n * 16, (1 << 16) + n)


def test_another_run_and_autocast_change_no_bit(path):
    z, labels = rows(131)
    expected, plain = run(supcon_loss, z, labels, **path), run(supcon_loss_ref, z, labels)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = run(supcon_loss, z, labels, **path)
        assert torch.equal(supcon_loss_ref(z, labels, reduction="none"), plain[0])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("mean", [True, False])
def test_operators_are_well_formed(path, mean):
    z, labels = rows(17)
    settings = (0, 17, mean, 0.02, 0.07, "ieee" if path["backend"] == "triton" else "torch")
    torch.library.opcheck(module._forward, (z, labels, *settings))
    loss, *saved = module._forward(z, labels, *settings)
    torch.library.opcheck(module._backward, (torch.ones_like(loss), z, labels, *saved, *settings))


def test_compiles_to_one_graph(path):
    z, labels = rows(70)
    compiled = torch.compile(supcon_loss, fullgraph=True, backend="aot_eager")
    ours = run(compiled, z, labels, "mean", **path)
    expected = run(supcon_loss, z, labels, "mean", **path)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("n", [64, 5000])
def test_replays_as_a_cuda_graph(n):
    torch.use_deterministic_algorithms(False)
    z, labels = rows(n)
    z.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = torch.autograd.grad(supcon_loss(z, labels), z)[0]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = torch.autograd.grad(supcon_loss(z, labels), z)[0]
    gradient.fill_(float("nan"))
    graph.replay()
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z, y: (z[0], y), r"expected \(N, D\) and \(N,\)"),
        (lambda z, y: (z, y[:7]), r"expected \(N, D\) and \(N,\)"),
        (lambda z, y: (z.long(), y), "features are torch.int64"),
        (lambda z, y: (z, y.float()), "labels are torch.float32"),
        (lambda z, y: (z, y.to("meta")), "labels on meta"),
        ({"temperature": 0.0}, "expected positive numbers"),
        ({"temperature": math.nan}, "expected positive numbers"),
        ({"base_temperature": -1.0}, "expected positive numbers"),
        # tensor cores truncate: logits would be off by 0.05
        ({"precision": "tf32"}, "unknown precision 'tf32'; expected one of auto, ieee, tf32x3, bf16$"),
        ({"reduction": "sum"}, "unknown reduction 'sum'; expected one of mean, none$"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; expected one of auto, triton, torch$"),
    ],
)
def test_refusals(change, message):
    arguments, options = (rows(8), change) if isinstance(change, dict) else (change(*rows(8)), {})
    with pytest.raises(ValueError, match=message):
        supcon_loss(*arguments, **options)


SPLITS = (23, 7), (11, 0, 19)  # rows of each rank


def distributed_rank(rank, folder, cases):
    """Write this rank's losses and gradients: what one process makes of all rows is the test's to compare."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    groups = {2: dist.new_group([0, 1]), 3: dist.group.WORLD}
    for number, (split, z, labels, options) in enumerate(cases):
        if rank >= len(split):
            continue
        mine, results = slice(sum(split[:rank]), sum(split[: rank + 1])), {}
        for reduction in ("mean", "none"):
            x = z[mine].clone().requires_grad_()
            loss = supcon_loss(x, labels[mine], reduction=reduction, group=groups[len(split)], **options)
            given = torch.tensor(-3.0) if reduction == "mean" else weights(len(z)).cpu()[mine]
            results[reduction] = loss.detach(), torch.autograd.grad(loss, x, given.to(loss.dtype))[0]
        torch.save(results, f"{folder}/{number}.{rank}.pt")
    dist.barrier()  # gloo may abort where a rank leaves while others still talk
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="gloo on a CPU; the spawned ranks choose their own device")
def test_ranks_agree_with_one_process(tmp_path):
    kinds = [("torch", torch.float64), ("torch", torch.float32)]
    kinds += [("triton", torch.float32)] * (backend.triton is not None)
    cases = []
    for split, (name, dtype) in itertools.product(SPLITS, kinds):
        z, labels = rows(sum(split), 32)
        cases.append((split, z.to(dtype), labels, {"backend": name}))
    multiprocessing.spawn(distributed_rank, (str(tmp_path), cases), nprocs=3)
    for number, (split, z, labels, options) in enumerate(cases):
        ranks = [torch.load(tmp_path / f"{number}.{rank}.pt") for rank in range(len(split))]
        for reduction in ("mean", "none"):
            loss, gradient = run(supcon_loss, z, labels, reduction, **options)
            losses, gradients = zip(*(results[reduction] for results in ranks), strict=True)
            losses = torch.stack(losses) if reduction == "mean" else torch.cat(losses)
            torch.testing.assert_close(losses, loss.expand_as(losses), rtol=1e-6, atol=1e-7)
            scale = gradient.abs().max().item()
            torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-5, atol=1e-6 * scale)
