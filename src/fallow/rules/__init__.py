"""Rules, one file and one name each. To add one, add a file with a `RULE`."""

from importlib import import_module
from pkgutil import iter_modules

from fallow.errors import UsageError
from fallow.rules._base import Arrays, Rule

RULES = tuple(sorted(m.name for m in iter_modules(__path__) if m.name[0] != "_"))


def find_rule(name: str) -> type[Rule]:
    """The rule of that name. Raises UsageError naming the known ones."""
    if name not in RULES:
        raise UsageError(f"unknown rule {name!r}; known rules: {', '.join(RULES)}")
    return import_module(f"fallow.rules.{name}").RULE


__all__ = ["RULES", "Arrays", "Rule", "find_rule"]
