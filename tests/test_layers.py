"""The order of the packages: imports run down, and only certain places know certain libraries."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = [
    ["errors", "types", "tensors"],
    ["registry"],
    ["io", "random_util"],
    ["diffusion", "distributed", "report"],
    ["logging"],
    ["networks", "data", "config"],
    ["samplers", "checkpoints"],
    ["objectives", "evaluations"],
    ["generate"],
    ["training"],
    ["setup"],
    ["pipeline", "quickstart"],
]
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
COMPATIBLE = {"dist_util", "fp16_util", "image_datasets", "image_sources", "karras_diffusion", "logger", "losses", "nn",
              "resample", "script_util", "train_util", "unet"}
"""Modules of openai/consistency_models: nothing of the toolkit imports them, and they may import all of it."""

SOURCES = sorted([*(ROOT / "cm").rglob("*.py"), *(ROOT / "evaluations").rglob("*.py")])


def unit(module: str) -> str:
    """The package or top module that a dotted name belongs to."""
    first, _, rest = module.partition(".")
    return first if first == "evaluations" else rest.partition(".")[0]


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, at any depth of its code; it imports nothing relative."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> str:
    return unit(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down(path):
    name = own(path)
    if name in COMPATIBLE or name == "__init__":
        return
    assert name in LAYER, f"{name} has no layer: give it one in tests/test_layers.py"
    for module in imported(path):
        other = unit(module)
        if module.startswith(("cm.", "evaluations.")) and other != name:
            assert other in LAYER, f"{path} imports {module}"
            assert LAYER[other] < LAYER[name], f"{name} (layer {LAYER[name]}) imports {other} ({LAYER[other]})"


def test_no_modules_import_each_other():
    """Inside a package, too; a package's own table may list its modules."""
    edges = {}
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        edges[module] = {other for name in imported(path) for other in (name, name.rpartition(".")[0])}
    edges = {module: {other for other in others if other in edges} - {module} for module, others in edges.items()}

    def walk(module, above):
        assert module not in above, f"a circle: {' -> '.join([*above[above.index(module):], module])}"
        for other in edges.pop(module, ()):
            walk(other, [*above, module])

    for module in list(edges):
        walk(module, [])


def test_cm_itself_holds_compatible_modules_and_the_lowest_layers():
    modules = {path.stem for path in (ROOT / "cm").glob("*.py")} - {"__init__"}
    assert len(modules) <= 18
    assert modules <= COMPATIBLE | {"errors", "types", "tensors", "registry", "random_util"}


def test_every_package_says_its_job():
    for path in [*(ROOT / "cm").rglob("__init__.py"), *(ROOT / "evaluations").rglob("__init__.py")]:
        assert ast.get_docstring(ast.parse(path.read_text())), path
    for folder in {path.parent for path in SOURCES}:
        assert (folder / "__init__.py").exists(), folder


def test_every_module_says_its_job():
    silent = [str(path.relative_to(ROOT)) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent, f"no docstring whose first line says the job: {silent}"


@pytest.mark.parametrize("loop, package, known", [
    ("cm/training/loop.py", "cm.objectives.", {"cm.objectives.base"}),
    ("cm/samplers/integrate.py", "cm.samplers.", set()),
])
def test_the_loops_know_no_method(loop, package, known):
    assert {name.rpartition(".")[0] for name in imported(ROOT / loop) if name.startswith(package)} <= known


def test_only_the_rendezvous_imports_mpi():
    for path in [*SOURCES, *(ROOT / "scripts").rglob("*.py")]:
        if path != ROOT / "cm/distributed/rendezvous.py":
            assert "mpi4py" not in {name.partition(".")[0] for name in imported(path)}, path


def test_evaluations_never_import_the_training_engine():
    for path in (ROOT / "evaluations").rglob("*.py"):
        units = {unit(name) for name in imported(path) if name.startswith("cm.")}
        assert not units & {"training", "generate", "objectives", "setup", "checkpoints"}, path


def test_every_foreign_package_is_declared():
    distributions = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
    declared = (ROOT / "pyproject.toml").read_text()
    commands = [path for folder in ("scripts", "datasets") for path in (ROOT / folder).rglob("*.py")]
    for path in [*SOURCES, *commands]:
        foreign = {name.partition(".")[0] for name in imported(path)}
        for package in foreign - {"cm", "evaluations", *sys.stdlib_module_names}:
            assert f'"{distributions.get(package, package)}>=' in declared, f"{path} imports {package}"


def test_only_storage_imports_blobfile():
    """Retries, time-outs and messages of object stores are set in one place."""
    commands = [path for folder in ("scripts", "datasets") for path in (ROOT / folder).rglob("*.py")]
    for path in [*SOURCES, *commands]:
        if path != ROOT / "cm/io/storage.py":
            assert "blobfile" not in {name.partition(".")[0] for name in imported(path)}, path


def test_every_direct_requirement_has_a_pin():
    """`make install` installs versions that are known to work together."""
    tomllib = pytest.importorskip("tomllib", reason="no tomllib: Python has it from 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("mpi", "demo", "tf", "webdataset", "latents", "test")]
    direct = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    pins = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for requirement in direct:
        name = re.split(r"[\[>=]", requirement)[0]
        assert name == project["name"] or name.lower() in pins, f"{requirement} has no pin in constraints.txt"
