"""Selectors: choices of neurons per token by a prediction of what they will put out.

One file and one name each. To add one, add a file with a `RULE`; one of your own goes by
"my_selectors:Mine" (docs/how-to/selector.md), and so do those that lost, by
"fallow.research.ahead:Ahead".
"""

from pkgutil import iter_modules

from fallow.rules import RULES, Choice, find_choice
from fallow.selectors._base import Arrays, Bits, Seen, Selector

SELECTORS = tuple(sorted(m.name for m in iter_modules(__path__) if m.name[0] != "_"))


def find(name: str) -> type[Choice]:
    """The rule or the selector of that name. Raises UsageError as `fallow.rules.find_choice`."""
    return find_choice(name, {"fallow.rules": RULES, "fallow.selectors": SELECTORS}, Choice)


__all__ = ["SELECTORS", "Arrays", "Bits", "Seen", "Selector", "find"]
