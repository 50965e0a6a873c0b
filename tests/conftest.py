"""Without a GPU the Triton kernels run in Triton's interpreter; with one the same tests run compiled."""

import hashlib
import io
import os
import pathlib
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

try:
    from xdist.scheduler import LoadFileScheduling
except ImportError:  # then there is one process
    LoadFileScheduling = object
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

from osscl_min import cli  # noqa: E402
from osscl_min.config import PRESETS, AudioConfig, EvaluateConfig, ModelConfig  # noqa: E402
from osscl_min.data.synth import SynthConfig, write_dataset  # noqa: E402
from osscl_min.runtime.files import UserError  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
COMMAND = [sys.executable, "-m", "osscl_min"]


def tiny(train, **parts):
    """Preset quick with clips of one second, other settings of the training and other parts."""
    quick = PRESETS["quick"]
    parts = {"model": ModelConfig(audio=AudioConfig(seconds=1.0, clip_step=2.0)), **parts}
    return replace(quick, train=replace(quick.train, **train), **parts)


MACHINES = SynthConfig(seconds=1.0, ids_per_type=1, train_clips=3, test_normal=2, test_anomaly=2)
LOG_MEL = ModelConfig(audio=AudioConfig(seconds=1.0, clip_step=2.0), inputs=("log_mel",))
TINY = tiny({"epochs": 3, "batch_size": 5}, model=LOG_MEL)  # a whole training in seconds


def environment(**more):
    """For a process of its own that imports the packages."""
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"} | more


def pytest_addoption(parser):
    parser.addoption("--golden", action="store_true", help="write tests/golden/surface.txt anew")


SLOW_FIXTURES = {"swept", "reported", "steps"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Exhaustive tests and those that wait for a slow fixture are slow; long files begin first."""
    for item in items:
        if item.get_closest_marker("exhaustive") or not SLOW_FIXTURES.isdisjoint(item.fixturenames):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, len(item.path.parts)))  # short ones fill the end


class OneFileOneProcess(LoadFileScheduling):
    """A process runs all tests of a file; the files that share `tiny_run` or `reported` go to one process."""

    shared = re.compile(r"(report|inference)/|test_(notebooks|surface|hostile|evaluate)\.py")

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "tiny_run" if self.shared.search(file) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return OneFileOneProcess(config, log)


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


def put(place, content):
    """Make a file of bytes or a text, or by a function of its path, and the folders that it lies in."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    if callable(content):
        content(place)
    else:
        place.write_bytes(content.encode() if isinstance(content, str) else content)


def kill_when(process, reached, after=0.0):
    """Kill -9 a process, the first of its session, and what it started, `after` seconds after `reached()`."""
    while not reached():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def contents(folder):
    """Every regular file below a folder, by its name there, with a digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@contextmanager
def refused(message, status=2):
    """The block must end in a user's error of one line that matches `message`."""
    with pytest.raises(UserError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value) and caught.value.exit_status == status


@pytest.fixture
def osscl(monkeypatch, capfd):
    """Runs a command in this process: exit status, standard output, standard error; a hanging one fails."""

    def run(*arguments, given=b""):
        monkeypatch.setattr(sys, "argv", ["osscl", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), "utf-8"))
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"hangs: {arguments}"))
        signal.alarm(60)
        try:
            status = cli.main() or 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        finally:
            signal.alarm(0)
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def help_text(osscl, monkeypatch):
    """Gives the help of a command, 100 columns wide."""
    for name, value in {"COLUMNS": "100", "LINES": "50", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)

    def run(*arguments):
        with redirect_stdout(io.StringIO()) as text:  # of no encoding: boxes are in ASCII
            osscl(*arguments, "--help")
        text = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())
        return "\n".join(line.rstrip() for line in text.strip().splitlines())

    return run


@pytest.fixture
def poisoned():
    """Every fresh tensor holds NaN (bytes: 255) until something is written there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device="cuda" if torch.cuda.is_available() else "cpu").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """Real machine sounds and scores, from OSSCL_REAL_DATA; the test is skipped where it is unset."""
    folder = os.environ.get("OSSCL_REAL_DATA")
    if not folder:
        pytest.skip("OSSCL_REAL_DATA is not set")
    return pathlib.Path(folder).resolve()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
    """Clips of one second of six simulated machines: three for training and four test clips of each."""
    return write_dataset(tmp_path_factory.mktemp("machines") / "data", MACHINES)


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory) -> pathlib.Path:
    """The folder of a run of TINY on `data`; tests leave it as it is."""
    from osscl_min.train import train

    out = tmp_path_factory.mktemp("uninterrupted")
    train(data, out, TINY, device="cpu")
    return out


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> pathlib.Path:
    """A whole run of twelve simulated machines, one-second clips and one epoch, with its data in data/.

    Its network has learned next to nothing. Tests that change it work on a copy.
    """
    from osscl_min.evaluate import evaluate
    from osscl_min.experiments.variants import examine
    from osscl_min.train import train

    run = tmp_path_factory.mktemp("runs") / "tiny"
    data = write_dataset(run / "data", replace(MACHINES, ids_per_type=2))
    scoring = EvaluateConfig(batch_size=24, bootstrap=20)
    best = train(data, run, tiny({"epochs": 1}, evaluate=scoring), device="cpu")
    evaluate(best, data, run / "evaluation", config=scoring, device="cpu")
    evaluate(run / "initial.pt", data, run / "untrained", config=scoring, device="cpu")
    examine("high-frequency", {"given": [best]}, data, run / "high_frequency", scoring, (2000.0,), "cpu")
    return run


@pytest.fixture
def copy(tiny_run, tmp_path):
    """A copy of `tiny_run` without its data, to be changed."""
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("data"))


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
