"""The one error that every room may raise and the front doors show as a single line. Imports nothing."""


class UserError(Exception):
    """Something the user can put right: the text says what was found, what was expected and what to do.

    Front doors print the text alone and exit with status 1; any other exception keeps its traceback: it is a defect.
    """
