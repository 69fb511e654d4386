"""The one exception for what a user gave and cannot be used."""


class InputError(ValueError):
    """A value, file or data set that cannot be used as given.

    The message says what is wrong, where, and what is allowed. The command line prints it and exits with
    status 2; from Python it is an ordinary ``ValueError``.
    """
