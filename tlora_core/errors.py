"""The only exception that the pack raises intentionally."""


class TLoRAError(ValueError):
    """A problem that the user can solve, described in one sentence.

    The message names the input or file, and says what is wrong and what to do, so that an interface can show it
    unchanged.
    """
