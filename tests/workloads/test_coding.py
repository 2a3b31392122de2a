"""The coding session is real text, of the length asked for."""

import pytest

from cacheflow.errors import ConfigError
from cacheflow.workloads.coding import coding_session, source_text, stdlib_source


def test_turns_show_as_much_source_as_asked_and_never_the_same_file_twice():
    turns = coding_session((12_000, 30_000, 0))
    assert [sum(len(text) for _, text in turn.files) for turn in turns] == [12_000, 30_000, 0]
    names = [name for turn in turns for name, _ in turn.files]
    assert len(names) == len(set(names))
    assert turns[2].content == turns[2].question
    assert "def " in turns[0].content


def test_source_text_is_long_enough_for_the_longest_benchmark():
    assert sum(len(part) for part in source_text()) > 8192 * 6


def test_bad_requests_are_refused():
    with pytest.raises(ConfigError, match="more source than"):
        coding_session((10**9,))
    with pytest.raises(ConfigError, match="0 or more"):
        coding_session((-1,))
    with pytest.raises(ConfigError, match="no_such_module"):
        stdlib_source("no_such_module")
