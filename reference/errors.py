"""The one family of exceptions that loracle raises on purpose.

A message is one line and names four things: the tensor or file, what was expected, what came, and the remedy.
``exit_code`` is what the command line returns: 2, the input is wrong; 1, a check failed.
"""


class LoracleError(Exception):
    """Base of the family; ``str(error)`` is always one line, whatever was put into the message.

    A file name or a quoted message of a parser may hold line breaks; they become single spaces.
    """

    exit_code: int = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class ShapeError(LoracleError):
    """A tensor's shape does not fit the others'."""


class DTypeError(LoracleError):
    """A tensor's dtype is not one that the operation is defined for."""


class NonFiniteError(LoracleError):
    """A NaN or an infinity among the inputs, or a result too large for its dtype."""


class ConfigError(LoracleError):
    """An option or a key of an adapter configuration is unknown, unsupported or contradicts another."""


class FileError(LoracleError):
    """A file or folder is missing, malformed or unreadable, or an output exists already."""


class TargetError(LoracleError):
    """No module matches the targets, or an adapter does not fit the model."""


class DataError(LoracleError):
    """Training data is malformed; the message has the line number."""


class CheckError(LoracleError):
    """The input was sound and a check of the result failed."""

    exit_code = 1
