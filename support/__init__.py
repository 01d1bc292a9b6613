"""What the paper takes for granted: data, processes, run folders, the helper's plumbing, comparisons."""


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2."""


class DivergedError(Exception):
    """Training cannot go on; the last checkpoint is kept."""
