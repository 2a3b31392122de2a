"""Where the demo's model is kept."""

import pytest

pytest.importorskip("torch")

from cacheflow.engine.smollm2 import smollm2_folder
from cacheflow.errors import ConfigError


def test_a_folder_that_cannot_be_made_is_said_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("cacheflow.engine.smollm2.gguf_path", lambda: tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match=r"cannot be kept in .*file/models.*set CACHEFLOW_CACHE to a folder"):
        smollm2_folder()
