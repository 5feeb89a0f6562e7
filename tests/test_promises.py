"""Every promise of the pages stands in a table beside the test that breaks when the promise is broken.

tests/data/promises.tsv has a row for each: the page, a few words of it, and a test. Whoever rewords a promise updates
its row; whoever writes a new section lists what it promises, or writes no promise.
"""

import ast
import csv
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = "tests/data/promises.tsv"
# Lists of links, and pages whose numbers tests/test_doc_numbers.py compares with the files of their commands.
NOT_LISTED = {"docs/README.md", "docs/choosing.md", "docs/performance.md"}
PAGES = sorted({path.name for path in ROOT.glob("*.md")} | {"configs/README.md", "datasets/README.md"}
               | {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - NOT_LISTED)
# They promise nothing that a program could break.
WITHOUT_PROMISE = {("SECURITY.md", "Reporting a vulnerability")}

with (ROOT / TABLE).open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
QUOTES = sorted({(row["page"], row["quote"]) for row in ROWS})


def one_line(text: str) -> str:
    """The text with single spaces, so that words are found wherever a line breaks."""
    return " ".join(text.split())


@cache
def page(name: str) -> str:
    return one_line((ROOT / name).read_text(encoding="utf-8"))


def quotes_of(name: str) -> list[str]:
    return [quote for each, quote in QUOTES if each == name]


def sections(name: str) -> list[tuple[str, str]]:
    """Heading and text of what follows each heading of the second level; of the whole page where it has none."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", lambda block: block[0].replace("\n## ", "\n "), text, flags=re.DOTALL | re.MULTILINE)
    if name == "CHANGELOG.md":                              # older versions are history
        newest = re.split(r"^## ", text, flags=re.MULTILINE)[1]
        text = newest.replace("\n### ", "\n## ")
    _, *found = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    pairs = [(head, one_line(body)) for head, body in zip(found[::2], found[1::2]) if body.strip()]
    return pairs or [("", one_line(text))]


def marks_of_all(node: ast.AST) -> set[str]:
    """The marks in an expression, and `cuda` in a condition; those of a pytest.param concern one case of many."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.param":
        return set()
    own = {node.attr} if isinstance(node, ast.Attribute) else set()
    return own.union(*map(marks_of_all, ast.iter_child_nodes(node)))


@cache
def marked(name: str) -> dict[str, set[str]]:
    """The tests of a file, with the marks of each and those of the whole file."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    shared = set().union(*(marks_of_all(node.value) for node in tree.body if isinstance(node, ast.Assign)
                           and ast.unparse(node.targets[0]) == "pytestmark"))
    return {node.name: shared.union(*map(marks_of_all, node.decorator_list))
            for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def why_it_does_not_run(test: str) -> str:
    """Why `make test` never runs a test of the table; empty if it does."""
    file, _, function = test.partition("::")
    if not re.fullmatch(r"tests/[\w/]*test_\w+\.py", file) or not (ROOT / file).is_file():
        return "no such file"
    if function not in marked(file):
        return "no such function"
    return "it is slow or skipped" if marked(file)[function] & {"slow", "skip", "xfail", "cuda"} else ""


def test_the_table_is_in_order():
    assert all(set(row) == {"page", "quote", "test"} and all(row.values()) for row in ROWS)
    rows = [tuple(row.values()) for row in ROWS]
    assert len(set(rows)) == len(rows), "a row stands twice"
    assert all(quote == one_line(quote) and len(quote) >= 8 for _, quote in QUOTES)


def test_every_promise_stands_on_its_page():
    gone = [f"{name}: {quote}" for name, quote in QUOTES if quote not in page(name)]
    assert not gone, f"reworded or removed; update {TABLE}:\n" + "\n".join(gone)


def test_every_promise_has_a_test_that_runs():
    wrong = [f"{row['page']}: {row['quote']}: {row['test']}: {why_it_does_not_run(row['test'])}"
             for row in ROWS if why_it_does_not_run(row["test"])]
    assert not wrong, f"no test would notice; update {TABLE}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("test, reason", [
    ("tests/nowhere/test_a.py::test_b", "no such file"), ("cm/tensors.py::test_b", "no such file"),
    ("tests/test_promises.py::test_b", "no such function"), ("tests/test_promises.py::one_line", "no such function"),
    ("tests/system/test_slurm.py::test_torchrun_inside_a_task", "it is slow or skipped"),
    ("tests/system/test_two_nodes.py::test_mpiexec_and_torchrun_meet_where_no_host_has_a_known_name",
     "it is slow or skipped"),
    ("tests/checkpoints/test_manager.py::test_kills_while_saving", ""),
    ("tests/test_random_util.py::test_a_gpu_gets_the_values_of_the_cpu", "it is slow or skipped"),
    ("tests/test_promises.py::test_the_table_is_in_order", ""),
])
def test_a_test_that_would_not_notice_is_found(test, reason):
    assert why_it_does_not_run(test) == reason


@pytest.mark.parametrize("name", PAGES)
def test_every_section_has_a_promise(name):
    bare = [head for head, text in sections(name)
            if (name, head) not in WITHOUT_PROMISE and not any(quote in text for quote in quotes_of(name))]
    assert not bare, f"{name}: list in {TABLE} what these sections promise: {bare}"


def feature_lines(start: str, heading: str) -> list[str]:
    """Rows of a table, or bullets, of a section of docs/features.md."""
    text = (ROOT / "docs/features.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [one_line(item) for item in re.findall(rf"^{re.escape(start)}.*?(?=^{re.escape(start)}|^\n|\Z)", text,
                                                  re.DOTALL | re.MULTILINE)]


@pytest.mark.parametrize("start, heading", [
    ("| ", "What works today"), ("- ", "Training, sampling and evaluating your own images"),
])
def test_every_row_of_the_features_has_a_promise(start, heading):
    lines = [line for line in feature_lines(start, heading) if line.strip("| -")]
    assert len(lines) >= 4
    bare = [line[:60] for line in lines if not any(quote in line for quote in quotes_of("docs/features.md"))]
    assert not bare, f"list in {TABLE} what these lines promise: {bare}"
