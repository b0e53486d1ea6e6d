"""The one exception that reaches the user as a sentence instead of a traceback."""


class HostError(Exception):
    """Something the user can act on; its text is the whole message. status: of the process that it ends."""

    status = 1


class WrongArguments(HostError):
    """The command line asks for something that cannot be."""

    status = 2


class WorkflowError(HostError):
    """The server refused a workflow, or one of its nodes failed."""
