"""The error that a person sees: one line that names the file, shape or value and what was expected."""


class FocusNetError(Exception):
    """Something the user can fix; commands print it as one line and exit with status 2."""
