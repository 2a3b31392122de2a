"""Every mutable field of the state machine is written by its own object alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cacheflow.state

FILES = sorted(Path(cacheflow.state.__path__[0]).glob("*.py"))


def written_elsewhere(source: str) -> list[str]:
    """Assignments, also into containers, to a field of an object other than ``self``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            continue
        for target in targets:
            for each in ast.walk(target):
                if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store | ast.Load):
                    base = each.value
                    if isinstance(each.ctx, ast.Store) and not (isinstance(base, ast.Name) and base.id == "self"):
                        found.append(ast.unparse(target))
                if isinstance(each, ast.Subscript) and isinstance(each.ctx, ast.Store):
                    base = each.value
                    if isinstance(base, ast.Attribute) and not (
                        isinstance(base.value, ast.Name) and base.value.id == "self"
                    ):
                        found.append(ast.unparse(target))
    return found


def test_there_are_at_most_seven_files():
    assert len([path for path in FILES if path.name != "__init__.py"]) <= 7


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_field_is_written_by_its_own_object(path):
    own_records = ("entry.", "self._entries[")  # of the batch scheduler, which alone has them
    assert [each for each in written_elsewhere(path.read_text()) if not each.startswith(own_records)] == []


def test_the_check_finds_what_it_looks_for():
    assert written_elsewhere("p.demand_K[chunk] = 1\nself.board.limit = 3\np.x += 1\nself.y = 2\nself.z[0] = 1\n") == [
        "p.demand_K[chunk]", "self.board.limit", "p.x",
    ]  # fmt: skip
