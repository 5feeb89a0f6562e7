"""A module's test is found by its name: cm/samplers/ddim.py has tests/samplers/test_ddim.py.

evaluations/ keeps its own name below tests/: evaluations/metrics/kid.py has tests/evaluations/metrics/test_kid.py.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ELSEWHERE = {
    # Modules of openai/consistency_models, and what only a command shows.
    **{f"cm/{name}.py": "test_compatible_functions.py" for name in (
        "fp16_util", "image_datasets", "logger", "losses", "nn", "resample", "unet",
    )},
    "cm/dist_util.py": "distributed/test_setup.py",
    "evaluations/inception_v3.py": "evaluations/features/test_inception_v3.py",
    "cm/samplers/functions.py": "test_compatible_functions.py",
    "cm/objectives/karras_denoiser.py": "test_karras_diffusion.py",
    "cm/generate/schedule_scorer.py": "scripts/test_ternary_search.py",
    "cm/distributed/devices.py": "distributed/test_setup.py",
    "cm/distributed/fsdp.py": "training/test_engine.py",
    "cm/distributed/process_exit.py": "distributed/test_setup.py",
    "cm/distributed/rendezvous.py": "distributed/test_setup.py",
    "cm/checkpoints/leftovers.py": "checkpoints/test_manifest.py",
    "cm/checkpoints/formats/diffusers.py": "scripts/test_convert_checkpoint.py",
    "cm/config/early_exit.py": "system/test_start_up.py",
    "cm/checkpoints/formats/pickled_numbers.py": "checkpoints/formats/test_edm_pickle.py",
    "cm/data/destinations.py": "datasets/test_dataset_tool.py",
    "cm/data/labelled.py": "datasets/test_encode.py",
    **{f"cm/data/{name}.py": "datasets/test_dataset_tool.py" for name in ("cifar10", "mnist", "raw", "raw_images")},
    "cm/generate/edit_tasks.py": "scripts/test_image_edit.py",
    "cm/generate/edit_inputs.py": "scripts/test_image_edit.py",
    "cm/pipeline/loading.py": "pipeline/test_pipeline.py",
    "cm/pipeline/pictures.py": "pipeline/test_pipeline.py",
    "cm/setup/export.py": "scripts/test_convert_checkpoint.py",
    "cm/setup/network.py": "setup/test_guide.py",
    "cm/setup/rules.py": "system/test_methods.py",
    "cm/setup/sampler.py": "setup/test_sample.py",
    "evaluations/command.py": "evaluations/test_evaluator.py",
    "evaluations/defaults.py": "system/test_start_up.py",
    "evaluations/flags.py": "system/test_start_up.py",
    "evaluations/in_training.py": "training/test_callbacks.py",
    "evaluations/report.py": "evaluations/test_evaluator.py",
    "cm/data/image_source.py": "data/test_sources.py",
    "cm/data/random_access.py": "data/test_sources.py",
    "cm/data/formats/folder.py": "data/test_sources.py",
    "cm/data/formats/zip_archive.py": "data/test_sources.py",
    # One of several that the same tests go through.
    "cm/config/schema.py": "config/test_flags.py",
    "cm/config/objective_schema.py": "config/test_flags.py",
    "cm/config/sampling_schema.py": "config/test_flags.py",
    "cm/training/master_weights.py": "training/test_mixed_precision.py",
    "cm/config/parser.py": "config/test_flags.py",
    "cm/config/config_file.py": "config/test_flags.py",
    "cm/config/console.py": "system/test_wheel.py",
    "cm/config/plugins.py": "test_extending.py",
    "cm/data/labels.py": "data/test_sources.py",
    "cm/data/order.py": "data/test_loader.py",
    **{f"cm/logging/{name}.py": "logging/test_logger.py" for name in (
        "csv_rows", "files", "json_lines", "tables", "writers",
    )},
    "cm/networks/build.py": "test_drop_in.py",
    "cm/networks/classifier_fit.py": "evaluations/features/test_classifier.py",
    "cm/networks/edm/song_unet.py": "networks/edm/test_base.py",
    "cm/networks/noisy_classifier.py": "samplers/test_guidance.py",
    "cm/networks/unet_blocks.py": "networks/test_unet.py",
    "cm/objectives/base.py": "objectives/test_objectives.py",
    **{f"cm/report/{name}.py": "report/test_page.py" for name in ("figures", "named_runs", "names", "tables")},
    "cm/samplers/base.py": "samplers/test_integrate.py",
    "cm/samplers/dpm.py": "samplers/test_euler.py",
    "cm/samplers/euler_maruyama.py": "samplers/test_ito_taylor.py",
    "cm/samplers/heun.py": "samplers/test_euler.py",
    "cm/samplers/onestep.py": "samplers/test_samplers.py",
    "cm/samplers/progdist.py": "samplers/test_samplers.py",
    "cm/training/classifier.py": "samplers/test_guidance.py",
    "cm/training/pieces.py": "training/test_engine.py",
    "cm/training/config.py": "system/test_two_trained_networks.py",
    "cm/training/trained_network.py": "system/test_two_trained_networks.py",
    "evaluations/features/base.py": "evaluations/features/test_torchscript.py",
    "evaluations/features/graph_constants.py": "evaluations/features/test_tf_graph.py",
    "evaluations/features/inception.py": "evaluations/features/test_inception_v3.py",
    "evaluations/features/inception_files.py": "io/test_downloads.py",
    "evaluations/features/inception_weights.py": "evaluations/features/test_inception_v3.py",
    "evaluations/metrics/base.py": "evaluations/engine/test_new_metric.py",
    "evaluations/metrics/class_accuracy.py": "evaluations/test_evaluator.py",
}
"""Module -> its test below tests/, for the few that are not found by their name."""

COMPATIBLE = "openai/consistency_models' `"
"""How the first line begins of a module that has the original's name: test_compatibility.py tests them together."""

BY_THE_COMMANDS = {"evaluations/engine": "evaluations/test_evaluator.py"}
"""Packages all of whose modules are tested through the commands that they serve."""


def has_code(path: Path) -> bool:
    """Whether a module holds more than names of others."""
    return any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.parse(path.read_text()).body)


MODULES = [
    str(path.relative_to(ROOT)) for folder in ("cm", "evaluations") for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py" and has_code(path)
]


def mirrored(module: str) -> str:
    """The test of its name, below tests/."""
    folder, _, name = module.removeprefix("cm/").rpartition("/")
    return f"{folder}/test_{name}".lstrip("/")


def expected(module: str) -> str:
    if (ROOT / module).read_text().startswith(f'"""{COMPATIBLE}') and not (ROOT / "tests" / mirrored(module)).exists():
        return "test_compatibility.py"
    return ELSEWHERE.get(module) or BY_THE_COMMANDS.get(module.rpartition("/")[0]) or mirrored(module)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_test_that_is_found_by_its_name(module):
    test = ROOT / "tests" / expected(module)
    assert test.exists(), f"{module} has no tests/{mirrored(module)}: write it, or say in ELSEWHERE what tests it"
    tree = ast.parse(test.read_text())
    assert any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in ast.walk(tree)), test


@pytest.mark.parametrize("module", ELSEWHERE)
def test_a_module_is_listed_as_tested_elsewhere_only_while_it_is(module):
    assert module in MODULES, f"{module} is gone: take it out of ELSEWHERE"
    assert not (ROOT / "tests" / mirrored(module)).exists(), f"{module} has a test of its name: take it out"


def test_what_is_no_test_lies_with_the_helpers():
    """In tests/support, or beside the tests of whole runs."""
    odd = [
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")
        if not path.name.startswith("test_") and not {"support", "system"} & set(path.parts)
        and path.name != "conftest.py"
    ]
    assert not odd, odd
