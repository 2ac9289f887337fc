"""For the site: docstrings as its generator reads them, which is Markdown.

What Sphinx would read is rewritten: ``:class:`Pattern``` becomes code, a table of equals signs a
block of plain text, and an ``Example:`` one of the sections that griffe knows.
"""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?([\w.]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_TABLE = re.compile(r"^(=+(?: +=+)+)\n(?:.*\n)+?\1\n(?:.*\n)+?\1$", re.MULTILINE)


class RstInDocstrings(griffe.Extension):
    """Rewrites each docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """What griffe calls for each module, class, function and attribute."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            text = _EXAMPLE.sub("Examples:", text)
            obj.docstring.value = _TABLE.sub(lambda table: f"```text\n{table[0]}\n```", text)
