"""The operator's own modules, with agents and tools."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from broker.errors import Misconfigured


def load_module(name: str, setting: str) -> ModuleType:
    """From the working directory, or wherever Python finds it. Raises Misconfigured, which begins with `setting`."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise Misconfigured(f"{setting}: importing {name} failed: {error!r}") from error
