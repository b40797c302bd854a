"""Exceptions that are no errors: how a run ends early on purpose."""


class Stopped(Exception):
    """The run was asked to end (SIGTERM, Ctrl-C), saved a checkpoint first, and is continued by the same command."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
