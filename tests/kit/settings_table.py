"""The table of docs/settings.md; `python -m tests.kit.settings_table` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from broker.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = ["| variable | default | meaning |", "| --- | --- | --- |"]


def default(value: Any) -> str:
    if value is None or value == () or value == "":
        return "–"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def rows() -> list[str]:
    """One for each setting, in the order of the class."""
    return [
        f"| `BROKER_{name.upper()}` | {default(field.get_default())} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]


def written() -> list[str]:
    """The table's lines as they stand in the page."""
    return [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]


if __name__ == "__main__":
    table = "\n".join([*HEAD, *rows()])
    PAGE.write_text(re.sub(r"(?m)(^\|.*\n)+", lambda _: table + "\n", PAGE.read_text("utf-8"), count=1), "utf-8")
