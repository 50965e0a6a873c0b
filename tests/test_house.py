"""The rules of the house: imports run one way, and the two lists of packages agree."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from osscl_min.report.update import fill

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
    {"report"},
    {"bench", "bench_model", "bench_train", "bench_data", "bench_score", "textbook"},
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
    import sys

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


def pins():
    text = (ROOT / "environment.yml").read_text()
    return [Requirement(line.strip()[2:]) for line in text.splitlines() if "==" in line]


def ranges():
    return [
        Requirement(line)
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]


def test_pins_lie_within_the_ranges():
    admitted = {requirement.name: requirement for requirement in ranges()}
    pinned = {requirement.name: requirement for requirement in pins()}
    assert set(pinned) == set(admitted)
    for name, requirement in pinned.items():
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert admitted[name].specifier.contains(pin.version), f"{requirement} is outside {admitted[name]}"
        assert str(requirement.marker).replace('"', "'") == str(admitted[name].marker).replace('"', "'")


def test_readme_lists_every_dependency():
    text = (ROOT / "README.md").read_text()
    for requirement in ranges():
        assert f"| {requirement.name} " in text, f"{requirement.name} is not in the README's dependency table"


@pytest.mark.parametrize("document", ["README.md", "kernels/README.md"])
def test_generated_numbers_are_those_of_results(document):
    text = (ROOT / document).read_text()
    assert "<!-- generated from" in text
    assert fill(ROOT / document) == text, "run: python -m osscl_min readme"


@pytest.mark.parametrize("folder", ["osscl_min", "kernels", "tests", "notebooks", ".ci"])
def test_no_absolute_path_of_a_machine(folder):
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in (".py", ".ipynb", ".md", ".sh") or path.name == "run":
            found = re.findall(r"""["'\s=](/(?:home|root|work|Users|tmp)/[^"'\s]*)""", path.read_text())
            assert not found, f"{path}: {found}"
