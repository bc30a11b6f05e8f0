"""The exception for what a user can mend."""

_HALF = 1000  # characters
_MOST = 300


def printable(text: str) -> str:
    """On one line: line breaks and what else is not printed are shown as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def in_short(said: object) -> str:
    """What another library said, as a part of a line of our own."""
    return " ".join(str(said).split())[:_MOST]


class ConfigError(ValueError):
    """A flag that cannot be used as given. The message is one line: the flag, its value, what would work.

    Whatever is quoted in it, from a file too: line breaks and what else is not printed are shown as escapes, and of a
    long message begin and end.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > 2 * _HALF:
            text = f"{text[:_HALF]} [...] {text[-_HALF:]}"
        return printable(text)
