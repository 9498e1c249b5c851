"""What the folders promise: which package may import what, one direction inside each package, no circle, sizes, words.

`.github/CONTRIBUTING.md` draws the same order for readers.
"""

import ast
import functools
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGES = ("placement", "dancemoe_jax", "launch")
# From the outside in: a module imports only modules of lines further down, or of its own folder. A name stands for a module
# or for a folder; the longest that fits counts, so a folder's own line does not cover its subfolders' that have one.
ORDER = {
    "placement": """
        __main__
        commands
        __init__
        planner
        registry
        strategies.latency
        strategies.exact
        strategies
        simulation
        simulation.independent simulation.lockstep
        migration engines
        costs
        data scheduling
        files units version text_table
    """,
    "dancemoe_jax": """
        __init__
        training
        inference
        expert_parallel
        checkpoint
        text
        model
        kernels
        arguments
        mesh files errors huge_pages
    """,
    "launch": """
        __main__
        commands bench demo
        bench.harness
        http
        serve
        elastic
        migration
        engine
        cluster
        model_flags corpus
        __init__ arguments log
    """,
}
LONGEST_FUNCTION, LONGEST_MODULE = 60, 350
RETIRED = {  # words of earlier versions, each with the field's own
    "deal": "shard",
    "mend": "repair",
    "polish": "local search",
    "toll": "penalty",
    "loyal": "tie-break",
    "crowding": "contention",
    "Tally": "StepCounters",
    "TextStream": "IncrementalDetokenizer",
    "TextCodec": "TokenizerBundle",
    "hear": "on_token",
    "heard": "received",
    "nap": "sleep",
    "rung": "woken",
    "meeting": "rendezvous",
    "guest": "client",
    "hello": "handshake",
    "World": "ProcessGroup",
    "regroup": "re-form",
    "Mover": "MigrationWorker",
    "normalise": "normalize",
    "quantise": "quantize",
}
HARD = ("had better", "of no account", "whoever", "where they have met")


@functools.cache
def sources(package: str) -> dict[str, Path]:
    """Files of a package by module, without the package's own name: "commands.plan"; "__init__" is the package itself."""
    root = ROOT / package
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])
        found[name] = file
    return found


def imports(file: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it: modules, and what is taken out of them."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def edges(package: str) -> set[tuple[str, str]]:
    """(module, module of the same package that it imports)."""
    modules = sources(package)
    found = set()
    for name, file in modules.items():
        for imported in imports(file):
            if imported == package or imported.startswith(f"{package}."):
                parts = imported.split(".")[1:]
                while parts and ".".join(parts) not in modules:
                    parts.pop()
                found.add((name, ".".join(parts) or "__init__"))
    return found


def layer(package: str, module: str) -> int:
    """Number of the module's line in ORDER."""
    lines = {name: i for i, line in enumerate(ORDER[package].strip().splitlines()) for name in line.split()}
    parts = module.split(".")
    while parts:
        if ".".join(parts) in lines:
            return lines[".".join(parts)]
        parts.pop()
    pytest.fail(f"{package}/{module}: in no line of ORDER; say where it belongs")


def folder(package: str, module: str) -> Path:
    return sources(package)[module].parent


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("placement", {"jax", "jaxlib", "flax", "optax", "orbax", "dancemoe_jax", "launch"}),
        ("dancemoe_jax", {"placement", "launch", "argparse", "socket"}),
    ],
)
def test_package_imports_nothing_it_must_not(package, forbidden):
    files = sources(package).values()
    assert files
    for file in files:
        assert not {name.split(".")[0] for name in imports(file)} & forbidden, file


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    against = [
        f"{package}.{one} imports {package}.{other}"
        for one, other in sorted(edges(package))
        if folder(package, one) != folder(package, other) or "__init__" in (one, other)
        if layer(package, one) >= layer(package, other)
    ]
    assert not against


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_make_no_circle(package):
    left = {name: {other for one, other in edges(package) if one == name} - {name} for name in sources(package)}
    while done := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in done}
    assert not left, "these import each other, or are imported by such"


@pytest.mark.parametrize(
    "statement",
    [
        "import placement",
        "import placement.__main__",
        "import launch.migration.planner_process",
        "import dancemoe_jax.text.tokenizer",
        "import launch.commands.serve",
        "import launch.http.run",
    ],
)
def test_importing_what_plans_or_opens_the_door_loads_no_jax(statement):
    code = f"{statement}, sys; sys.exit(any(m.split('.')[0] in ('jax', 'flax', 'scipy') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_clocks_environment_and_arguments_stay_in_launch():
    for package in ("placement", "dancemoe_jax"):
        for name, file in sources(package).items():
            if name != "__main__":
                source = file.read_text(encoding="utf-8")
                assert "os.environ" not in source, file
                assert "nnx.jit" not in source, file


def test_private_jax_is_in_one_module():
    users = [
        file for package in PACKAGES for file in sources(package).values() if "jax._src" in file.read_text("utf-8")
    ]
    assert users == [ROOT / "launch/cluster/jax_runtime.py"]


def test_benchmarks_and_demo_are_imported_by_nothing_that_serves():
    for one, other in edges("launch"):
        if other.startswith(("bench", "demo")):
            assert one.startswith(("bench", "demo")) or one == "__main__", f"{one} imports {other}"


def python_files() -> list[Path]:
    return [file for package in (*PACKAGES, "tests") for file in sorted((ROOT / package).rglob("*.py"))]


def test_no_function_and_no_module_is_too_long():
    long = []
    for file in python_files():
        if "fixtures" in file.parts:
            continue
        text = file.read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > LONGEST_MODULE and "tests" not in file.relative_to(ROOT).parts:
            long.append(f"{file.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    long.append(f"{file.relative_to(ROOT)}: {node.name}: {length} lines")
    assert not long


def words(file: Path) -> set[str]:
    """Names and words of a file, names cut at underscores."""
    text = file.read_text(encoding="utf-8")
    whole = set(re.findall(r"[A-Za-z_]+", text))
    return whole | set(itertools.chain.from_iterable(word.split("_") for word in whole))


def test_retired_words_are_gone():
    found = [
        f"{file.relative_to(ROOT)}: {word!r}; say {RETIRED[word]!r}"
        for file in python_files()
        if file != Path(__file__) and "fixtures" not in file.parts
        for word in sorted(words(file) & RETIRED.keys())
    ]
    found += [
        f"{file.relative_to(ROOT)}: {phrase!r} is hard to read"
        for file in (*python_files(), *ROOT.glob("*.md"), *(ROOT / package / "README.md" for package in PACKAGES))
        if file != Path(__file__) and file.exists()
        for phrase in HARD
        if phrase in " ".join(file.read_text(encoding="utf-8").split())
    ]
    assert not found


def test_the_formatter_decides():
    skipped = [
        str(file) for file in python_files() if "# fmt: skip" in file.read_text("utf-8") and file != Path(__file__)
    ]
    assert len(skipped) < 5


def test_json_and_lines_have_one_reader():
    """With limits on size, depth and numbers (placement.files), and lines that end at a newline alone."""
    found = [
        f"{path.relative_to(ROOT)}: line {node.lineno}: {ast.unparse(node.func)}"
        for package in ("placement", "launch")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path != ROOT / "placement" / "files.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (ast.unparse(node.func) in ("json.loads", "json.load") or node.func.attr == "splitlines")
    ]
    assert not found, "use placement.files: parse_json, read_json, read_lines"
