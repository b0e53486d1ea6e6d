"""The one exception that the pack raises on purpose."""


class TLoRAError(ValueError):
    """A problem the user can solve, told in one sentence.

    The message names the input or the file, says what was wrong with it and what to do, so that an
    interface can show it as it is.
    """
