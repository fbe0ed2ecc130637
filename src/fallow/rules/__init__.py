"""Rules, one file and one name each. To add one, add a file with a `RULE`.

A rule of your own needs no place here: it goes by its module and class, "my_rules:Mine"
(docs/how-to/rule.md).
"""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules

from fallow.common.errors import UsageError
from fallow.models.capture import Calibration
from fallow.models.taps import Layer
from fallow.plan import Cut
from fallow.rules._base import Choice, Rule, layer_quantiles

RULES = tuple(sorted(m.name for m in iter_modules(__path__) if m.name[0] != "_"))
_NEEDED = ("where", "knob_name", "known")  # what a class has to say about itself


def find_rule(name: str) -> type[Rule]:
    """The rule of that name, such as "topk" or, with options, "two_stage:early=10".

    Raises:
        UsageError: as `find_choice`.
    """
    found = find_choice(name, {__name__: RULES}, Rule)
    assert issubclass(found, Rule)
    return found


def find_choice(
    name: str, packages: Mapping[str, Sequence[str]], kind: type[Choice]
) -> type[Choice]:
    """A class by its name in one of these packages, or by its module and its own.

    "my_rules:Mine", and options behind it, is the class Mine of the module my_rules, which is
    looked for as Python does and then in the current folder. It is imported, which runs it.

    Raises:
        UsageError: unknown name or option, naming the known ones; an option out of range.
    """
    bare, _, options = name.partition(":")
    for package, names in packages.items():
        if bare in names:
            choice: type[Choice] = import_module(f"{package}.{bare}").RULE
            return choice.with_options(options) if options else choice
    class_name, _, options = options.partition(":")
    if class_name.isidentifier() and all(part.isidentifier() for part in bare.split(".")):
        choice = _own_class(bare, class_name, kind)
        return choice.with_options(options) if options else choice
    known = (f"known {p.rpartition('.')[2]}: {', '.join(n)}" for p, n in packages.items())
    raise UsageError(f"unknown rule {bare!r}; {'; '.join(known)}")


def _own_class(module: str, class_name: str, kind: type[Choice]) -> type[Choice]:
    """A user's class, under the name that plans give it. Raises UsageError if it is none."""
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
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise UsageError(
            f"rule {name!r}: {module} has no class {class_name} made of fallow's "
            + ("Rule or Selector" if kind is Choice else kind.__name__)
        )
    missing = [attribute for attribute in _NEEDED if not hasattr(found, attribute)]
    if missing:
        raise UsageError(f"rule {name!r}: the class lacks {', '.join(missing)}")
    return type(class_name, (found,), {"name": name})


__all__ = [
    "RULES", "Calibration", "Choice", "Cut", "Layer", "Rule", "find_choice", "find_rule",
    "layer_quantiles",
]  # fmt: skip
