"""What ends a command."""


class CommandError(Exception):
    """A command cannot do its work: one line that says what is wrong, and what to do about it."""


def one_line(error: BaseException) -> str:
    """An exception's type and text, on one line."""
    return ": ".join(filter(None, [type(error).__name__, " ".join(str(error).split())]))
