"""Without a GPU the Triton kernels run in Triton's interpreter; with one the same tests run compiled."""

import os
import pathlib
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

from osscl_min.config import PRESETS, AudioConfig, EvaluateConfig, ModelConfig  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
COMMAND = [sys.executable, "-m", "osscl_min"]


def tiny(train, **parts):
    """Preset quick with clips of one second, other settings of the training and other parts."""
    quick = PRESETS["quick"]
    parts = {"model": ModelConfig(audio=AudioConfig(seconds=1.0, clip_step=2.0)), **parts}
    return replace(quick, train=replace(quick.train, **train), **parts)


LOG_MEL = ModelConfig(audio=AudioConfig(seconds=1.0, clip_step=2.0), inputs=("log_mel",))
TINY = tiny({"epochs": 3, "batch_size": 5}, model=LOG_MEL)  # a whole training in seconds


def environment(**more):
    """For a process of its own that imports the packages."""
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"} | more


def pytest_addoption(parser):
    parser.addoption("--golden", action="store_true", help="write tests/golden/surface.txt anew")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The slow tests of kernels try every case and take about an hour: they run where they are asked for.

    Of several processes, one runs the tests of a file, and all that read the executed notebooks.
    """
    for item in items:
        item.add_marker(
            pytest.mark.xdist_group("report" if "reported" in item.fixturenames else item.path.name)
        )
        if item.path.parent.name in ("kernels", "cpu") and item.get_closest_marker("slow"):
            item.add_marker("exhaustive")


def pytest_report_header(config):
    mode = "compiled for " + torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return (
        f"torch {torch.__version__}, Triton kernels: {mode}, real data: {os.environ.get('OSSCL_REAL_DATA')}"
    )


def noise(seed, seconds=1.0, rate=16_000, channels=1):
    """Samples (n, channels) int16."""
    shape = round(rate * seconds), channels
    return np.random.default_rng(seed).integers(-9000, 9000, shape, dtype=np.int16)


def write_sound(path, samples, rate=16_000, **options):
    """Write a sound file and the folders that it lies in; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """Real machine sounds and scores, from OSSCL_REAL_DATA; the test is skipped where it is unset."""
    folder = os.environ.get("OSSCL_REAL_DATA")
    if not folder:
        pytest.skip("OSSCL_REAL_DATA is not set")
    return pathlib.Path(folder).resolve()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
    """Eighteen training clips of one second, six simulated machines."""
    from osscl_min.data.synth import SynthConfig, write_dataset

    config = SynthConfig(seconds=1.0, ids_per_type=1, train_clips=3, test_normal=1, test_anomaly=1)
    return write_dataset(tmp_path_factory.mktemp("machines") / "data", config)


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory) -> pathlib.Path:
    """The folder of a run of TINY on `data`; tests leave it as it is."""
    from osscl_min.train import train

    out = tmp_path_factory.mktemp("uninterrupted")
    train(data, out, TINY, device="cpu")
    return out


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> pathlib.Path:
    """A whole run of twelve simulated machines, one-second clips and two epochs, with its data in data/.

    Its network has learned next to nothing. Tests that change it work on a copy.
    """
    from osscl_min.data.synth import SynthConfig, write_dataset
    from osscl_min.evaluate import evaluate
    from osscl_min.experiments.variants import examine
    from osscl_min.train import train

    run = tmp_path_factory.mktemp("runs") / "tiny"
    counts = SynthConfig(seconds=1.0, ids_per_type=2, train_clips=3, test_normal=2, test_anomaly=2)
    data = write_dataset(run / "data", counts)
    scoring = EvaluateConfig(batch_size=24, bootstrap=20)
    best = train(data, run, tiny({"epochs": 2}, evaluate=scoring), device="cpu")
    evaluate(best, data, run / "evaluation", config=scoring, device="cpu")
    evaluate(run / "initial.pt", data, run / "untrained", config=scoring, device="cpu")
    examine(
        "high-frequency", {"given": [best]}, data, run / "high_frequency", scoring, (1000.0, 4000.0), "cpu"
    )
    return run


@pytest.fixture(scope="session")
def reported(tiny_run, tmp_path_factory):
    """A copy of `tiny_run` with its report: figures, LaTeX tables, executed notebooks, pages."""
    from osscl_min.report import pages

    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("reported") / "tiny")
    pages.write(run)
    return run


@pytest.fixture(scope="session")
def trained(tiny_run):
    """The network of `tiny_run`."""
    from osscl_min import checkpoint

    return checkpoint.load(tiny_run / "best.pt")
