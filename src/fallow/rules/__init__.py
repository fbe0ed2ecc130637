"""Rules, one file and one name each. To add one, add a file with a `RULE` and name it here."""

from importlib import import_module

from fallow.errors import UsageError
from fallow.rules._base import Arrays, Rule

RULES = ("percentile", "cats", "fat", "topk", "tail", "cett", "teal", "wina", "relu")


def find_rule(name: str) -> type[Rule]:
    """The rule of that name. Raises UsageError naming the known ones."""
    if name not in RULES:
        raise UsageError(f"unknown rule {name!r}; known rules: {', '.join(RULES)}")
    return import_module(f"fallow.rules.{name}").RULE


__all__ = ["RULES", "Arrays", "Rule", "find_rule"]
