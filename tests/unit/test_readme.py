"""The README names what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text("utf-8")
GUARANTEES = re.findall(r"^\| (P\d+) \| (.+) \| (.+) \|$", README, re.MULTILINE)


def test_there_are_guarantees() -> None:
    assert [number for number, _, _ in GUARANTEES] == sorted({row[0] for row in GUARANTEES}, key=lambda p: int(p[1:]))
    assert len(GUARANTEES) == README.count("\n| P")


@pytest.mark.parametrize("number, tests", [(number, tests) for number, _, tests in GUARANTEES])
def test_each_guarantee_names_tests_that_cite_it(number: str, tests: str) -> None:
    paths = [path for path in re.findall(r"`(tests/[^`]+)`", tests) if path.endswith(".py")]
    assert paths
    for path in paths:
        assert re.search(rf"\b{number}\b", (ROOT / path).read_text("utf-8")), f"{path} does not cite {number}"


def test_every_test_that_it_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/.]+)`", README)
    assert len(named) > 40
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("folder", ["broker", "broker/runs", "broker/gateway", "worker"])
def test_the_design_says_where_each_thing_is(folder: str) -> None:
    page = (ROOT / "docs" / "design.md").read_text("utf-8")
    [row] = re.findall(rf"^\| `{folder}/` \| (.+) \|$", page, re.MULTILINE)
    if folder == "broker/gateway":
        row += "".join(re.findall(r"^\| … fan-out \| (.+) \|$", page, re.MULTILINE))
    modules = {path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("__")}
    assert modules <= set(re.findall(r"`(\w+)`", row))


def test_the_design_names_what_a_dialect_has_beside_its_fold_and_its_routes() -> None:
    page = (ROOT / "docs" / "design.md").read_text("utf-8")
    [row] = re.findall(r"^\| `broker/gateway/dialects/` \| (.+) \|$", page, re.MULTILINE)
    modules = {path.stem for path in (ROOT / "broker/gateway/dialects").rglob("*.py") if path.stem != "__init__"}
    assert modules <= set(re.findall(r"`(\w+)/?`", row))


def test_every_rule_that_is_cited_is_there() -> None:
    rules = set(re.findall(r"^(\d+\.\d+) ", (ROOT / "docs" / "protocol.md").read_text("utf-8"), re.MULTILINE))
    files = [*(ROOT / "docs").glob("*.md"), *(f for part in ("broker", "worker") for f in (ROOT / part).rglob("*.py"))]
    for file in files:
        for cited in re.findall(r"PROTOCOL (\d+\.\d+)", file.read_text("utf-8")):
            assert cited in rules, f"{file} cites {cited}"


def test_the_design_names_each_package() -> None:
    page = (ROOT / "docs" / "design.md").read_text("utf-8")
    for file in [*(ROOT / "broker").glob("*/__init__.py"), *(ROOT / "worker").glob("*/__init__.py")]:
        assert f"`{file.parent.relative_to(ROOT)}/`" in page
