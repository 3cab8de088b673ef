"""The one error that every module may raise and the front doors show as a single line; and Ctrl-C while they start."""

import signal
import threading


class UserError(Exception):
    """Something the user can put right: the text says what was found, what was expected and what to do.

    Front doors print the text alone and exit with status 1; any other exception keeps its traceback: it is a defect.
    """


def end_quietly_on_interrupt() -> None:
    """Ctrl-C ends the program without a traceback, for the seconds that its imports take; `guarded` then handles it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_interrupt() -> None:
    """Undoes `end_quietly_on_interrupt`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
