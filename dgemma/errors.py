"""One exception tree. Whatever a user did wrong raises from here, naming the value given and the values allowed."""


class DgemmaError(Exception):
    """Base of every error that dgemma raises on purpose; its text is fit to be shown to a user."""


class ConfigError(DgemmaError):
    """A model or engine configuration that cannot be used."""


class CheckpointError(DgemmaError):
    """A checkpoint that cannot be read or written; the text names the file or the tensor."""


class RequestError(DgemmaError):
    """A generation request whose parameters or prompt are not allowed."""


class CapacityError(DgemmaError):
    """The engine has no room for the request now."""


class DataError(DgemmaError):
    """Training or evaluation data that cannot be used; the text names the file and the line."""
