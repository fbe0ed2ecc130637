"""Errors that a user can act on: one line that says what, where and the remedy."""


class FallowError(Exception):
    """Something in the data, the model or the machine is wrong. Exit code 1."""

    exit_code = 1


class UsageError(FallowError):
    """The request itself is wrong (an option, a name, a combination). Exit code 2."""

    exit_code = 2
