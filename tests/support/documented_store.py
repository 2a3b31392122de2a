"""The store of another package that docs/stores.md shows."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "stores.md"


def documented_source():
    """The module, as it stands in the page."""
    (source,) = [
        each for each in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "def opener" in each
    ]
    return source


def documented_opener():
    """Its opener."""
    module = {}
    exec(compile(documented_source(), str(PAGE), "exec"), module)
    return module["opener"]
