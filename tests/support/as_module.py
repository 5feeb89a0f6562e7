"""A script as a module under its own name, so that processes which it starts can find its functions."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def as_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
