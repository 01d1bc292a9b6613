"""Errors that end a program with one line and an exit code, without a traceback."""


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2."""


class DivergedError(Exception):
    """Training cannot go on; the last checkpoint is kept."""
