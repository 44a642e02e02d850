"""The error that ends a command."""


class CommandError(Exception):
    """A command cannot do its work. The text is one line that names the problem and the remedy."""


def one_line(error: BaseException) -> str:
    """Return an exception's type and text as one line."""
    return ": ".join(filter(None, [type(error).__name__, " ".join(str(error).split())]))
