"""The exception for input that cannot be used."""


class InputError(ValueError):
    """Raised for a value, file or data set that cannot be used as given.

    The message has the name of the key, what is allowed, and what came. The command line prints the message and exits
    with status 2. In Python it is a ``ValueError``.
    """


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
