"""Errors that a user can act on: one line that says what, where and the remedy."""

import errno

_LONGEST = 300  # characters of what another library says


class FallowError(Exception):
    """Something in the data, the model or the machine is wrong. Exit code 1."""

    exit_code = 1


class UsageError(FallowError):
    """The request itself is wrong (an option, a name, a combination). Exit code 2."""

    exit_code = 2


def in_one_line(error: object) -> str:
    """What another library or a file says, without line breaks; a long story is cut."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


_FILES = "more files than it may have open; raise the limit: ulimit -n"
_MEMORY = "more memory than it may have; free some, or raise the limit: ulimit -v, or the cgroup's"
_THREADS = (
    "more threads or processes than it may have; raise the limit: ulimit -u, or pids.max of the "
    "cgroup"
)
_BY_NUMBER = {
    errno.EMFILE: _FILES, errno.ENFILE: _FILES, errno.ENOMEM: _MEMORY, errno.EAGAIN: _THREADS,
}  # fmt: skip
# How those say it that have no class or number for it: Python, the loader of libraries, torch.
_BY_WORDS = {
    "can't start new thread": _THREADS,
    "the system does not start": _THREADS,  # the core's ThreadError
    "failed to map segment from shared object": _MEMORY,
    "Cannot allocate memory": _MEMORY,
    "can't allocate memory": _MEMORY,
    "Too many open files": _FILES,
}


def exceeded_limit(error: BaseException) -> str | None:
    """Which limit of the machine an error comes from, with the remedy; None if from none.

    What an error was raised from, or while, is looked at too.
    """
    found: BaseException | None = error
    while found is not None:
        limit = _MEMORY if isinstance(found, MemoryError) else None
        # What a stream that does not block raises has this attribute, what fork raises has not.
        if isinstance(found, OSError) and not hasattr(found, "characters_written"):
            limit = _BY_NUMBER.get(found.errno or 0)
        elif isinstance(found, ImportError | RuntimeError):
            limit = next(
                (limit for words, limit in _BY_WORDS.items() if words in str(found)), limit
            )
        if limit is not None:
            return f"the command takes {limit}"
        found = found.__cause__ or found.__context__
    return None
