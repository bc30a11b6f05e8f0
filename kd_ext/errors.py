"""The exception for what a user can mend."""


class ConfigError(ValueError):
    """A flag that cannot be used as given. The message is one line: the flag, its value, what would work."""
