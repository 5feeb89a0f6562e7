"""Every public name of openai/consistency_models is here and takes its arguments, or docs/drop-in.md says why not and
what to use instead.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORIGINAL: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/data/original_api.json").read_text())
NAMES = [(module, name) for module, names in ORIGINAL.items() for name in names]
LEAST_PROVIDED = 110
ACCEPTED_KEYWORDS = {                                       # of functions that took **kwargs: what is passed by callers
    "load_state_dict": ("map_location",),
    "randn": ("dtype", "device"),
    "randint": ("dtype", "device"),
    "randn_like": (),
}


@functools.cache
def absent() -> dict[str, tuple[str, str]]:
    """The table of docs/drop-in.md: "module.name" or "module.Class.method" -> (reason, replacement)."""
    rows = {}
    for line in (ROOT / "docs/drop-in.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`"):
            module, names, reason, replacement = cells
            for name in names.split(","):
                rows[f"{module.strip('`')}.{name.strip().strip('`')}"] = reason, replacement
    return rows


def accepts(function: Callable[..., Any], spec: dict[str, Any], what: str) -> None:
    """The arguments of the original fit, by position and by keyword, and no other is needed."""
    signature = inspect.signature(function)
    args = spec["args"]
    bound = [name for name in args[:1] if name in ("self", "cls")]       # what a call does not spell
    named = args[len(bound):]
    required = [name for name in spec["required"] if name not in bound]
    check_open_arguments(signature, spec, what)
    if spec["var"]:
        assert set(named) | set(spec["kwonly"]) <= set(signature.parameters), what
        return
    least = dict.fromkeys(spec["kwonly_required"])
    signature.bind(*args, **least)
    signature.bind(*bound, **dict.fromkeys([*named, *spec["kwonly"]]))
    signature.bind(*bound, **dict.fromkeys(required), **least)


def check_open_arguments(signature: inspect.Signature, spec: dict[str, Any], what: str) -> None:
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if spec["var"]:
        assert inspect.Parameter.VAR_POSITIONAL in kinds or len(positional) > len(spec["args"]), what
    if spec["varkw"] and inspect.Parameter.VAR_KEYWORD not in kinds:
        assert set(ACCEPTED_KEYWORDS[what.rpartition(".")[2]]) <= set(signature.parameters), what


def is_absent(module: str, name: str) -> bool:
    return f"{module}.{name}" in absent()


@pytest.mark.parametrize("module, name", NAMES, ids=[f"{module}.{name}" for module, name in NAMES])
def test_a_name_of_the_original_is_here_or_explained(module: str, name: str) -> None:
    if is_absent(module, name):
        return
    found = getattr(importlib.import_module(module), name)
    spec = ORIGINAL[module][name]
    if spec["kind"] == "function":
        accepts(found, spec, f"{module}.{name}")
    elif spec["kind"] == "class":
        assert inspect.isclass(found)
        for method, its_spec in spec["methods"].items():
            if not is_absent(module, f"{name}.{method}"):
                attribute = inspect.getattr_static(found, method)
                is_wrapped = isinstance(attribute, (classmethod, staticmethod))
                function = attribute.__func__ if is_wrapped else attribute
                accepts(function, its_spec, f"{module}.{name}.{method}")


def test_enough_is_provided() -> None:
    provided = [f"{module}.{name}" for module, name in NAMES if not is_absent(module, name)]
    assert len(provided) >= LEAST_PROVIDED, len(provided)


def test_what_is_absent_has_a_reason_and_a_replacement() -> None:
    known = {f"{module}.{name}" for module, name in NAMES}
    known |= {
        f"{module}.{name}.{method}"
        for module, name in NAMES for method in ORIGINAL[module][name].get("methods", ())
    }
    for name, (reason, replacement) in absent().items():
        assert name in known, f"{name} is no name of the original: remove its row"
        assert len(reason) > 10 and len(replacement) > 3, name


MODULES = [module for module in ORIGINAL if module not in ("evaluations.evaluator", "evaluations.th_evaluator")]


@pytest.mark.parametrize("module", MODULES)
def test_a_compatibility_module_lists_what_it_offers(module: str) -> None:
    """Names with an underscore are for those who know them."""
    found = importlib.import_module(module)
    if module == "cm.random_util":                          # a module of the toolkit, not in front of one
        return
    listed = set(found.__all__)
    assert len(listed) == len(found.__all__) and all(hasattr(found, name) for name in listed)
    expected = {name for name in ORIGINAL[module] if not name.startswith("_") and not is_absent(module, name)}
    assert expected <= listed
