"""The rules of the house: imports run one way, and the two lists of packages agree."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from osscl_min import __version__
from osscl_min.report.update import DOCUMENTS, fill

ROOT = Path(__file__).parent.parent
# Rooms and top-level modules: each may import only from its own and earlier lines.
ORDER = [
    {"runtime"},
    {"config"},
    {"data"},
    {"features", "model", "losses", "augment"},
    {"checkpoint"},
    {"trainer", "train", "metrics", "evaluate"},
    {"inference", "experiments"},
    {"report", "notebook"},
    {"bench"},
    {"cli", "__main__", "__init__"},
]


def imports(path):
    """Dotted names imported anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_run_one_way():
    rank = {name: number for number, names in enumerate(ORDER) for name in names}
    for path in (ROOT / "osscl_min").rglob("*.py"):
        room = path.relative_to(ROOT / "osscl_min").parts[0].removesuffix(".py")
        assert room in rank, f"{path} has no place in the order"
        for name in imports(path):
            match = re.match(r"osscl_min\.(\w+)", name)
            if match and match[1] in rank:
                assert rank[match[1]] <= rank[room], f"{path} imports {match[1]}, which comes later"


def test_only_the_kernels_import_triton():
    for path in (ROOT / "osscl_min").rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "triton"], path
    for path in (ROOT / "kernels" / "osscl_kernels").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("osscl_min")], path


def test_kernels_need_only_torch_and_triton():
    allowed = {"torch", "triton", "osscl_kernels", "__future__"}
    for path in (ROOT / "kernels" / "osscl_kernels").glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, f"{path.name} imports {name}"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = "torch triton numpy scipy soundfile scikit-learn matplotlib tqdm tyro pooch".split()


def pins():
    text = (ROOT / "environment.yml").read_text()
    return [Requirement(line.strip()[2:]) for line in text.splitlines() if "==" in line]


def ranges(*extras):
    lines = [
        *PROJECT["dependencies"],
        *(line for name in extras for line in PROJECT["optional-dependencies"][name]),
    ]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def test_jupyter_and_pytest_are_extras():
    assert set(ranges()) == set(RUNTIME)
    assert set(ranges("notebooks")) == {*RUNTIME, "jupyter"}
    assert set(ranges("notebooks", "test")) == {*RUNTIME, "jupyter", "pytest"}
    assert str(ranges()["triton"].marker) == 'platform_system == "Linux"'


def test_pins_lie_within_the_ranges():
    admitted = ranges("notebooks", "test")
    pinned = {requirement.name: requirement for requirement in pins()}
    assert set(pinned) == set(admitted)
    for name, requirement in pinned.items():
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert admitted[name].specifier.contains(pin.version), f"{requirement} is outside {admitted[name]}"
        assert str(requirement.marker).replace('"', "'") == str(admitted[name].marker).replace('"', "'")


def test_every_package_is_in_the_distribution(tmp_path):
    """`pip install .` takes every folder with an __init__.py, the C++ file included."""
    program = (
        "from setuptools import Distribution; d = Distribution(); d.parse_config_files(); "
        "print(*d.packages, d.metadata.version)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    *packages, version = output.split()
    folders = [path.parent.relative_to(top) for top in (ROOT, ROOT / "kernels")
               for path in top.glob("os*/**/__init__.py")]  # fmt: skip
    assert set(packages) == {".".join(folder.parts) for folder in folders}
    assert version == __version__


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
