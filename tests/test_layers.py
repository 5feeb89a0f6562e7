"""Imports run down the layers: a file imports only from layers above it in this list, never from its own."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = [
    # what needs nothing of this house: errors, files, pictures
    ["registry", "torchvision_shim", "untrusted", "weight_files", "addresses", "pictures", "classifier_fit"],
    ["lpips", "interfaces", "forward_ad", "launch", "host_memory", "guard", "log_outputs", "vp", "image_labels",
     "compiling"],
    # ranks, logs, flags
    ["collectives", "stopping", "command"],
    ["logger", "dist_util", "flags", "schedules"],
    # the mathematics of one step, and what a run reads and writes
    ["nn", "curricula", "precond", "weightings", "distances", "resample", "random_util",
     "image_sources", "config", "meters", "shares", "sample_files", "line_plot", "schedule_search",
     "non_finite"],
    ["svg_plot", "run_records", "html_parts"],
    ["report_page"],
    # networks
    ["fp16_util", "norm_act", "cpu_attention", "averages", "optimizers"],
    ["attention"],
    ["raw_datasets", "png_folder", "durations", "ticks"],
    ["unet", "edm_networks", "augment"],
    ["samplers", "networks", "noisy_classifier"],
    # what is done with them: sample, edit, train
    ["editing", "objectives"],
    ["karras_diffusion", "image_datasets", "checkpoints", "memory_plan"],
    ["loop_state"],
    ["script_util", "train_loop", "sampling", "shared_stages", "score_ledger", "reference_images",
     "profiling"],
    # from flags to runs
    ["train_util", "run_data", "edit_util"],
    ["run_util"],
    ["sample_util"],
    ["watchers"],
]
LAYER = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}


def rooms_imported(path: Path) -> set[str]:
    """Names of the modules and packages of `cm` that a file imports, at any depth of its code."""
    found = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return {name.split(".")[1] for name in found if name.startswith("cm.") and name.split(".")[1] in LAYER}


CM_FILES = sorted((ROOT / "cm").rglob("*.py"))
ROOMS_OF_SCRIPTS = ("scripts", "evaluations", "datasets")


@pytest.mark.parametrize("path", CM_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_down_the_layers(path):
    room = path.relative_to(ROOT / "cm").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in LAYER, f"{path} has no layer: give it one in tests/test_layers.py"
    for imported in rooms_imported(path) - {room}:
        assert LAYER[imported] < LAYER[room], f"{room} (layer {LAYER[room]}) imports {imported} ({LAYER[imported]})"


def test_only_dist_util_imports_mpi():
    for path in [*CM_FILES, *(ROOT / "scripts").rglob("*.py"), *(ROOT / "evaluations").rglob("*.py")]:
        if path.name != "dist_util.py":
            assert "mpi4py" not in {name.split(".")[0] for name in absolute_imports(path)}, path


def test_evaluations_never_import_the_training_engine():
    for path in (ROOT / "evaluations").rglob("*.py"):
        # These read files, speak to ranks or fit a small classifier; none is the engine, and all is done in one way.
        assert rooms_imported(path) <= {"command", "dist_util", "logger", "registry", "flags", "image_sources",
                                        "untrusted", "weight_files", "classifier_fit"}, path


def test_every_foreign_package_is_one_that_setup_declares():
    distributions = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
    own = {"cm", "evaluations", *sys.stdlib_module_names}
    declared = (ROOT / "setup.py").read_text()
    for path in [*CM_FILES, *(file for room in ROOMS_OF_SCRIPTS for file in (ROOT / room).rglob("*.py"))]:
        for package in {name.split(".")[0] for name in absolute_imports(path)} - own:
            assert f'"{distributions.get(package, package)}>=' in declared, f"{path} imports {package}"


def absolute_imports(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} | {
        node.module for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    }
