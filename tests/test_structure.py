"""The house keeps its order: imports point down, one stem names an operator, files stay short."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sanitized
from cases import STEMS

from emo_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "emo_kernels"

# From the ground up. A module imports its own layer's package and lower layers only.
LAYERS = (
    ("_C", "spec"),
    ("reference", "cpu", "triton", "cuda"),
    ("backends",),
    ("ops",),
    ("nn",),
    ("structure", "swap", "watch", "graphs", "stem", "train_stem", "tail", "sequence", "link")
    + ("train_block", "integrations", "models", "explain", "accelerate"),
    ("measure",),
    ("cli", "__main__", "__init__"),
)
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
BACKENDS = LAYERS[1]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def unit_of(path: Path) -> str:
    """The part of the package that a file belongs to: a module or a folder right below it."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of emo_kernels that a file imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the layer"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def upward_imports(source: str, unit: str) -> list[str]:
    """What a file of ``unit`` imports from its own layer's other units or from above."""
    wrong = []
    for line, name in imported(ast.parse(source)):
        parts = name.split(".")
        if parts[0] != "emo_kernels" or len(parts) < 2:
            continue
        other = parts[1] if parts[1] in LAYER else "__init__"
        if other == unit:
            continue
        same_layer = LAYER[other] == LAYER[unit] and unit in BACKENDS
        if LAYER[other] > LAYER[unit] or same_layer:
            wrong.append(f"line {line}: {unit} imports {name}")
    return wrong


@pytest.mark.parametrize(
    "path", python_files("emo_kernels"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    assert unit in LAYER, f"{unit} has no layer: add it to LAYERS"
    assert not upward_imports(path.read_text(), unit)


def test_an_upward_import_would_be_found() -> None:
    for unit, source in (
        ("reference", "from emo_kernels import ops"),
        ("reference", "from emo_kernels.ops.expand import expand"),
        ("cpu", "from emo_kernels.reference import expand"),
        ("cpu", "import emo_kernels.triton"),
        ("ops", "def f():\n    from emo_kernels.nn import iRMB"),
        ("spec", "from emo_kernels import __version__"),
        ("nn", "from emo_kernels import accelerate"),
        ("measure", "from emo_kernels.cli.options import settings"),
    ):
        assert upward_imports(source, unit), (unit, source)
    for unit, source in (
        ("cpu", "from emo_kernels import _C"),
        ("ops", "from emo_kernels import backends"),
        ("nn", "from emo_kernels import ops\nfrom emo_kernels.spec import IRMBSpec"),
        ("cli", "import emo_kernels"),
    ):
        assert not upward_imports(source, unit), (unit, source)


@pytest.mark.parametrize("folder", ["emo_kernels", "csrc", "python"])
def test_nothing_imports_tests_or_benchmarks(folder: str) -> None:
    ours = {path.stem for path in python_files("tests", "bench")} - {"__init__", "conftest"}
    ours -= {path.stem for path in python_files("emo_kernels")}
    for path in python_files(folder):
        for line, name in imported(ast.parse(path.read_text())):
            assert name.split(".")[0] not in ours | {"tests", "bench"}, f"{path}:{line}: {name}"


def test_files_stay_short() -> None:
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh", ".pyi"}
    folders = ("emo_kernels", "csrc", "python", "tests", "bench")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes]
    assert len(files) > 30
    long = {
        str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 500
    }
    assert not long


def test_what_make_sanitize_runs_exists() -> None:
    """A test renamed would leave pytest nothing to run, minutes of compiling later."""
    for name in sanitized.SHARE:
        file, *path = name.split("::")
        found = importlib.import_module(file.removesuffix(".py"))
        for part in path:
            assert hasattr(found, part), name
            found = getattr(found, part)


@pytest.mark.parametrize("operator", STEMS)
def test_one_stem_names_every_file_of_an_operator(operator: str) -> None:
    for place in ("emo_kernels/ops", "emo_kernels/reference"):
        assert (ROOT / place / f"{operator}.py").is_file(), f"{place} lacks {operator}.py"
        exported = importlib.import_module(place.replace("/", ".")).__all__
        assert operator in exported, f"{place} does not export {operator}"
    test = ROOT / "tests" / f"test_{operator}.py"
    assert f'operator = "{operator}"' in test.read_text()


# What a training step of the whole block needs beside the operators.
PIECES = {"batch_norm", "expand_depthwise", "squeeze"}
_ROLES = (
    "(_unsupported|_backward|_bind|_statistics|_with_maps|_training|_sums|_finalize|_activate)+$"
)


def test_every_stem_of_a_backend_is_an_operator() -> None:
    """A kernel without contract, reference and test has no way into the package."""
    stems = {path.stem for path in (PACKAGE / "ops").glob("*.py")}
    stems -= {"__init__", "checks", "registration"}
    stems -= {"irmb_step", "irmb_training", "conv_norm_act_training"}
    assert stems == set(STEMS) | PIECES
    for name in backends.NAMES:
        if backends.unavailable(name) is None:
            namespace = importlib.import_module(f"emo_kernels.{name}")
            for public in namespace.__all__:
                stem = re.sub(_ROLES, "", public)
                assert stem in stems, f"emo_kernels.{name}.{public} is no operator"


@pytest.mark.parametrize("name", backends.NAMES)
def test_every_backend_has_a_say(name: str) -> None:
    """Usable here, or skipped with the reason that the user would read."""
    reason = backends.available_backends()[name]
    if reason is not None:
        assert len(reason) > 10
        pytest.skip(f"{name}: {reason}")
    assert any(backends.has(name, operator) for operator in STEMS)
