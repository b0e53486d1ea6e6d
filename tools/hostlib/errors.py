"""The one exception that reaches the user as a sentence instead of a traceback."""


class HostError(Exception):
    """Something the user can act on; its text is the whole message."""


class WorkflowError(HostError):
    """The server refused a workflow, or one of its nodes failed."""
