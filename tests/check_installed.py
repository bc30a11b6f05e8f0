"""Trains and translates with the installed package, found by its name. Run by hand or by .ci/run, in any folder."""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from commands import ENVIRONMENT, script
from corpus import preprocess


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = preprocess(folder, train=60)
        train = [script("fairseq-train"), data, "--user-dir", "kd_ext", "--cpu", "--max-update", 2, "--lr", 0.01]
        train += ["--optimizer", "adam", "--max-tokens", 200, "--arch", "transformer_tiny", "--num-workers", 0]
        kd = ["--task", "translation_with_kd", "--criterion", "label_smoothed_cross_entropy_with_kd"]
        teacher, student = folder / "teacher", folder / "student"
        last = teacher / "checkpoint_last.pt"
        generate = [script("fairseq-generate"), data, "--user-dir", "kd_ext", "--cpu", "--beam", 1, "--max-len-b", 10]
        for command in (
            [*train, "--criterion", "label_smoothed_cross_entropy", "--save-dir", teacher],
            [*train, *kd, "--teacher-checkpoint-path", last, "--save-dir", student],
            [*generate, "--path", student / "checkpoint_last.pt"],
        ):
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    import kd_ext

    print(f"trained, distilled and translated with {kd_ext.__file__}")


if __name__ == "__main__":
    main()
