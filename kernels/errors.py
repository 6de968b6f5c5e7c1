"""The one exception that means "the user's input was wrong" (exit code 2)."""


class UserError(ValueError):
    """Something a user gave cannot be used.

    The message holds the value, the rule it breaks and the way out, and names the config file and key, or the table,
    feature, file, row group, row or rank, where they are known. The command line prints it without a traceback.
    """
