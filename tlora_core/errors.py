"""The only exception that the pack raises intentionally."""

from collections.abc import Collection


class TLoRAError(ValueError):
    """A problem that the user can solve, described in one sentence.

    The message names the input or file, and says what is wrong and what to do, so that an interface can show it
    unchanged.
    """


def require_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises TLoRAError when the value of the input `name` is not one of `choices`."""
    if value not in choices:
        raise TLoRAError(f'{name} is "{value}"; choose one of {", ".join(choices)}.')
