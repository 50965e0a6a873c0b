"""The command line and reproduce.sh, as a user types them."""

import os
import pickle
import shutil
import subprocess
import sys

import pytest
from conftest import COMMAND, ROOT, contents, environment, refused

from osscl_min import __version__, cli
from osscl_min.runtime.files import UserError


def run(*command, **options):
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment(NO_COLOR="1")} | options
    return subprocess.run(list(map(str, command)), **options)


def test_version(osscl):
    assert osscl("--version") == (0, f"osscl-min {__version__}\n", "")


@pytest.mark.parametrize(("preset", "seconds"), [("quick", "2.0"), ("paper", "10.0")])
def test_the_preset_gives_the_defaults(preset, seconds, help_text):
    text = " ".join(help_text("train", "--preset", preset).split())
    assert f"(default: {seconds})" in text and f"(default: {preset})" in text


MISTAKES = {  # arguments, the only line on standard error
    "bench model --data .": "bench model reads no data: leave out --data",
    "ablate noise --data . --out FILE": "FILE is a file; --out takes a folder",
    "ablate noise --data . --out x --seeds": "--seeds takes at least one number",
    "train --data . --out x --seeds 1,b": "--seeds takes whole numbers separated by commas, not '1,b'",
    "train --data . --out x --seeds 1 --resume": "--seeds does not go with --with, --strict or --resume",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_makes_nothing(arguments, osscl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("kept")
    before = contents(tmp_path)
    assert osscl(*arguments.split()) == (2, "", f"osscl: {MISTAKES[arguments]}\n")
    assert contents(tmp_path) == before


def test_experiments_refuse_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with refused("without torchrun"):
        cli.run_experiment("noise", ROOT, ROOT, None, seeds=(0,))


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("\udcff.wav: not a sound"), 2, "osscl: \\udcff.wav: not a sound\n"),
        (UserError("disk full", 5), 5, "osscl: disk full\n"),
        (PermissionError(13, "Permission denied", "a"), 2, "osscl: [Errno 13] Permission denied: 'a'\n"),
    ],
)
def test_errors_end_in_one_line_and_their_status(error, status, line):
    """In a process of its own, whose standard error is strict UTF-8 at first."""
    program = (
        "import pickle, sys; from osscl_min import cli; error = pickle.loads(sys.stdin.buffer.read());"
        "cli.commands = lambda preset: {'fail': lambda: (_ for _ in ()).throw(error), 'other': print};"
        "sys.argv[1:] = ['fail']; cli.main()"
    )
    strict = environment(PYTHONIOENCODING="utf-8:strict")
    result = run(sys.executable, "-c", program, input=pickle.dumps(error), env=strict, text=False)
    assert (result.returncode, result.stderr.decode()) == (status, line)


def test_ctrl_c_while_it_starts_is_quiet(tmp_path):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")
    path = f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"
    result = run(*COMMAND, "--help", env=environment(PYTHONPATH=path))
    assert (result.returncode, result.stderr) == (130, "")


REFUSALS = {  # arguments of reproduce.sh -> the only line
    "--bogus": "unknown option --bogus",
    "--preset huge": "unknown preset huge",
    "--data": "--data needs a value",
    "--data nowhere": "no such data folder",
    "--seed x1": "--seed takes a whole number, not x1",
}


@pytest.mark.parametrize("arguments", REFUSALS)
def test_reproduce_refuses_with_one_line(arguments):
    result = run("bash", "reproduce.sh", *arguments.split())
    assert result.returncode == 2
    assert result.stderr.startswith(f"reproduce.sh: {REFUSALS[arguments]}")


def test_reproduce_help():
    result = run("bash", "reproduce.sh", "--help")
    assert result.returncode == 0 and "--test -- tests/kernels" in result.stdout
    for option in "data preset full seed out device experiments".split():
        assert f"--{option} " in result.stdout


STUB = """#!/bin/bash
[ "$1" = -c ] && exit 0  # has the packages
shift 2
echo "called: $*"
[ "$1 $2" = "ablate all" ] && exit 1
while [ $# -gt 0 ]; do
  if [ "$1" = --out ]; then
    mkdir -p "$2"
    for name in best.pt initial.pt evaluation.json metrics.json high_frequency.json; do
      [ -e "$2/$name" ] || touch "$2/$name"
    done
  fi
  shift
done
"""
STORIES = {  # arguments of reproduce.sh -> the commands of a first run and of a second one
    "": ("synth train evaluate evaluate ablate report", "synth train report"),
    "--data DIR --seed 3": ("train evaluate evaluate ablate report", "train report"),
    "--full": ("download pack train evaluate evaluate ablate report", "download pack train report"),
    "--full --data DIR": ("pack train evaluate evaluate ablate report", "pack train report"),
    "--experiments": ("synth ablate", "synth ablate"),
}


@pytest.mark.parametrize("arguments", STORIES)
def test_reproduce_calls_the_commands_and_reuses_what_is_there(arguments, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "DIR").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)
    shutil.copy(ROOT / "reproduce.sh", tmp_path)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for commands in STORIES[arguments]:
        active = environment(PATH=path, VIRTUAL_ENV="active")
        result = run("bash", "reproduce.sh", *arguments.split(), cwd=tmp_path, env=active)
        assert result.returncode == (arguments == "--experiments"), result.stderr
        calls = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("called: ")]
        assert calls == commands.split()
    if arguments != "--experiments":
        (timing,) = tmp_path.glob("runs/*/timing.csv")
        assert timing.read_text().startswith("step,seconds\n")
