"""The one exception that the pack raises on purpose."""

from collections.abc import Collection


class TLoRAError(ValueError):
    """A problem the user can solve, told in one sentence.

    The message names the input or the file, says what was wrong with it and what to do, so that an
    interface can show it as it is.
    """


def require_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises TLoRAError when the value of the input called `name` is none of `choices`."""
    if value not in choices:
        raise TLoRAError(f'{name} is "{value}"; choose one of {", ".join(choices)}.')
