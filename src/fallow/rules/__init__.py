"""Rules, one file and one name each. To add one, add a file with a `RULE`."""

from importlib import import_module
from pkgutil import iter_modules

from fallow.errors import UsageError
from fallow.rules._base import Arrays, Rule

RULES = tuple(sorted(m.name for m in iter_modules(__path__) if m.name[0] != "_"))


def find_rule(name: str) -> type[Rule]:
    """The rule or selector of that name, such as "topk" or, with options, "lowbit:gate=4:up=2".

    Raises:
        UsageError: unknown rule or option, naming the known ones; an option out of range.
    """
    bare, _, options = name.partition(":")
    selectors = import_module("fallow.selectors").SELECTORS
    for package, names in (("rules", RULES), ("selectors", selectors)):
        if bare in names:
            rule: type[Rule] = import_module(f"fallow.{package}.{bare}").RULE
            return rule.with_options(options) if options else rule
    raise UsageError(
        f"unknown rule {bare!r}; known rules: {', '.join(RULES)}; "
        f"known selectors: {', '.join(selectors)}"
    )


__all__ = ["RULES", "Arrays", "Rule", "find_rule"]
