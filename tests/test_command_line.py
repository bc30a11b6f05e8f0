"""--help, and flags that are not understood, as they are typed."""

import re
import subprocess

import pytest
from commands import ENVIRONMENT, PLUGIN, run, run_as_typed, script

OURS = ["--kd-strategy", "--teacher-checkpoint-path", "--teacher-cache-dir", "--alpha", "--kd-rate", "--kd-temperature"]
OURS += ["--encoder-add-adapters", "--decoder-train-adapter", "--adapter-activation-fn", "--load-checkpoint-liberally"]
OURS += ["--encoder-recurrent-stacking", "--decoder-factorized-embed-dim", "--run-sanity-validation-steps"]
OURS += ["--teacher-dtype", "--torch-compile", "--kd-queue-window"]


def groups(output):
    """The flags of each titled part of a help text, in order."""
    found, title = {}, None
    for line in output.splitlines():
        if re.match(r"[A-Za-z].*:$", line):
            title = line[:-1]
        flag = re.match(r"  (?:-\w(?: \S+)?, )?(--[\w-]+)", line)
        if flag and title:
            found.setdefault(title, []).append(flag[1])
    return found


def test_help_of_training(tmp_path):
    result = run(tmp_path / "log", "fairseq-train", *PLUGIN, "--help")
    assert result.returncode == 0
    found = groups(result.output)
    assert set(OURS) <= set(found["fairseq-kd-ext"])
    assert next(iter(found)) == "fairseq-kd-ext"
    everything = [flag for flags in found.values() for flag in flags]
    assert len(everything) == len(set(everything)) > 150  # each once, and upstream's too
    assert {"--max-tokens", "--save-dir", "--arch", "--clip-norm"} <= set(everything)
    assert len(re.findall("usage: .*", result.output)) == 1
    assert "--source-lang" not in found["fairseq-kd-ext"]  # upstream's, which this project's task inherits


def test_help_of_the_cache(tmp_path):
    result = run(tmp_path / "log", "kd_ext.teacher_cache", "--help")
    assert result.returncode == 0
    found = groups(result.output)
    assert next(iter(found)) == "fairseq-kd-ext"
    expected = ["--processes", "--teacher-checkpoint-path", "--teacher-model-overrides", "--teacher-user-dir"]
    expected += ["--teacher-ema", "--teacher-dtype", "--teacher-cache-dir", "--teacher-cache-top-k", "--kd-temperature"]
    expected += ["--kd-language-tag", "--kd-language-tags", "--kd-language-side"]
    assert found["fairseq-kd-ext"] == expected


@pytest.mark.parametrize("command", ["fairseq-generate", "fairseq-interactive", "fairseq-validate"])
def test_help_of_what_uses_a_student(tmp_path, command):
    result = run(tmp_path / "log", command, *PLUGIN, "--help")
    assert result.returncode == 0
    expected = ["--torch-compile", "--activate-encoder-adapter", "--activate-decoder-adapter"]
    assert groups(result.output)["fairseq-kd-ext"] == expected


WRONG = {
    "--kd-strategi X": "--kd-strategi: no such flag; near to it: --kd-strategy",
    "--kd-strategi=X": "--kd-strategi: no such flag; near to it: --kd-strategy",
    "--max-tokns 3": "--max-tokns: no such flag; near to it: --max-tokens",
    "--zzzzzz": "--zzzzzz: no such flag; --help lists all",
    "--kd-args {}": "--kd-args: of VarunGumma/fairseq; here --kd-strategy, --kd-rate, --kd-queue-size and",
    "--task translation_with_kd --kd-temp 2": "--kd-temp: of VarunGumma/fairseq; here --kd-temperature (docs/",
    "--encoder-use-glu": "--encoder-use-glu: of VarunGumma/fairseq; nothing here does the same",
    "--alpha 0.3": "--alpha: not without --criterion label_smoothed_cross_entropy_with_kd",
    "--teacher-cache-dir x": "--teacher-cache-dir: not without --task translation_with_kd",
    "--encoder-add-adapters": "--encoder-add-adapters: not without --arch transformer_ext",
    "--arch transformer_adaptor": "--arch transformer_adaptor: unknown; near to it: transformer_adapter",
    "--task translation_kd": "--task translation_kd: unknown; near to it: translation",
    "--lr-scheduler x": "argument --lr-scheduler: invalid choice: 'x' (choose from ",
    "--max-update x": "argument --max-update: invalid int value: 'x'",
    "--max-update": "argument --max-update: expected one argument",
    "--max-update -1e3": "argument --max-update: expected one argument; write --max-update=-1e3",
    "--max-update -s": "argument --max-update: expected one argument\n",
    "words": "words: no flag",
}


@pytest.mark.parametrize("flags", WRONG)
def test_flags_that_are_not_understood(tmp_path, flags):
    result = run(tmp_path / "log", "fairseq-train", "data", *PLUGIN, "--arch", "transformer", *flags.split())
    assert result.returncode == 2
    lines = [line for line in result.output.splitlines() if "INFO" not in line]
    assert len(lines) == 1, result.output
    assert f"{lines[0]}\n".startswith(f"kd_ext: error: {WRONG[flags]}"), lines


@pytest.mark.parametrize("command", ["fairseq-generate", "fairseq-interactive", "fairseq-validate"])
def test_flags_that_other_commands_do_not_understand(tmp_path, command):
    result = run(tmp_path / "log", command, "data", *PLUGIN, "--path", "x", "--activate-encoder-adaptor", "hi")
    assert result.returncode == 2
    expected = "kd_ext: error: --activate-encoder-adaptor: no such flag; near to it: --activate-encoder-adapter"
    assert result.last_line.startswith(expected)
    assert "usage" not in result.output


def test_flags_that_the_cache_does_not_understand(tmp_path):
    result = run(tmp_path / "log", "kd_ext.teacher_cache", "data", "--teacher-cache-topk", "3")
    assert result.returncode == 2
    assert result.last_line.startswith(
        "kd_ext: error: --teacher-cache-topk: no such flag; near to it: --teacher-cache-"
    )


@pytest.mark.parametrize("flags", [[], ["--kd-strategi", "X"], ["no-data", "--task", "translation"]])
def test_without_an_architecture(tmp_path, flags):
    result = run(tmp_path / "log", "fairseq-train", *PLUGIN, *flags)
    assert result.returncode == 2
    assert result.last_line.startswith("kd_ext: error: --arch is missing: ")
    assert "Traceback" not in result.output


TRAIN = "--optimizer adam --lr 0.01 --cpu --criterion cross_entropy"
# what fairseq itself raises, from where a model is built, a batch is made or a command begins
OF_FAIRSEQ = {
    f"fairseq-train {TRAIN} --max-tokens 200 --arch transformer --share-all-embeddings": (
        "--share-all-embeddings requires a joined dictionary; ",
        "fairseq-preprocess --joined-dictionary",
    ),
    f"fairseq-train {TRAIN} --max-tokens 200 --arch transformer_ext --share-all-embeddings": (
        "--share-all-embeddings requires a joined dictionary; ",
        "fairseq-preprocess --joined-dictionary",
    ),
    f"fairseq-train {TRAIN} --max-tokens 200 --arch lstm --share-all-embeddings": (
        "--share-all-embeddings requires a joint dictionary; ",
        "fairseq-preprocess --joined-dictionary",
    ),
    f"fairseq-train {TRAIN} --max-tokens 200 --arch lstm --encoder-layers 2": ("--encoder-layers must match", "layers"),
    f"fairseq-train {TRAIN} --arch transformer": ("Must specify batch size", "--batch-size"),
    "fairseq-generate --cpu": ("--path required", "generation!"),
}


@pytest.fixture(scope="module")
def separate(corpus, tmp_path_factory):
    """The corpus with a dictionary for each side."""
    folder = tmp_path_factory.mktemp("separate")
    pref = [f"--{split}pref={corpus}/raw/{split}" for split in ("train", "valid")]
    flags = ["-s", "src", "-t", "tgt", *pref, "--destdir", folder]
    assert run_as_typed("fairseq-preprocess", *flags).returncode == 0
    return folder


@pytest.mark.parametrize("typed", OF_FAIRSEQ)
def test_what_fairseq_says_of_its_flags_is_one_line(separate, tmp_path, typed):
    name, *flags = typed.split()
    save = ["--save-dir", tmp_path] if name == "fairseq-train" else []
    result = run(tmp_path / "log", name, separate, *PLUGIN, *flags, *save)
    assert result.returncode != 0
    assert "Traceback" not in result.output
    begin, end = OF_FAIRSEQ[typed]
    assert result.last_line.startswith(f"kd_ext: error: {begin}")
    assert end in result.last_line


NOT_THERE = {  # of the folder of data, with other flags before and behind it
    "no folder": ("{there}/no", "", "{there}/no: No such file or directory; name the folder"),
    "no part": ("{there}:{there}/1", "--log-interval 1", "{there}: {there}/1: No such file or directory; name"),
    "named as another flag's value": ("no", "--wandb-project no", "no: No such file or directory; name the folder"),
    "an empty folder": ("{there}/empty", "", "no pair of languages is in the names of the data's files; "),
    "no such language": ("{there}", "-s de -t tgt", "{there}: {there}/dict.de.txt: No such file"),
    "no such set": ("{there}", "--train-subset trn", "{there}: it has no set 'trn' of these languages; "),
    "no such set to validate with": (
        "{there}",
        "--valid-subset dev",
        "{there}: it has no set 'dev' of these languages",
    ),
    "a folder that is read-only": ("{there}", "--save-dir /proc/sys", "--save-dir /proc/sys: /proc/sys/dummy: "),
    "no folder of a log": ("{there}", "--log-file no/log", "--log-file no/log: "),
    "more processes than GPUs": (
        "{there}",
        "--distributed-world-size 2",
        "--distributed-world-size 2: ",
    ),
    "too few positions": (
        "{there}",
        "--max-source-positions 1 --max-target-positions 1 --disable-validation",
        "no sentence of a set is left: ",
    ),
}


@pytest.mark.parametrize(("data", "flags", "begin"), NOT_THERE.values(), ids=NOT_THERE)
def test_data_that_is_not_there_is_one_line(separate, tmp_path, data, flags, begin):
    (separate / "empty").mkdir(exist_ok=True)
    command = [*TRAIN.split(), "--max-tokens", "200", "--arch", "transformer", "--save-dir", tmp_path / "s"]
    result = run(tmp_path / "log", "fairseq-train", data.format(there=separate), *PLUGIN, *command, *flags.split())
    assert result.returncode != 0
    assert "Traceback" not in result.output
    assert result.last_line.startswith(f"kd_ext: error: {begin.format(there=separate)}")


def test_files_by_name_and_value_in_one_word(student, data, tmp_path):
    (tmp_path / "latin1").write_bytes("dr\xe9i".encode("latin1"))
    for name, said in (("no", "No such file or directory"), ("latin1", "not in UTF-8 (byte 2: ")):
        flags = ["--path", student, "--cpu", f"--input={tmp_path}/{name}"]
        result = run(tmp_path / "log", "fairseq-interactive", data, *PLUGIN, *flags)
        assert result.last_line.startswith(f"kd_ext: error: --input {tmp_path}/{name}: {said}")
    result = run(tmp_path / "log", "fairseq-validate", data, *PLUGIN, "--path", student, "--cpu", "--max-tokens", "3")
    assert result.last_line.startswith("kd_ext: error: --max-tokens 3 (or --max-tokens-valid): a sentence has more")


def test_what_is_typed_in_another_encoding(student, data):
    command = [script("fairseq-interactive"), str(data), *PLUGIN, "--path", str(student), "--cpu"]
    strict = {**ENVIRONMENT, "PYTHONIOENCODING": "utf-8"}  # as most locales have it
    done = subprocess.run(command, input=b"w1 \xff\n", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=strict)
    last = done.stderr.decode().strip().splitlines()[-1]
    assert last.startswith("kd_ext: error: --input -: not in UTF-8 (byte 3: ")


WITHOUT_SACREMOSES = (
    "import sys; sys.modules['sacremoses'] = None; from fairseq.data.encoders import moses_tokenizer as moses; "
    "moses.MosesTokenizer(moses.MosesTokenizerConfig())"
)
OF_ANOTHER_TYPE = (
    "from fairseq.dataclass import configs, utils; from omegaconf import OmegaConf; "
    "utils.merge_with_parent(configs.CommonConfig(), OmegaConf.create({'seed': '1e6'}))"
)
IN_A_WORKER = """
import torch.multiprocessing, kd_ext
from fairseq import utils
def work(rank):
    {0}
torch.multiprocessing.start_processes(work, nprocs=1, start_method="fork")
"""


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("utils.get_activation_fn('x')", "kd_ext: error: --activation-fn x not supported"),
        (
            WITHOUT_SACREMOSES,
            "kd_ext: error: Please install Moses tokenizer with: pip install sacremoses; "
            "or give no 'moses' to --eval-bleu-detok or --tokenizer",
        ),
        (
            OF_ANOTHER_TYPE,
            "kd_ext: error: seed: Value '1e6' could not be converted to Integer; mend it in the recipe or on the "
            "command line",
        ),
        ("raise ValueError('of --somebody else')", "ValueError: of --somebody else"),  # not by fairseq
    ],
)
@pytest.mark.parametrize("where", ["worker", "process"])
def test_what_fairseq_raises(raised, expected, where):
    code = IN_A_WORKER.format(raised) if where == "worker" else f"import kd_ext\nfrom fairseq import utils\n{raised}"
    result = run_as_typed("python", "-c", code)
    assert result.returncode == 1
    assert result.last_line == expected
    assert ("Traceback" in result.output) == expected.startswith("ValueError")
