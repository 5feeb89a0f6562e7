"""Whatever is skipped says why, and nothing is expected to fail."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def words_of(call: ast.Call) -> str:
    """What a call says first, or as its reason; empty if that is nothing."""
    named = [word.value for word in call.keywords if word.arg == "reason"]
    for value in [*named, *call.args]:
        if not isinstance(value, ast.Constant) or (isinstance(value.value, str) and value.value.strip()):
            return ast.unparse(value)
    return ""


def faults(source: str) -> list[str]:
    """Marks and calls that skip without a reason, or expect a failure, anywhere in a text."""
    tree, found = ast.parse(source), []
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in ("xfail", "XFAIL"):
            found.append(f"line {node.lineno}: {name}")
        elif name in ("skip", "skipif", "importorskip") and "pytest" in ast.unparse(node):
            call = called.get(id(node))
            has_reason = call is not None and (
                bool(words_of(call)) if name == "skip" else any(word.arg == "reason" for word in call.keywords)
                and bool(words_of(ast.Call(call.func, [], call.keywords)))
            )
            if not has_reason:
                found.append(f"line {node.lineno}: {ast.unparse(call or node)}")
    return found


def test_every_skip_has_its_reason():
    found = {str(path.relative_to(TESTS)): faults(path.read_text()) for path in sorted(TESTS.rglob("*.py"))}
    assert not {path: lines for path, lines in found.items() if lines}, "give a reason=, naming what is missing"


@pytest.mark.parametrize("source", [
    "@MARK.SKIP\ndef test(): ...", "@MARK.SKIP()\ndef test(): ...", "pytest.SKIP()", "pytest.SKIP('')",
    "pytest.SKIP(reason=' ')", "MARK.SKIPif(x)", "MARK.SKIPif(x, reason='')", "x = pytest.importorSKIP('a')",
    "pytest.param(1, marks=MARK.SKIP)", "pytest.param(1, marks=[MARK.SKIPif(x, reason='')])",
    "MARK.xfail(reason='some day')", "pytest.xfail('some day')", "from pytest import xfail\nxfail('x')",
])
def test_a_skip_without_a_reason_is_found_in_any_spelling(source):
    """Spelled here so that nobody who searches for such marks finds these."""
    assert len(faults(source.replace("MARK", "pytest.mark").replace("SKIP", "skip"))) == 1


@pytest.mark.parametrize("source", [
    "pytest.skip('no GPU')", "pytest.skip(reason=f'no {x}')", "pytest.mark.skipif(x, reason=why())",
    "pytest.importorskip('a', reason=WHY)", "def skip(block): ...\nskip(1)", "network.skip()",
])
def test_a_skip_with_its_reason_and_other_things_of_that_name_are_none(source):
    assert not faults(source)
