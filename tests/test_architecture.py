"""docs/architecture.md names files and classes that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {path.relative_to(ROOT / "src/cacheflow").as_posix(): path for path in (ROOT / "src/cacheflow").rglob("*.py")}
TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)`", TEXT)))
CLASSES = sorted(set(re.findall(r"`([A-Z][a-z]\w+)(?:\.\w+)?`", TEXT)))


@pytest.mark.parametrize("name", NAMED)
def test_a_file_that_is_named_is_there(name):
    assert any(f"/{path}".endswith(f"/{name}") for path in SOURCES)


def test_classes_that_are_named_are_there():
    defined = {
        name for path in SOURCES.values() for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE)
    }
    assert {*CLASSES} <= defined


def test_the_map_has_every_package():
    rows = re.findall(r"^\| (`[^|]+`) \| .* \| .* \|$", TEXT.partition("## The map")[2], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    top = {path.split("/")[0].removesuffix(".py") for path in SOURCES} - {"__init__"}
    assert named == top
