"""The rules of the house: imports run one way, and the two lists of packages agree."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from osscl_min import __version__
from osscl_min.report.update import DOCUMENTS, fill

# Rooms and top-level modules: each may import only from its own and earlier lines.
ORDER = [
    {"runtime"},
    {"config"},
    {"data"},
    {"features", "model", "losses", "augment", "neighbours"},
    {"checkpoint"},
    {"trainer", "train", "metrics", "evaluate"},
    {"inference", "experiments"},
    {"report", "notebook"},
    {"bench"},
    {"cli", "__main__", "__init__"},
]


def imports(path):
    """Dotted names imported anywhere in a file; relative ones aside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def test_imports_run_one_way():
    rank = {name: number for number, names in enumerate(ORDER) for name in names}
    for path in (ROOT / "osscl_min").rglob("*.py"):
        room = path.relative_to(ROOT / "osscl_min").parts[0].removesuffix(".py")
        assert room in rank, f"{path} has no place in the order"
        for package, _, name in (name.partition(".") for name in imports(path)):
            other = name.split(".")[0]
            if package == "osscl_min" and other in rank:
                assert rank[other] <= rank[room], f"{path} imports {other}, which comes later"


def test_the_kernels_need_only_torch_and_triton_which_nothing_else_imports():
    allowed = {"torch", "triton", "osscl_kernels", *sys.stdlib_module_names}
    for path in (ROOT / "kernels" / "osscl_kernels").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path
    for path in (ROOT / "osscl_min").rglob("*.py"):
        assert "triton" not in {name.split(".")[0] for name in imports(path)}, path


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = "torch triton numpy scipy soundfile scikit-learn matplotlib tqdm tyro pooch".split()


def ranges(*extras):
    lines = PROJECT["dependencies"] + sum((PROJECT["optional-dependencies"][name] for name in extras), [])
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def test_jupyter_and_pytest_are_extras_and_pins_lie_within_the_ranges():
    assert set(ranges()) == set(RUNTIME) and set(ranges("notebooks")) == {*RUNTIME, "jupyter"}
    admitted = ranges("notebooks", "test")
    assert set(admitted) == {*RUNTIME, "jupyter", "pytest", "pytest-xdist"}
    assert str(admitted["triton"].marker) == 'platform_system == "Linux"'
    lines = (ROOT / "environment.yml").read_text().splitlines()
    pinned = [Requirement(line.strip()[2:]) for line in lines if "==" in line]
    assert {pin.name for pin in pinned} == set(admitted)
    for pin in pinned:
        (version,) = pin.specifier
        assert version.operator == "==" and admitted[pin.name].specifier.contains(version.version), pin
        assert str(pin.marker) == str(admitted[pin.name].marker), pin


def test_every_package_is_in_the_distribution(tmp_path):
    """`pip install .` takes every folder with an __init__.py, the C++ file included."""
    program = """from setuptools import Distribution
d = Distribution()
d.parse_config_files()
print(*d.packages, d.metadata.version)"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    *packages, version = output.split()
    tops = ROOT, ROOT / "kernels"
    files = [path.relative_to(top) for top in tops for path in top.glob("os*/**/__init__.py")]
    assert set(packages) == {".".join(path.parent.parts) for path in files} and version == __version__


def test_the_command_line_starts_without_torch():
    program = "import sys, osscl_min.cli; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_generated_numbers_are_those_of_results(document):
    text = (ROOT / document).read_text()
    assert "<!-- generated from" in text
    assert fill(ROOT / document) == text, "run: python -m osscl_min.report.update readme"


@pytest.mark.parametrize("folder", ["osscl_min", "kernels", "tests", "notebooks", ".ci"])
def test_no_absolute_path_of_a_machine(folder):
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in (".py", ".ipynb", ".md", ".sh") or path.name == "run":
            found = re.findall(r"""["'\s=](/(?:home|root|work|Users|tmp)/[^"'\s]*)""", path.read_text())
            assert not found, f"{path}: {found}"
