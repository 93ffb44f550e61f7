"""A griffe extension: examples in docstrings, which are doctests, are shown as code."""

import re

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Put each run of `>>>` lines and their results into a fence of its own."""

    def on_object(self, *, obj, **_):
        """Called for everything that is documented."""
        if obj.docstring is not None and "Examples:" not in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(
                lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value
            )
