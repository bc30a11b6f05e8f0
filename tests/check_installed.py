"""Follows the README's path with the installed package, found by its name. Run by hand or by .ci/run, in any folder."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from pages import assert_translated, paste, path_of_the_readme


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        result = paste(Path(name), path_of_the_readme())
    assert result.returncode == 0, result.output
    assert_translated(result.output)
    import kd_ext
    from kd_ext import recipes

    assert recipes.folder() == Path(kd_ext.__file__).resolve().parent / "configs", recipes.folder()
    assert (recipes.folder() / "word_level.yaml").is_file()
    print(f"trained, distilled and translated with {kd_ext.__file__}")


if __name__ == "__main__":
    main()
