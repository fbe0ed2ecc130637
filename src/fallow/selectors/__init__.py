"""Selectors: rules that choose neurons per token by a prediction of what they will put out.

One file and one name each, found by `fallow.rules.find_rule` as rules are. To add one, add a file
with a `RULE`; one of your own goes by "my_selectors:Mine" (docs/how-to/selector.md).
"""

from pkgutil import iter_modules

from fallow.selectors._base import Bits, Seen, Selector

SELECTORS = tuple(sorted(m.name for m in iter_modules(__path__) if m.name[0] != "_"))

__all__ = ["SELECTORS", "Bits", "Seen", "Selector"]
