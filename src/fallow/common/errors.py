"""Errors that a user can act on: one line that says what, where and the remedy."""

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
