"""The console commands of an installed package: each is a script of the repository under a short name.

`cm-train --help` is `python scripts/edm_train.py --help`. In a wheel the scripts are the package `cm.commands`.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys


def run(module: str) -> None:
    """Run a module as the script that it is.

    A package that was not installed has no `cm.commands`; then the scripts themselves are there.
    """
    if importlib.util.find_spec(module) is None:
        sys.exit(f"{module} is not installed: run the scripts of the repository, or pip install it")
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def train() -> None:
    """Train a diffusion model."""
    run("cm.commands.edm_train")


def distill() -> None:
    """Distil a diffusion model, or train a consistency model without one."""
    run("cm.commands.cm_train")


def sample() -> None:
    """Generate images."""
    run("cm.commands.image_sample")


def edit() -> None:
    """Edit images."""
    run("cm.commands.image_edit")


def search() -> None:
    """Search for a multistep schedule."""
    run("cm.commands.ternary_search")


def evaluate() -> None:
    """Evaluate samples with all metrics."""
    run("evaluations.evaluator")


def fid() -> None:
    """References and FID."""
    run("evaluations.fid")


def report() -> None:
    """A page that compares runs."""
    run("cm.commands.report")


def dataset() -> None:
    """Convert data sets."""
    run("cm.dataset_commands.dataset_tool")


def encode() -> None:
    """Encode images to latents."""
    run("cm.dataset_commands.encode")


def convert() -> None:
    """Convert weights between formats."""
    run("cm.commands.convert_checkpoint")


def classifier() -> None:
    """Train a classifier for evaluation or guidance."""
    run("cm.commands.classifier_train")


def quickstart() -> None:
    """From images to a few-step generator."""
    run("cm.commands.quickstart")


def demo() -> None:
    """The complete workflow on digits."""
    run("cm.commands.demo")
