"""Triton's interpreter on CPU tensors; to be imported before `fallow.gpu`."""

import os
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import triton.language
from triton.runtime import interpreter

_patch, _patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 calls int() on arrays of one element, which NumPy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


@cache
def _patch_once(*modules: Any) -> None:
    for module in modules:
        _patch(SimpleNamespace(__globals__={"tl": module}))


def _patch_and_stay(fn: Any) -> Any:
    """The language is patched once, not at each launch and each call of a kernel's function."""
    _patch_once(triton.language, triton.language.core)
    return interpreter._LangPatchScope()  # of nothing that is to be restored


interpreter._patch_lang_tensor = _patch_with_index
interpreter._patch_lang = _patch_and_stay
# Without `debug` integer sums are checked for overflow and nothing is said of it: half of the time.
_builder = interpreter.interpreter_builder
assert not _builder.options.debug
_builder.options = replace(_builder.options, sanitize_overflow=False)
