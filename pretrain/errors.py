"""Exceptions for what the person who started the program can mend: the message says what was expected, what was found and
the mend. And the one list of exit codes, by which launchers and scripts decide what is next."""

from enum import IntEnum


class Exit(IntEnum):
    """How `train`, and what starts it, ended. 128 + n: killed by signal n, nothing saved since the last checkpoint."""

    FINISHED = 0  # or stopped early, or at run.stop_at: nothing is left to do
    FAILED = 1  # by an error of the program, with a traceback
    MISTAKE = 2  # of the user: it would only come again
    PARTED = 3  # another rank died or did not answer
    DIVERGED = 4  # too many steps in a row without a finite gradient
    UNFIT = 5  # a host that is not fit for the run: without it the same command may go on
    STOPPED = 75  # asked to, and saved: the same command goes on (EX_TEMPFAIL of sysexits.h)
    INTERRUPTED = 130  # Ctrl-C where nothing was to be saved


class UserError(Exception):
    """A mistake. Printed as it is, without a traceback; the process exits with its code."""

    exit_code = Exit.MISTAKE


class Unfit(UserError):
    """A host that a run cannot be on."""

    exit_code = Exit.UNFIT
