"""Benchmarks as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_benchmark(script: Path) -> ModuleType:
    """The module that ``script`` is, with its siblings in reach as where it is run."""
    sys.path.insert(0, str(script.parent))
    try:
        specification = importlib.util.spec_from_file_location(f"benchmarks_{script.stem}", script)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[specification.name] = module  # dataclasses look their module up
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(script.parent))
    return module
