"""The arguments of this project's own commands."""

import argparse
from typing import NoReturn

from kd_ext.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument, where argparse prints its usage first."""

    def error(self, message: str) -> NoReturn:
        """Raise it as a :class:`ConfigError`."""
        raise ConfigError(f"{message.replace('argument ', '', 1)}; {self.prog} --help lists what there is")
