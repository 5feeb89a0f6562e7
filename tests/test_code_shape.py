"""Functions stay short and take few arguments."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_ARGUMENTS = 60, 12

COMPATIBLE = {f"cm/{name}.py" for name in (
    "dist_util", "fp16_util", "image_datasets", "karras_diffusion", "logger", "losses", "nn", "resample",
    "script_util", "train_util", "unet",
)} | {"evaluations/compat.py"}
"""Modules under the names of openai/consistency_models, whose functions have its arguments."""

PUBLISHED: dict[str, str] = {}
"""Functions that keep a published list of arguments, and whose it is. They may have many arguments, not many lines."""

KNOWN: dict[str, tuple[int, int]] = {}
"""Functions that are too large today: lines, arguments. They may only shrink; an entry goes once it is not needed."""

SOURCES = sorted(
    path for folder in ("cm", "evaluations", "scripts", "datasets") for path in (ROOT / folder).rglob("*.py")
    if str(path.relative_to(ROOT)) not in COMPATIBLE
)


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Name, lines and arguments (without self and cls) of every function in a syntax tree, at any depth."""
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{getattr(child, 'name', '')}"
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
            yield name, child.end_lineno - child.lineno + 1, sum(arg.arg not in ("self", "cls") for arg in found)
        is_scope = isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        yield from functions(child, f"{name}." if is_scope else prefix)


def sizes(path: Path) -> dict[str, tuple[int, int]]:
    own = path.relative_to(ROOT)
    return {f"{own}:{name}": size for name, *size in functions(ast.parse(path.read_text()))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_small(path):
    for name, (lines, arguments) in sizes(path).items():
        max_lines, max_arguments = KNOWN.get(name, (MAX_LINES, MAX_ARGUMENTS))
        assert lines <= max_lines, f"{name} has {lines} lines, at most {max_lines}: split it"
        assert arguments <= max_arguments or name in PUBLISHED, (
            f"{name} takes {arguments} arguments, at most {max_arguments}: group them in a dataclass"
        )


def test_every_exception_is_needed():
    found = {name: size for path in SOURCES for name, size in sizes(path).items()}
    for name in KNOWN:
        lines, arguments = found.get(name, (0, 0))
        assert lines > MAX_LINES or arguments > MAX_ARGUMENTS, f"{name} is small enough: take it out of KNOWN"
    for name in PUBLISHED:
        assert name in found and found[name][1] > MAX_ARGUMENTS, f"{name} needs no exception: take it out of PUBLISHED"
