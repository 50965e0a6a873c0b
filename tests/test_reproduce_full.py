"""`reproduce.sh --full` on a miniature of the data: killed in the download and in training, it finishes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, kill_when
from test_download import Zenodo, miniature

from osscl_min.data.clips import BENCHMARK
from osscl_min.data.download import TYPES
from osscl_min.data.store import read_store
from osscl_min.train import read_log


@pytest.fixture
def zenodo():
    """Zenodo's four records with two machines of every type: one of each set, a clip of a kind."""
    ids = {name: [number for kind, number in BENCHMARK if kind == name][:2] for name in TYPES}
    with Zenodo.serving(miniature(ids, 1, 1.0)) as server:
        yield server


@pytest.fixture
def checkout(tmp_path):
    """The project in a folder of its own, since data/ lies in it, with short notebooks and a short preset."""
    root = tmp_path / "checkout"
    root.mkdir()
    shutil.copy(ROOT / "reproduce.sh", root)
    shutil.copytree(ROOT / "osscl_min", root / "osscl_min", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "kernels").symlink_to(ROOT / "kernels")
    settings = (root / "osscl_min" / "config.py").read_text()
    short = re.sub(r"_SHORT, epochs=\d+", "_SHORT, epochs=3", settings).replace(
        "AudioConfig(seconds=2.0, clip_step=2.0)",
        'AudioConfig(seconds=1.0, clip_step=1.0), inputs=("log_mel",)',
    )
    assert short.count("epochs=3,") == short.count("seconds=1.0, clip") == 1
    (root / "osscl_min" / "config.py").write_text(short)
    (root / "notebooks").mkdir()
    cell = nbformat.v4.new_code_cell("import os; os.environ['OSSCL_DATA']")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), root / "notebooks" / "01_short.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), root / "notebooks" / "report.ipynb")
    return root


def start(checkout, zenodo):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    mirror = {"OSSCL_MIRROR": zenodo.url, "OSSCL_TRUST_MIRROR": "1", "NO_PROXY": "127.0.0.1"}
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "OMP_NUM_THREADS": "1"} | mirror
    command = ["bash", "reproduce.sh", "--full", "--preset", "quick", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=checkout, env=environment, start_new_session=True, **pipes)


@pytest.mark.slow
def test_killed_it_resumes(checkout, zenodo):
    data, store, run = checkout / "data/dcase2020", checkout / "data/dcase2020-quick", checkout / "runs/full"
    zenodo.faults["dev_data_slider.zip"] = ["stall"]
    kill_when(start(checkout, zenodo), zenodo.stalled.is_set)
    zenodo.resume.set()
    assert (data / "fan").is_dir() and not store.exists()
    kill_when(start(checkout, zenodo), (run / "log.jsonl").exists)
    assert len(list(data.rglob("*.wav"))) == len(read_store(store)[2]) == 36 and len(read_log(run)) < 3

    process = start(checkout, zenodo)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    steps = "DCASE 2020 data", "packed store", "training", "evaluation", "ablation", "report", "Mean AUC"
    assert all(step in text for step in steps)
    assert "clips: 0 decoded, 36 kept" in text and len(read_log(run)) == 3
    asked = [count for name, count in zenodo.asked.items() if name.endswith("zip")]
    assert max(asked) == 2 and sum(asked) <= 18 + 2
    summary = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert (summary["clips"], summary["unlabelled"], summary["data"]) == (24, 0, "dcase2020")
    assert (run / "evaluation" / "evaluation_set" / "metrics.json").is_file()
    assert str(store) in (run / "notebooks" / "01_short.ipynb").read_text()
    assert (run / "report" / "report.html").is_file()
    assert (run / "timing.csv").read_text().startswith("step,seconds\nDCASE 2020 data,")
