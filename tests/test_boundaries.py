"""What may import what: placement knows no jax, dancemoe_jax knows neither placement nor launch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT


def imported(file: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("placement", {"jax", "jaxlib", "flax", "optax", "orbax", "dancemoe_jax", "launch"}),
        ("dancemoe_jax", {"placement", "launch", "argparse", "socket", "logging"}),
    ],
)
def test_package_imports_nothing_it_must_not(package, forbidden):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & forbidden, file


@pytest.mark.parametrize(
    "statement", ["import placement", "import placement.__main__", "import launch.migration.planner_process"]
)
def test_importing_what_plans_loads_no_jax(statement):
    code = f"{statement}, sys; sys.exit(any(m.split('.')[0] in ('jax', 'flax', 'scipy') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_clocks_environment_and_arguments_stay_in_launch():
    for package in ("placement", "dancemoe_jax"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if file.name != "__main__.py":
                source = file.read_text(encoding="utf-8")
                assert "os.environ" not in source, file
                assert "nnx.jit" not in source, file
