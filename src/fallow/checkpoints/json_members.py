"""The members of a JSON object one by one, where all at once would take too much memory.

Python's parser takes some twenty times the bytes of an object with many short members.
"""

import codecs
import json
import re
from array import array
from collections.abc import Iterator

import numpy as np

from fallow.common.files import DuplicateKeyError

_LONGEST_NAME = 1 << 16  # bytes
_PIECE = 1 << 16  # bytes that are decoded at once

_SPACE = rb"[ \t\n\r]*+"
_PLAIN = rb'[^"\\\x00-\x1f]*+'
STRING = rb'"' + _PLAIN + rb'(?:\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4})' + _PLAIN + rb')*+"'
# An object without objects in it, or what is neither object, list nor string; not checked further.
FLAT = rb'\{(?:[^"{}]++|' + STRING + rb')*+\}|[^\s"{}\[\],]++'
_BEGIN = re.compile(_SPACE + rb"\{" + _SPACE)
_END = re.compile(_SPACE + rb"\}" + _SPACE)


def check_utf8(text: memoryview) -> None:
    """Raises UnicodeDecodeError, a ValueError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), _PIECE):
        decoder.decode(text[start : start + _PIECE])
    decoder.decode(b"", final=True)


def members(text: memoryview, values: bytes) -> Iterator[tuple[str, memoryview]]:
    """Names and values, still JSON, of the object that a text in UTF-8 is.

    Args:
        values: a pattern of what they may be, such as STRING.

    Raises:
        ValueError: it is no object of such values, which may show after the last of them.
        DuplicateKeyError: it has a key twice; told after the last.
    """
    parts = (_SPACE, STRING, _SPACE, _SPACE, values, _SPACE)
    member = re.compile(rb"%s(%s)%s:%s(%s)%s,?" % parts)
    begin = _BEGIN.match(text)
    if begin is None:
        raise ValueError("no object")
    at, has_more = begin.end(), False
    hashes = array("q")  # 8 bytes for a name, where a set of names takes a hundred
    while found := member.match(text, at):
        if found.end(1) - found.start(1) > _LONGEST_NAME:
            raise ValueError("a name is too long")
        quoted = str(found[1], "utf-8")
        name = json.loads(quoted) if "\\" in quoted else quoted[1:-1]
        hashes.append(hash(name))
        yield name, text[found.start(2) : found.end(2)]
        at = found.end()
        has_more = text[at - 1] == ord(",")
        if not has_more:
            break
    if has_more or _END.fullmatch(text, at) is None:
        raise ValueError("no object of such values")
    ordered = np.sort(np.asarray(hashes, np.int64))
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        name = next(name for name, _ in members(text, values) if hash(name) == twice[0])
        raise DuplicateKeyError(f"{name!r} appears twice")
