"""What every file of Triton kernels keeps to, read from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from emo_kernels import backends

FOLDER = Path(backends.__file__).parent / "triton"
FILES = sorted(FOLDER.glob("*.py"))
SOURCES = {path.name: path.read_text() for path in FILES}
WITH_KERNELS = [name for name, source in SOURCES.items() if "@triton.jit" in source]
LAUNCHERS = [n for n in SOURCES if n not in ("tune.py", "resources.py")]  # these two may wait

HEADINGS = ("Computes", "Tiling", "Traffic", "Numerics", "Limits")
PROGRAM_ID = r"tl\.program_id\(\s*(?:axis\s*=\s*)?\d\s*\)(?!\s*\.to\(tl\.int64\))"
BANNED = {
    PROGRAM_ID: "widen program ids to int64 before anything is multiplied",
    r"\btl\.atomic_": "sums are added in a fixed order: the same bits on every run",
    r"\b(inline_asm|libdevice|extern_elementwise)": "not in the interpreter",
    r"\bmake_block_ptr\b": "gone in triton 3.9",
    r"\btriton\.autotune\b": "nothing tunes in a forward",
    r"\bdriver\.active\b": "raises where there is no GPU",
}
WAITS = {
    r"\.(item|cpu|tolist|numpy|nonzero)\(": "waits for the GPU",
    r"\bsynchronize\(": "waits for the GPU",
    r"\b(float|int)\((?!needed)\w+\[": "an element of a tensor waits for the GPU",
}


def found(source: str, patterns: dict[str, str]) -> list[str]:
    """Lines of code, comments and docstrings apart, that match a pattern."""
    code = ast.unparse(_without_docstrings(ast.parse(source)))
    return [
        f"{match.group()}: {why}"
        for pattern, why in patterns.items()
        for match in re.finditer(pattern, code)
    ]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            node.body = [s for s in node.body if not _is_text(s)] or [ast.Pass()]
    return tree


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def kernels(source: str) -> Iterator[ast.FunctionDef]:
    """Functions that a launcher may launch: compiled by Triton, under a name that says so."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
            yield node


def unbounded_narrowing(source: str) -> list[str]:
    """``.to(tl.int32)`` of what may be as large as a map: no remainder, difference or minimum."""
    wrong = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        assigned = [n for n in ast.walk(function) if isinstance(n, ast.Assign)]
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node).endswith(".to(tl.int32)"):
                assert isinstance(node.func, ast.Attribute)
                if not _is_bounded(node.func.value, assigned):
                    wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    return wrong


def _is_bounded(value: ast.expr, assigned: list[ast.Assign]) -> bool:
    for node in ast.walk(value):
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mod, ast.Sub, ast.BitAnd)):
            return True
        if isinstance(node, ast.Compare) or ast.unparse(node).startswith("tl.minimum("):
            return True
    if not isinstance(value, ast.Name):
        return False
    sources = [a.value for a in assigned if value.id in ast.unparse(a.targets[0])]
    return any(_is_bounded(s, []) for s in sources)


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_banned(name: str) -> None:
    assert not found(SOURCES[name], BANNED)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_do_not_wait_for_the_gpu(name: str) -> None:
    assert not found(SOURCES[name], WAITS)


@pytest.mark.parametrize("name", SOURCES)
def test_offsets_stay_in_64_bits(name: str) -> None:
    assert not unbounded_narrowing(SOURCES[name])


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_every_file_of_kernels_says_what_it_does(name: str) -> None:
    """Computes, tiling, traffic, numerics, limits, in this order, each with some text."""
    text = ast.get_docstring(ast.parse(SOURCES[name])) or ""
    present = re.findall(rf"^({'|'.join(HEADINGS)}): *\S", text, re.MULTILINE)
    if any(kernels(SOURCES[name])):
        assert tuple(present) == HEADINGS
    assert text


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_kernels_are_named_for_their_operation(name: str) -> None:
    for kernel in kernels(SOURCES[name]):
        assert re.fullmatch(r"_[a-z0-9_]+_kernel", kernel.name), kernel.name


@pytest.mark.parametrize("name", SOURCES)
def test_no_autotuner_and_no_network_at_import(name: str) -> None:
    """An import defines; it looks at no device."""
    for node in ast.parse(SOURCES[name]).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert "torch.cuda" not in ast.unparse(node), ast.unparse(node)


def test_the_rules_find_what_they_are_for() -> None:
    for line in (
        "pid = tl.program_id(0)",
        "pid = tl.program_id(axis=1) * BLOCK",
        "tl.atomic_add(p, x)",
        "y = tl.inline_asm_elementwise(a)",
    ):
        assert found(line, BANNED), line
    for line in ("n = x.item()", "n = float(sums[0])", "torch.cuda.synchronize()", "x.cpu()"):
        assert found(line, WAITS), line
    assert not found("'''tl.atomic_add(p, x)'''\npid = tl.program_id(0).to(tl.int64)", BANNED)
    for body, bad in (
        ("rows = (pid * BLOCK).to(tl.int32)", True),
        ("rows = pid.to(tl.int32)", True),
        ("tile = (pid % TILES).to(tl.int32)", False),
        ("tile = pid % TILES\n    at = tile.to(tl.int32) * 2", False),
        ("within = (first - image * HW).to(tl.int32)", False),
        ("left = tl.minimum(P - first, BLOCK).to(tl.int32)", False),
    ):
        assert bool(unbounded_narrowing(f"def f(pid):\n    {body}\n")) == bad, body
