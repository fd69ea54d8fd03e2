"""Errors a user can cause or must act on: one readable message each, and the exit code a script ends with.

=====  ====================================================================
code   meaning
=====  ====================================================================
2      a flag, key, size, file or corpus that cannot work
3      the training became non-finite
4      a checkpoint could not be written, or none of those asked for is whole
75     try again later: the run folder is in use
=====  ====================================================================
"""

import difflib
from collections.abc import Iterable


class Failure(Exception):
    """Base class: its message is complete and is printed alone, without a traceback."""

    code = 1


class ConfigError(Failure):
    """A value that cannot work: names the field, the value, what is allowed and the nearest right name."""

    code = 2

    def __init__(self, field: str, value: object, allowed: str, choices: Iterable[str] = ()):
        message = f"{field}: {value!r} is not possible; {allowed}"
        near = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
        super().__init__(message + (f" (did you mean {near[0]!r}?)" if near else ""))


class NonFiniteError(Failure):
    """The loss or the gradients stopped being finite."""

    code = 3


class CheckpointError(Failure):
    """A checkpoint could not be written, or what was asked for cannot be restored."""

    code = 4


class BusyError(Failure):
    """Something is in use by another process; the same command may succeed later."""

    code = 75
