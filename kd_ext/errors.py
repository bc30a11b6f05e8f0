"""The exception for what a user can mend."""


class ConfigError(ValueError):
    """A flag that cannot be used as given. The message is one line: the flag, its value, what would work.

    Whatever is quoted in it, from a file too: line breaks and what else is not printed are shown as escapes.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())
