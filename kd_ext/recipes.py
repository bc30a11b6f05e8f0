"""``python -m kd_ext.recipes``: the folder of the recipes for fairseq-hydra-train, for its ``--config-dir``."""

from pathlib import Path

from kd_ext.parsing import Parser


def folder() -> Path:
    """Inside an installed package; beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())


def main() -> None:
    Parser(prog="python -m kd_ext.recipes", description=__doc__).parse_args()
    print(folder())


if __name__ == "__main__":
    main()
