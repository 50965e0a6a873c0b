"""The command line and reproduce.sh, as a user types them."""

import json
import subprocess

import pytest
from conftest import COMMAND, ROOT, environment


def run(*command):
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment(NO_COLOR="1")}
    return subprocess.run(list(map(str, command)), **options)


def osscl(*arguments):
    return run(*COMMAND, *arguments)


def test_help_lists_the_commands():
    text = osscl("--help").stdout
    for command in "synth download inspect pack train evaluate metrics report bench".split():
        assert command in text


def test_the_preset_gives_the_defaults():
    for preset, seconds in (("quick", "2.0"), ("paper", "10.0")):
        text = " ".join(osscl("train", "--preset", preset, "--help").stdout.split())
        assert f"(default: {seconds})" in text and f"(default: {preset})" in text


def test_metrics_of_a_folder(tmp_path):
    (tmp_path / "fan_anomaly_score_id_00.csv").write_text("normal_id_00_0.wav,0.1\nanomaly_id_00_0.wav,0.9\n")
    result = osscl("metrics", tmp_path, "--out", tmp_path / "out", "--bootstrap", 0)
    assert result.returncode == 0, result.stderr
    assert "| fan          | 100.00" in result.stdout
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["average"]["mauc"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("metrics", "nowhere"), "osscl: no such folder: nowhere"),
        (
            ("evaluate", "--checkpoint", "nowhere.pt", "--data", ".", "--out", "x"),
            "osscl: no such checkpoint: nowhere.pt",
        ),
        (("train", "--data", "nowhere", "--out", "x"), "osscl: no such data folder: nowhere"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path):
    result = osscl(*arguments)
    assert result.returncode == 2
    assert result.stderr.strip() == message


def test_an_unknown_option_stops():
    result = osscl("train", "--data", "x", "--out", "y", "--trian.epochs", "3")
    assert result.returncode == 2 and "--trian.epochs" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unknown option --bogus"),
        (["--preset", "huge"], "unknown preset huge"),
        (["--data"], "--data needs a value"),
        (["--data", "nowhere"], "no such data folder"),
        (["--seed", "x1"], "--seed takes a whole number, not x1"),
    ],
)
def test_reproduce_refuses_with_one_line(arguments, message):
    result = run("bash", "reproduce.sh", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"reproduce.sh: {message}")


def test_reproduce_help():
    result = run("bash", "reproduce.sh", "--help")
    assert result.returncode == 0
    for option in ("--test", "--data", "--preset", "--full", "--seed", "--out", "--device"):
        assert option in result.stdout
