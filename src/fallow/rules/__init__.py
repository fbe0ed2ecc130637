"""Rules, one file and one name each. To add one, add a file with a `RULE`.

A rule of your own needs no place here: it goes by its module and class, "my_rules:Mine"
(docs/how-to/rule.md).
"""

import os
import sys
from importlib import import_module
from pkgutil import iter_modules

from fallow.common.errors import UsageError
from fallow.models.capture import Calibration
from fallow.models.taps import Layer
from fallow.rules._base import (
    Arrays,
    Rule,
    layer_quantiles,
    per_token_tail,
    per_token_topk,
    scalar,
)

RULES = tuple(sorted(m.name for m in iter_modules(__path__) if m.name[0] != "_"))
_NEEDED = ("where", "knob_name", "known")  # what a class has to say about itself


def find_rule(name: str) -> type[Rule]:
    """The rule or selector of that name, such as "topk" or, with options, "lowbit:gate=4:up=2".

    "my_rules:Mine", and options behind it, is the class Mine of the module my_rules, which is
    looked for as Python does and then in the current folder. It is imported, which runs it.

    Raises:
        UsageError: unknown rule or option, naming the known ones; an option out of range.
    """
    bare, _, options = name.partition(":")
    selectors = import_module("fallow.selectors").SELECTORS
    for package, names in (("rules", RULES), ("selectors", selectors)):
        if bare in names:
            rule: type[Rule] = import_module(f"fallow.{package}.{bare}").RULE
            return rule.with_options(options) if options else rule
    class_name, _, options = options.partition(":")
    if class_name.isidentifier() and all(part.isidentifier() for part in bare.split(".")):
        rule = _own_rule(bare, class_name)
        return rule.with_options(options) if options else rule
    raise UsageError(
        f"unknown rule {bare!r}; known rules: {', '.join(RULES)}; "
        f"known selectors: {', '.join(selectors)}"
    )


def _own_rule(module: str, class_name: str) -> type[Rule]:
    """A user's class, under the name that plans give it. Raises UsageError if it is no rule."""
    name, here = f"{module}:{class_name}", os.getcwd()
    if here not in sys.path:  # as it is not for the command `fallow`
        sys.path.append(here)
    try:
        found = getattr(import_module(module), class_name, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UsageError(
            f"rule {name!r}: there is no module {error.name} on the Python path or in {here}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise UsageError(f"rule {name!r}: {module} has no class {class_name} made of fallow's Rule")
    missing = [attribute for attribute in _NEEDED if not hasattr(found, attribute)]
    if missing:
        raise UsageError(f"rule {name!r}: the class lacks {', '.join(missing)}")
    return type(class_name, (found,), {"name": name})


__all__ = [
    "RULES",
    "Arrays",
    "Calibration",
    "Layer",
    "Rule",
    "find_rule",
    "layer_quantiles",
    "per_token_tail",
    "per_token_topk",
    "scalar",
]
