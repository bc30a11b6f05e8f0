"""Dictionaries that somebody brought."""

from fairseq.data import Dictionary

from kd_ext.errors import ConfigError, in_short


def load_dictionary(path: str) -> Dictionary:
    """Read ``dict.<language>.txt``.

    Raises:
        ConfigError: it cannot be read, or is none
    """
    try:
        return Dictionary.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # of many kinds, by what is in it
        said = in_short(error)
        raise ConfigError(f"{path}: damaged, or not a dictionary of fairseq ({said})") from error
