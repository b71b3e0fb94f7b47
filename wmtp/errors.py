"""The errors that are for the user: what they can mend, told in one line."""


class UserError(ValueError):
    """Something that the user can mend: one line that names the thing, its value and the way out.

    A recipe ends with that line alone; every other exception is a fault of code, WMTP's or the user's own, and keeps
    its traceback (:func:`wmtp.config.clear_errors`).
    """


class MissingError(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class ExistsError(UserError, FileExistsError):
    """A file or folder that is there already and would be written over."""
