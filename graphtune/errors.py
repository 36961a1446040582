"""The one error that people are meant to read."""


class UserError(ValueError):
    """Bad input: a config key, a file, a rule, a batch that cannot be used.

    The message is one line that names the key, the value and what would be right. The
    command line prints it without a traceback and exits with 2.
    """
