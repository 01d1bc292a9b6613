"""What the paper takes for granted (the base), and extras that import dyme.py."""


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2."""


class DivergedError(Exception):
    """Training cannot go on; the last checkpoint is kept."""
