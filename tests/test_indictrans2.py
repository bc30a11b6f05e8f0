"""docs/indictrans2.md in small: its path from tagged text to translations, and a teacher of a module of its own."""

import random
import re
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from commands import PLUGIN, ROOT, run
from conftest import KD, SIZES, TRAINING, load
from pages import blocks, paste
from test_old_checkpoints import kl
from test_resume import is_trained

DIGITS = {
    "hin_Deva": "शून्य एक दो तीन चार पाँच छह सात आठ नौ",
    "tam_Taml": "पूज्यम् ओन्ड्रु इरण्डु मून्ड्रु नान्गु ऐन्दु आरु एऴु एट्टु ओन्बदु",
    "ben_Beng": "शून्य एक दुइ तिन चार पाँच छय सात आट नय",
}
ENGLISH = "zero one two three four five six seven eight nine"
WIDTHS = {"embed-dim": 32, "ffn-embed-dim": 64, "attention-heads": 2}
SIDES = ("encoder", "decoder")
SMALL = {  # what flags get in place of what the page gives them
    **{f"--{side}-layers": 2 for side in SIDES},
    **{f"--{side}-{name}": value for side in SIDES for name, value in WIDTHS.items()},
    **{"--dropout": 0, "--lr": 0.01, "--warmup-updates": 20, "--max-tokens": 600, "--update-freq": 2},
    **{"--max-update": 100, "--save-interval-updates": 50, "--workers": 1, "--num-workers": 0},
}


def small(block):
    """The same commands for a CPU, with other sizes; of the student, whose width is the default, with a given one.

    The student that is distilled by language does not learn, so that its BLEU does not rise, and patience ends its run.
    """
    for flag, value in SMALL.items():
        block = re.sub(rf"(?<={flag} )[\w.-]+", str(value), block)
    widths = " ".join(f"{flag} {value}" for flag, value in SMALL.items() if flag.endswith(tuple(WIDTHS)))
    block = block.replace("student=(", f"student=({widths} ").replace("training=(", "training=(--log-interval 5 ")
    block = block.replace("--memory-efficient-fp16", "--memory-efficient-bf16 --cpu --no-progress-bar")
    return block.replace("student-languages", "student-languages --lr 1e-9 --max-update 1000 --patience 2")


class Pair(NamedTuple):
    language: str
    source: str
    target: str


def sentences(languages, count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        language, digits = rng.choice(languages), rng.choices(range(10), k=rng.randint(2, 6))
        yield Pair(language, *(" ".join(words.split()[i] for i in digits) for words in (DIGITS[language], ENGLISH)))


class Segmented:
    """Writes text cut by sentencepiece, by a model for each side, with two tags before the source."""

    def __init__(self, folder):
        sentencepiece = pytest.importorskip("sentencepiece")
        self._folder = folder
        self._models = []
        for side in ("source", "target"):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(getattr(pair, side) for pair in sentences(list(DIGITS), 500, seed=0)),
                model_prefix=str(folder / side),
                model_type="bpe",
                vocab_size=100,
                hard_vocab_limit=False,
                character_coverage=1.0,
                minloglevel=2,
            )
            self._models.append(sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.model")))

    def write(self, names, pairs):
        """Both sides of sentences to two files, or the sources to one."""
        cut = [[f"{pair.language} eng_Latn {self._cut(0, pair.source)}", self._cut(1, pair.target)] for pair in pairs]
        for name, lines in zip(names, zip(*cut)):
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def _cut(self, side, text):
        return " ".join(self._models[side].encode(text, out_type=str))


TESTED = {"test": list(DIGITS), "test.tam": ["tam_Taml"]}


@pytest.fixture
def exp(tmp_path):
    """A folder with all that the page takes as given."""
    segmented = Segmented(tmp_path)
    for data, languages, count in (
        ("exp", list(DIGITS), 1500),
        ("seed", list(DIGITS), 300),
        ("tam", ["tam_Taml"], 300),
    ):
        for name, of_set, seed in (("train", count, 1), ("dev", 15, 2)):
            names = [f"{data}/final/{name}.{side}" for side in ("SRC", "TGT")]
            segmented.write(names, sentences(languages, of_set, seed))
    for name, languages in TESTED.items():
        segmented.write([f"{name}.bpe"], sentences(languages, 15, seed=3))
    (tmp_path / "kd_ext").symlink_to(ROOT / "kd_ext")  # `--user-dir kd_ext`, which an installed package is found by
    return tmp_path


def bleu_of(log):
    """Of the validations of a run, in their order."""
    return [float(value) for value in re.findall(r"valid on 'valid' subset .*? \| bleu ([\d.]+)", log)]


def right_words(log, languages):
    """The share of the references' words that are in the translations."""
    hypotheses = re.findall(r"^H-\d+\t\S+\t(.*)$", log, re.MULTILINE)
    references = [pair.target for pair in sentences(languages, 15, seed=3)]
    assert len(hypotheses) == len(references)
    assert set(" ".join(hypotheses).split()) <= set(ENGLISH.split())  # whole words, and no tags
    both = [Counter(x.split()) & Counter(y.split()) for x, y in zip(hypotheses, references)]
    return sum(sum(words.values()) for words in both) / len(" ".join(references).split())


def test_the_path(exp):
    """Each block as it stands on the page, but for sizes, in one shell."""
    pytest.importorskip("sacremoses")  # by which --eval-bleu-detok moses joins words
    result = paste(exp, [small(block) for block in blocks((ROOT / "docs" / "indictrans2.md").read_text())])
    assert result.returncode == 0, result.output
    *logs, _ = result.output.split("| done training in ")
    runs = dict(zip(["teacher", "student", "student-languages", "student_seed_ft", "student_tam"], logs))
    best = {}
    for name, log in runs.items():
        assert f"Saved checkpoint exp/{name}/" in log
        extra = load(exp / "exp" / name / "checkpoint_best.pt")["extra_state"]
        best[name] = extra["best"]
        assert best[name] == pytest.approx(max(bleu_of(log)), abs=0.01)
    assert best["teacher"] > 30
    assert best["student_seed_ft"] > best["student"] > best["student-languages"]

    learned = [float(value) for value in re.findall(r"kd_kl=([\d.]+)", runs["student"])]
    assert learned[-1] < learned[0] / 2
    log = runs["student-languages"]
    tags = Counter(line.split()[0] for line in (exp / "exp/final/train.SRC").read_text(encoding="utf-8").splitlines())
    counted = ", ".join(f"{tag} {tags[tag]}" for tag in DIGITS)
    assert f"{sum(tags.values()):,} sentences, by tags of the source: {counted}; untagged 0" in log
    assert "early stop since valid performance hasn't improved for last 2 runs" in log

    base, adapted = (load(exp / "exp" / x / "checkpoint_best.pt")["model"] for x in ("student_seed_ft", "student_tam"))
    own = {name for name in adapted if ".adapters." in name}
    assert {name.split(".adapters.")[1].split(".")[0] for name in own} == set(DIGITS)
    assert all(torch.equal(adapted[name], base[name]) for name in filter(is_trained, set(adapted) - own))
    for name in own:
        if name.endswith("up.weight"):  # begins as zeros
            assert adapted[name].any() == (".tam_Taml." in name)
    for name, languages in TESTED.items():
        assert right_words((exp / f"{name}.log").read_text(encoding="utf-8"), languages) > 0.6


MODEL_CONFIGS = """
from fairseq.models import register_model_architecture
from fairseq.models.transformer import base_architecture


def small(args, layers):
    args.encoder_layers, args.decoder_layers = layers, layers
    args.encoder_embed_dim = args.decoder_embed_dim = 16
    args.encoder_ffn_embed_dim = args.decoder_ffn_embed_dim = 32
    args.encoder_attention_heads = args.decoder_attention_heads = 2
    args.encoder_normalize_before = args.decoder_normalize_before = True
    args.activation_fn = "gelu"
    base_architecture(args)


@register_model_architecture("transformer", "transformer_18_18")
def of_teachers(args):
    small(args, 2)


@register_model_architecture("transformer", "transformer_IT2_dist")
def of_students(args):
    args.layernorm_embedding = True
    small(args, 1)
"""


def test_a_teacher_of_model_configs(data, tmp_path):
    """Its architecture is registered in a module, its file has settings that no task here has."""
    configs, both = (tmp_path / "IndicTrans2" / name for name in ("model_configs", "both"))
    for folder, text in (
        (configs, "from . import custom_transformer\n"),
        (both, "import kd_ext\nimport model_configs\n"),
    ):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text)
    (configs / "custom_transformer.py").write_text(MODEL_CONFIGS)

    def train(name, *flags):
        save_dir = ["--save-dir", tmp_path / name, "--max-update", 2]
        return run(tmp_path / f"{name}.log", "fairseq-train", data, *TRAINING[2:], *save_dir, *flags)

    of_teacher = ["--arch", "transformer_18_18", "--criterion", "label_smoothed_cross_entropy"]
    result = train("teacher", "--user-dir", configs, *of_teacher)  # as train.sh does, without this plugin
    assert result.returncode == 0, result.output
    path = tmp_path / "teacher" / "checkpoint_last.pt"
    state = load(path)
    state["cfg"]["task"].update(_name="translation_with_kd", language_tags="hin_Deva,tam_Taml", kd_args="{}")
    torch.save(state, path)

    flags = [*KD, "--teacher-checkpoint-path", path, "--kd-strategy", "word_level"]
    same = ["--activation-fn", "gelu", "--encoder-normalize-before", "--decoder-normalize-before", "--dropout", "0"]
    same += [*SIZES, "--encoder-layers", 2, "--decoder-layers", 2, "--finetune-from-model", path, "--lr", "1e-9"]
    plugin = ["--user-dir", ROOT / "kd_ext", "--teacher-user-dir", configs]
    result = train("same", *plugin, *flags, "--arch", "transformer", *same)
    assert result.returncode == 0, result.output
    assert kl(result.output) == 0
    assert re.search(r"has no .*language_tags.*, which are left out", result.output)

    result = train("student", "--user-dir", both, *flags, "--arch", "transformer_IT2_dist")
    assert result.returncode == 0, result.output
    assert "architecture transformer_18_18" in result.output
    translating = ["--path", tmp_path / "student/checkpoint_last.pt", "--cpu", "--beam", 2, "--user-dir", both]
    result = run(tmp_path / "log", "fairseq-generate", data, *translating)
    assert result.returncode == 0, result.output
    assert "H-0" in result.output


def test_as_deep_as_theirs(distil, data, tmp_path):
    """18 + 18 layers, as their student has, for two updates; and it translates."""
    deep = ["--encoder-layers", "18", "--decoder-layers", "18", "--activation-fn", "gelu", "--layernorm-embedding"]
    deep += ["--encoder-normalize-before", "--decoder-normalize-before", "--share-decoder-input-output-embed"]
    run_flags = ["--memory-efficient-bf16", "--update-freq", "2", "--max-update", "2"]
    result = distil(tmp_path, *deep, *run_flags, strategy="word_level")
    assert result.returncode == 0, result.output
    assert "kd_kl" in result.output
    path = tmp_path / "checkpoint_last.pt"
    flags = [data, *PLUGIN, "--path", path, "--gen-subset", "test", "--beam", "1", "--max-len-b", "5", "--cpu"]
    result = run(tmp_path / "generate.log", "fairseq-generate", *flags)
    assert result.returncode == 0, result.output
    assert "H-0" in result.output
