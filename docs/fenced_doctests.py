"""A griffe extension for mkdocstrings: doctests in docstrings are shown as code, not read as Markdown quotes."""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", flags=re.MULTILINE)


class FencedDoctests(griffe.Extension):
    """Puts every doctest, up to the next blank line, between fences."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(lambda found: f"```python\n{found[0]}\n```", obj.docstring.value)
