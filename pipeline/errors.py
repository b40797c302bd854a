"""Exceptions that are no errors: how a run ends early on purpose."""


class Stopped(Exception):
    """The run was asked to end (SIGTERM), saved a checkpoint first, and is continued by the same command."""
