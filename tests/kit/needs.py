"""Programs that a test needs and a machine may lack."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import openai
import pytest

JAVASCRIPT = Path(__file__).parents[1] / "clients" / "js"
NODE = 20
"""The least major version."""


def needs(program: str) -> str:
    """Its path. Without it the test is skipped; with CI=true it fails, for a test that never runs shows nothing."""
    path = shutil.which(program)
    return path or _missing(f"{program} is not installed")


def needs_javascript() -> str:
    """The path of a Node that is recent enough, with the packages of tests/clients/js beside it."""
    node = needs("node")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.match(r"v(\d+)\.", version)
    if found is None or int(found[1]) < NODE:
        _missing(f"node is {version.strip()}, and {NODE} or later is needed")
    installed = JAVASCRIPT / "node_modules" / ".installed"
    if not installed.exists() or installed.read_bytes() != (JAVASCRIPT / "package-lock.json").read_bytes():
        _missing("tests/setup.sh has not installed the packages of tests/clients/js")
    return node


def needs_openai(major: str) -> dict[str, str]:
    """The environment of a Python that has this major version of `openai`: "3", which this one has too, or "2"."""
    if major == openai.__version__.partition(".")[0]:
        return dict(os.environ)
    folder = Path(sys.prefix) / "clients" / f"openai-{major}"
    if not (folder / "openai").is_dir():
        _missing(f"make test has not installed openai {major} into {folder}")
    return {**os.environ, "PYTHONPATH": str(folder)}


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)
