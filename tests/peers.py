"""ByzFL, the second implementation that robust rules and attacks are compared with."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest


def byzfl(module: str) -> ModuleType:
    """A module of ByzFL by its dotted name; the test is skipped if it is not installed (`make test` installs it).

    The package's own first lines import its benchmark, and with it torchvision and plotting, which its rules do not need:
    they are not run.
    """
    if "byzfl" not in sys.modules:
        spec = importlib.util.find_spec("byzfl")
        if spec is None:
            pytest.skip("ByzFL is not installed: pip install --no-deps byzfl")
        sys.modules["byzfl"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"byzfl.{module}")
