"""Training sets of a teacher's translations, against plain scripts over what fairseq-generate prints."""

import math
import random
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import sacrebleu
import torch
from commands import ENVIRONMENT, PLUGIN, Forked, run
from conftest import SIZES, TRAINING, load
from corpus import preprocess
from fairseq.data import Dictionary, indexed_dataset
from test_foreign_tasks import base_dictionary, folder, made, sentences  # noqa: F401
from test_teacher import USER_MODULE
from test_torch_compile import HAS_COMPILER

from kd_ext.errors import ConfigError
from kd_ext.modules.chunked_logits import LinearLogits
from kd_ext.modules.teacher import Teacher
from kd_ext.sequences import flags as command_line
from kd_ext.sequences import reverse_scores
from kd_ext.sequences.binarized import write_side
from kd_ext.sequences.choosing import Hypothesis, choose, failure_of, has_loop
from kd_ext.sequences.reverse_scores import ReverseScores

COMMAND = "kd_ext.sequence_distillation"
FLAGS = ["--beam", "4", "--max-len-b", "12", "--max-tokens", "120", "--cpu"]


def distilled(data, teacher, destdir, *flags):
    log = destdir.parent / f"{destdir.name}.log"
    return run(log, COMMAND, data, "--path", teacher, "--destdir", destdir, *FLAGS, *flags)


def made_of(data, teacher, destdir, *flags):
    result = distilled(data, teacher, destdir, *flags)
    assert result.returncode == 0, result.output[-2000:]
    return result


def read(prefix, words):
    """The sentences of one side of binarized data, as text."""
    dataset = indexed_dataset.make_dataset(str(prefix), "mmap")
    found = []
    for i in range(len(dataset)):
        tokens = dataset[i].tolist()
        assert tokens[-1] == words.eos()
        found.append(" ".join(words[token] for token in tokens[:-1]))
    return found


def both_sides(data, split="train"):
    words = Dictionary.load(str(data / "dict.src.txt"))
    return [read(data / f"{split}.src-tgt.{side}", words) for side in ("src", "tgt")]


@pytest.fixture(scope="module")
def n_best(data, teacher, tmp_path_factory):
    """What fairseq-generate prints: of each sentence the hypotheses in order, as (score, text)."""
    log = tmp_path_factory.mktemp("generate") / "log"
    flags = [data, "--path", teacher, *PLUGIN, "--gen-subset", "train", "--nbest", "4", *FLAGS]
    result = run(log, "fairseq-generate", *flags)
    assert result.returncode == 0, result.output
    found = defaultdict(list)
    for line in result.output.splitlines():
        if line.startswith("H-"):
            number, score, text = line[2:].split("\t")
            found[int(number)].append((float(score), text))
    return [found[i] for i in range(len(found))]


def plain_loop(words):
    """By definition: some n-gram of 1 to 4 words, five times in a row."""
    for n in range(1, 5):
        for start in range(len(words) - 5 * n + 1):
            if all(words[start : start + n] == words[start + k * n : start + k * n + n] for k in range(5)):
                return True
    return False


def plain_failure(text, source, ratio=9.0, limit=12):
    words, of_source = text.split(), source.split()
    if not words:
        return "empty"
    if len(words) >= limit:
        return "limit"
    if plain_loop(words):
        return "loop"
    longer, shorter = max(len(words), len(of_source)), min(len(words), len(of_source))
    return "ratio" if longer > ratio * shorter else ""


@pytest.fixture(scope="module")
def best(data, teacher, tmp_path_factory):
    destdir = tmp_path_factory.mktemp("best") / "data"
    return destdir, made_of(data, teacher, destdir)


def test_best(data, best, n_best):
    """The best hypothesis of each sentence, or the reference, in the order of the set."""
    destdir, _ = best
    sources, references = both_sides(data)
    kinds = [plain_failure(hypotheses[0][1], source) for hypotheses, source in zip(n_best, sources)]
    assert len({*kinds}) > 1
    wanted = [ref if kind else h[0][1] for h, ref, kind in zip(n_best, references, kinds)]
    assert both_sides(destdir) == [sources, wanted]
    lines = (destdir / "failures.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[:2] for line in lines] == [[str(i), k] for i, k in enumerate(kinds) if k]
    rows = [line.split("\t") for line in (destdir / "translations.tsv").read_text().splitlines()]
    assert rows[0] == ["id", "score", "ratio", "choice", "reverse", "text"]
    for i, row in enumerate(rows[1:]):
        assert row[0] == str(i)
        assert row[5] == wanted[i]
        if not kinds[i]:
            assert float(row[1]) == pytest.approx(n_best[i][0][0], abs=1e-3)
            assert row[2] == f"{len(wanted[i].split()) / len(sources[i].split()):.2f}"


def test_table(best, data, n_best):
    _, result = best
    sources, references = both_sides(data)
    kinds = [plain_failure(hypotheses[0][1], source) for hypotheses, source in zip(n_best, sources)]
    assert "| sentences | 300 |" in result.output
    for kind, said in (("limit", "cut off at the length limit"), ("loop", "a loop of words")):
        if kinds.count(kind):
            assert f"| the reference instead: {said} | {kinds.count(kind)} |" in result.output
    hypotheses = [h[0][1] for h in n_best]
    for name, metric in (("BLEU", sacrebleu.corpus_bleu), ("chrF", sacrebleu.corpus_chrf)):
        wanted = f"{metric(hypotheses, [references]).score:.1f}"
        assert f"| {name} of the teacher against the references | {wanted} |" in result.output


def test_the_rest_comes_along(best, data):
    destdir, _ = best
    for name in ("dict.src.txt", "dict.tgt.txt", "valid.src-tgt.src.bin", "test.src-tgt.tgt.idx"):
        assert (destdir / name).read_bytes() == (data / name).read_bytes()
    assert not Path(f"{destdir}.part").exists()


def test_fairseq_trains_on_it(best, teacher, tmp_path):
    destdir, _ = best
    flags = [destdir, *TRAINING, "--arch", "transformer", *SIZES, "--max-update", "2", "--save-dir", tmp_path]
    result = run(tmp_path / "log", "fairseq-train", *flags, "--criterion", "label_smoothed_cross_entropy")
    assert result.returncode == 0, result.output


@pytest.mark.parametrize("metric", ["chrf", "bleu"])
def test_closest(data, teacher, n_best, tmp_path, metric):
    made_of(data, teacher, tmp_path / "out", "--choose", "closest", "--closest-by", metric)
    sources, references = both_sides(data)
    score = {"chrf": sacrebleu.sentence_chrf, "bleu": sacrebleu.sentence_bleu}[metric]
    wanted, places = [], []
    for hypotheses, source, reference in zip(n_best, sources, references):
        values = [score(text, [reference]).score for _, text in hypotheses]
        places.append(values.index(max(values)))
        text = hypotheses[places[-1]][1]
        wanted.append(reference if plain_failure(text, source) else text)
    assert len({*places}) == 4
    assert both_sides(tmp_path / "out") == [sources, wanted]


def test_all_with_references(data, teacher, n_best, tmp_path):
    made_of(data, teacher, tmp_path / "out", "--choose", "all", "--with-references")
    sources, references = both_sides(data)
    pairs = []
    for hypotheses, source, reference in zip(n_best, sources, references):
        good = [text for _, text in hypotheses if not plain_failure(text, source)]
        pairs += [(source, text) for text in good or [reference]]
    pairs += zip(sources, references)
    assert both_sides(tmp_path / "out") == [list(side) for side in zip(*pairs)]


def test_drops_by_score(data, teacher, n_best, tmp_path):
    sources, _ = both_sides(data)
    good = [i for i, (h, s) in enumerate(zip(n_best, sources)) if not plain_failure(h[0][1], s)]
    least = sorted(n_best[i][0][0] for i in good)[len(good) // 3] + 1e-4
    made_of(data, teacher, tmp_path / "out", f"--min-score={least}")
    kept = [i for i in range(len(sources)) if i not in good or n_best[i][0][0] >= least]
    assert both_sides(tmp_path / "out")[0] == [sources[i] for i in kept]


@pytest.mark.parametrize("more", [[], ["--with-references"], ["--choose", "all"]])
def test_all_are_dropped(data, teacher, n_best, tmp_path, more):
    """Scores are under 0. What is translated is kept for another value."""
    message = refused(data, teacher, tmp_path / "out", "--min-score", "0", *more)
    sources, _ = both_sides(data)
    taken = 4 if "all" in more else 1
    scores = [score for n, s in zip(n_best, sources) for score, text in n[:taken] if not plain_failure(text, s)]
    said = "kd_ext: error: --min-score 0.0: every translation is dropped; the best score is"
    found = re.fullmatch(rf"{said} (-\S+)", message)
    assert float(found[1]) == pytest.approx(max(scores), abs=1e-3)
    assert not (tmp_path / "out").exists()
    result = made_of(data, teacher, tmp_path / "out", *more)
    assert "300 sentences are translated already" in result.output


def test_all_fail(data, teacher, tmp_path):
    message = refused(data, teacher, tmp_path / "out", "--max-len-b", "1", "--with-references")
    assert f"--path {teacher}: no translation of it can be used (cut off at the length limit 300)" in message
    assert not (tmp_path / "out").exists()


def test_drops_by_a_model_of_the_reverse_direction(data, teacher, n_best, train, tmp_path):
    """Against log-probabilities of its own model, sentence by sentence, in float64."""
    from fairseq import checkpoint_utils

    flags = ["--criterion", "label_smoothed_cross_entropy", "--max-update", "30", "-s", "tgt", "-t", "src"]
    assert train(tmp_path / "reverse", *flags).returncode == 0
    path = tmp_path / "reverse" / "checkpoint_last.pt"
    made_of(data, teacher, tmp_path / "out", "--rescore", path, "--drop-worst", "0.25")
    sources, _ = both_sides(data)
    words = Dictionary.load(str(data / "dict.src.txt"))
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    model.double().eval()
    scores = {}
    for i, (hypotheses, source) in enumerate(zip(n_best, sources)):
        if plain_failure(hypotheses[0][1], source):
            continue
        asked, target = (words.encode_line(x, add_if_not_exist=False).long() for x in (hypotheses[0][1], source))
        prev = torch.cat([target[-1:], target[:-1]])
        with torch.no_grad():
            output = model(asked[None], torch.tensor([len(asked)]), prev[None])
            log_probs = model.get_normalized_probs(output, log_probs=True)[0]
        scores[i] = log_probs.gather(1, target[:, None]).mean().item() / math.log(2)
    worst = sorted(scores, key=scores.get)[: len(scores) // 4]
    kept = [i for i in range(len(sources)) if i not in worst]
    assert both_sides(tmp_path / "out")[0] == [sources[i] for i in kept]
    rows = [line.split("\t") for line in (tmp_path / "out" / "translations.tsv").read_text().splitlines()[1:]]
    for row in rows:
        if row[4]:
            assert float(row[4]) == pytest.approx(scores[int(row[0])], abs=1e-3)


def test_a_model_of_the_reverse_direction_from_a_user_module(data, teacher, tmp_path):
    """Whatever is wrong with it, --rescore is to blame, or the flag for its settings."""
    module, path = tmp_path / "somebodys_folder", tmp_path / "reverse.pt"
    module.mkdir()
    (module / "__init__.py").write_text(USER_MODULE)
    state = load(teacher)
    state["cfg"]["task"].update(source_lang="tgt", target_lang="src")
    vars(state["cfg"]["model"]).update(arch="somebodys_model", _name="somebodys_model")
    torch.save(state, path)
    flags = ["--beam", "1", "--rescore", path, "--drop-worst", "0.5"]
    message = refused(data, teacher, tmp_path / "out", *flags)
    assert message.startswith(f"kd_ext: error: --rescore {path}: its architecture 'somebodys_model' is not registered")
    flags += ["--teacher-user-dir", module]
    settings = "{'no_such': 1}"
    message = refused(data, teacher, tmp_path / "out", *flags, "--rescore-model-overrides", settings)
    assert f"--rescore-model-overrides {settings}: " in message
    made_of(data, teacher, tmp_path / "out", *flags, "--rescore-model-overrides", f"{{'data': '{data}'}}")


def contents(data):
    return {path.name: path.read_bytes() for path in data.iterdir()}


def test_two_processes_are_one(best, data, teacher, tmp_path):
    made_of(data, teacher, tmp_path / "out", "--processes", "2")
    assert contents(tmp_path / "out") == contents(best[0])


@pytest.mark.parametrize("seed", range(3))
def test_killed_and_started_again(best, data, teacher, tmp_path, seed):
    """At random moments, with sampling's own seeds left aside: what comes out is what comes out of one start."""
    rng, kills = random.Random(seed), 0
    work = tmp_path / "out.part"

    def lines():
        return sum(path.read_bytes().count(b"\n") for path in work.glob("work-*")) if work.exists() else 0

    flags = [data, "--path", teacher, "--destdir", tmp_path / "out", *FLAGS]
    for number in range(3):
        enough, started = lines() + rng.randint(0, 5), time.time()
        later = started + 3 + 4 * rng.random()
        command = Forked(tmp_path / f"log{number}", COMMAND, *flags)
        kills += command.is_killed_when(lambda enough=enough, later=later: lines() > enough or time.time() > later)
        assert not (tmp_path / "out").exists() or command.wait().returncode == 0
    if not (tmp_path / "out").exists():
        result = distilled(data, teacher, tmp_path / "out")
        assert result.returncode == 0, result.output
    assert kills > 0
    assert contents(tmp_path / "out") == contents(best[0])


def test_sampling_does_not_depend_on_the_processes(data, teacher, tmp_path):
    flags = ["--sampling", "--sampling-topk", "5", "--seed", "3"]
    made_of(data, teacher, tmp_path / "one", *flags)
    made_of(data, teacher, tmp_path / "two", *flags, "--processes", "2")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    made_of(data, teacher, tmp_path / "other", *flags[:-1], "4")
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_parts(data, teacher, student, tmp_path):
    """Data in several folders gives as many."""
    second = tmp_path / "second"
    preprocess(tmp_path / "made", train=20)
    shutil.copytree(tmp_path / "made" / "bin", second)
    words = data / "dict.src.txt"
    for side in ("src", "tgt"):
        shutil.copy(words, second / f"dict.{side}.txt")
    result = made_of(f"{data}:{second}", teacher, tmp_path / "out")
    assert result.last_line == f"train with {tmp_path}/out/0:{tmp_path}/out/1"
    assert both_sides(tmp_path / "out" / "1")[0] == both_sides(second)[0]
    assert len(both_sides(tmp_path / "out" / "0")[0]) == 300
    message = refused(f"{data}:{second}", teacher, tmp_path / "out")
    assert f"--destdir {tmp_path}/out: is there" in message
    made = contents(tmp_path / "out" / "1")
    shutil.rmtree(tmp_path / "out" / "1")
    for flags, part in {
        ("--lenpen", "0.5"): "--lenpen 1.0, and this is 0.5",
        ("--min-score=-9",): "--min-score None, and this is -9.0",
    }.items():
        message = refused(f"{data}:{second}", teacher, tmp_path / "out", *flags)
        assert f"{tmp_path}/out/0: was made with {part}" in message
    message = refused(f"{data}:{second}", student, tmp_path / "out")
    assert f"{tmp_path}/out/0: was made with teacher" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0"]
    made_of(f"{data}:{second}", teacher, tmp_path / "out")  # goes on
    assert contents(tmp_path / "out" / "1") == made


@pytest.mark.parametrize("kind", ["empty", "data", "file", "link", "another's"])
def test_what_is_no_part_of_this_commands(data, teacher, tmp_path, kind):
    """In the place of one of several."""
    own = tmp_path / "out" / "0"
    (own if kind in ("empty", "another's") else own.parent).mkdir(parents=True)
    if kind == "data":
        shutil.copytree(data, own)
    elif kind == "file":
        own.write_text("mine")
    elif kind == "link":
        own.symlink_to(tmp_path / "nowhere")
    elif kind == "another's":
        (own / "manifest.json").write_text("[1]")
    message = refused(f"{data}:{data}", teacher, tmp_path / "out")
    assert f"--destdir: {own} is there, and this command did not make it" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0"]


# what makes a teacher of random weights end its translations, which it would not: of which word the one that ends them
# gets the output's weights (None: its own), and how often
ENDS = {
    "m2m": (None, 4),
    "m2m replacing": (None, 4),
    "mbart": (None, 4),
    "mbart50": (None, -4),
    "mbart with bos": (12, 1.2),
    "multilingual langtok": (None, 8),
}


def make_ending(kind, end, model, path):
    """Change a model of random weights, and its file."""
    word, times = ENDS[kind]
    weight = model.decoder.output_projection.weight
    with torch.no_grad():
        weight[end] = weight[end if word is None else word] * times
    state = load(path)
    for name, saved in state["model"].items():
        if name.endswith("output_projection.weight"):
            saved[end] = weight[end].detach()
    torch.save(state, path)


@pytest.mark.parametrize("kind", ENDS)
def test_teachers_of_other_tasks(kind, folder, tmp_path):  # noqa: F811
    """Beam 1 against the model's own greedy choice, as its task begins and ends its translations."""
    words, model = made(kind, tmp_path / "teacher.pt", folder)
    hi, en, b_hi, b_en = (words.index(x) for x in ("__hi__", "__en__", "[hi]", "[en]"))
    eos = words.eos()
    end = b_en if kind.startswith("mbart") and kind != "mbart50" else eos
    make_ending(kind, end, model, tmp_path / "teacher.pt")
    plain = base_dictionary()
    source, target = sentences(plain, count=6)
    data = tmp_path / "data"
    data.mkdir()
    for language, side in (("hi", source), ("en", target)):
        plain.save(str(data / f"dict.{language}.txt"))
        builder = indexed_dataset.make_builder(str(data / f"train.hi-en.{language}.bin"), "mmap", len(plain))
        for sentence in side:
            builder.add_item(sentence.int())
        builder.finalize(str(data / f"train.hi-en.{language}.idx"))
    result = made_of(data, tmp_path / "teacher.pt", tmp_path / "out", "--beam", "1", "--choose", "all")
    found = read(tmp_path / "out" / "train.hi-en.en", plain)
    failed = dict(line.split("\t")[:2] for line in (tmp_path / "out/failures.tsv").read_text().splitlines()[1:])
    assert len(failed) < len(source)
    for i, tokens in enumerate(source):
        src = {
            "m2m": [hi, *tokens.tolist()],
            "m2m replacing": [*tokens.tolist()[:-1], hi],
            "mbart": [*tokens.tolist(), b_hi],
            "mbart50": [b_hi, *tokens.tolist()],
            "mbart with bos": [words.bos(), *tokens.tolist(), b_hi],
            "multilingual langtok": [*tokens.tolist()[:-1], en],
        }[kind]
        prev = {
            "m2m": [eos, en],
            "m2m replacing": [en],
            "mbart": [b_en],
            "mbart50": [eos, b_en],
            "mbart with bos": [b_en, words.bos()],
            "multilingual langtok": [en],
        }[kind]
        begin = len(prev)
        while len(prev) < begin + 14:
            with torch.no_grad():
                logits = model(torch.tensor([src]), torch.tensor([len(src)]), torch.tensor([prev]))[0][0, -1]
            logits[words.pad()] = -float("inf")
            if len(prev) == 1:
                logits[end] = -float("inf")  # fairseq's --min-len 1
            prev.append(int(logits.argmax()))
            if prev[-1] == end:
                break
        body = prev[begin:]
        if body and body[-1] == end:
            body.pop()
        if body and body[-1] == eos:
            body.pop()
        if str(i) in failed:
            assert failed[str(i)] in ("limit", "loop", "words", "empty", "ratio")
            assert found[i] == " ".join(plain[t] for t in target[i].tolist()[:-1])
        else:
            assert found[i] == " ".join(words[t] for t in body), result.output


def test_tokens_at_the_head_of_targets_stay(folder, tmp_path):  # noqa: F811
    """Text with M2M-100's tokens: each translation begins with that of its reference."""
    words, model = made("m2m", tmp_path / "teacher.pt", folder)
    make_ending("m2m", words.eos(), model, tmp_path / "teacher.pt")
    source, target = sentences(words, count=6)
    data = tmp_path / "data"
    data.mkdir()
    heads = [words.index(x) for x in ("__en__", "__ta__")]
    for language, side in (("src", source), ("tgt", target)):
        words.save(str(data / f"dict.{language}.txt"))
        builder = indexed_dataset.make_builder(str(data / f"train.src-tgt.{language}.bin"), "mmap", len(words))
        for i, sentence in enumerate(side):
            head = words.index("__hi__") if language == "src" else heads[i % 2]
            builder.add_item(torch.tensor([head, *sentence.tolist()]).int())
        builder.finalize(str(data / f"train.src-tgt.{language}.idx"))
    made_of(data, tmp_path / "teacher.pt", tmp_path / "out", "--beam", "2")
    found = read(tmp_path / "out" / "train.src-tgt.tgt", words)
    assert [text.split()[0] for text in found] == ["__en__", "__ta__"] * 3


def refused(data, teacher, destdir, *flags, command=distilled):
    result = command(data, teacher, destdir, *flags)
    assert result.returncode != 0, flags
    assert result.last_line.startswith("kd_ext: error: "), result.output[-1500:]
    assert "Traceback" not in result.output
    return result.last_line


def test_bad_usage(data, teacher, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").write_text("mine")
    assert f"--destdir {there}" in refused(data, teacher, there)
    assert (there / "file").read_text() == "mine"
    assert "--destdir" in refused(data, teacher, data)
    assert "holds the data" in refused(data, teacher, data.parent)
    out = tmp_path / "out"
    for flags, parts in {
        ("--processes", "0"): ["--processes 0"],
        ("--max-ratio", "0.5"): ["--max-ratio 0.5"],
        ("--drop-worst", "0.1"): ["--drop-worst 0.1", "--rescore"],
        ("--rescore", teacher): ["--rescore", "--drop-worst"],
        ("--drop-worst", "1.5", "--rescore", teacher): ["--drop-worst 1.5"],
        ("--rescore", teacher, "--drop-worst", "0.5"): [f"--rescore {teacher}: ", "from src to tgt", "from tgt to src"],
        ("--rescore", "no.pt", "--drop-worst", "0.5"): ["--rescore no.pt: no such file"],
        ("--rescore", tmp_path, "--drop-worst", "0.5"): [f"--rescore {tmp_path}: a folder"],
        ("--rescore-model-overrides", "{}#"): ["--rescore-model-overrides {}#", "without --rescore"],
        ("--subset", "no"): ["no"],
        ("--beam", "0"): ["--beam 0"],
        ("--prefix-size", "-1"): ["--prefix-size -1"],
        ("--min-score", "nan"): ["--min-score nan"],
        ("--post-process", "nonsense"): ["--post-process nonsense", "sentencepiece"],
        ("--task", "translation_lev"): ["--task translation_lev"],
        ("--batch-size", "0"): ["--batch-size 0"],
        ("--sampling", "--sampling-topp", "2"): ["--sampling-topp 2"],
        ("--max-len-b", "0"): ["--max-len-b 0", "--min-len 1"],
        ("--max-len-a", "0.2", "--max-len-b", "0", "--min-len", "2"): ["--max-len-a 0.2 --max-len-b 0", "--min-len 2"],
        ("--max-len-b", "2000", "--min-len", "1500"): ["--min-len 1500", "at most 1023 tokens"],
    }.items():
        message = refused(data, teacher, out, *flags)
        assert all(part in message for part in parts), message
    assert "--path no.pt" in refused(data, "no.pt", out)
    assert not out.exists()
    assert not (tmp_path / "out.part").exists()


def test_flags_that_would_do_nothing(data, teacher, tmp_path):
    for flags, parts in {
        ("--gen-subset", "valid"): ["--gen-subset valid", "--subset"],
        ("--nbest", "2"): ["--nbest 2", "--beam"],
        ("--num-shards", "2", "--shard-id", "1"): ["--num-shards 2", "--processes"],
        ("--score-reference",): ["--score-reference:"],
        ("--constraints",): ["--constraints"],
        ("--match-source-len",): ["--match-source-len:", "cut off or not"],
        ("--teacher-checkpoint-path", teacher): [f"--teacher-checkpoint-path {teacher}: ", "flag is --path"],
        ("--teacher-dtype", "float16"): ["--teacher-dtype float16", "--fp16"],
        ("--quiet", "--num-workers", "3", "--bpe", "sentencepiece"): ["--bpe sentencepiece --num-workers 3 --quiet:"],
        ("--num-batch-buckets", "3", "--left-pad-target"): ["--num-batch-buckets 3", "without padding"],
        ("--closest-by", "bleu"): ["--closest-by bleu", "--choose closest"],
        ("--max-source-positions", "3"): ["--max-source-positions 3", "--truncate-source"],
        ("--kd-language-side", "target"): ["--kd-language-side target", "a teacher for each language"],
    }.items():
        message = refused(data, teacher, tmp_path / "out", *flags)
        assert all(part in message for part in parts), message


def test_every_flag_is_used_or_refused(monkeypatch):
    """All that the parser knows, with any other value than its default, each alone."""
    parsers = []
    monkeypatch.setattr(command_line, "check_used", lambda given, parser: parsers.append((given, parser)))
    command_line.parse(["data", "--path", "x", "--destdir", "y"], "")
    ((given, parser),) = parsers
    monkeypatch.undo()
    known = {action.dest for action in parser._actions} - {"help"}
    assert known >= {*command_line._USED, *command_line._INSTEAD, *command_line._ONLY_WITH}
    assert not command_line._USED & command_line._INSTEAD.keys()
    refused = {name for name in known if is_refused(Namespace(**{**vars(given), name: "another"}), parser)}
    assert refused == (known - command_line._USED) | {*command_line._ONLY_WITH}
    assert refused >= {"results_path", "print_alignment", "teacher_cache_top_k", "optimizer", "eval_bleu", "log_format"}


def is_refused(given, parser):
    try:
        command_line.check_used(given, parser)
    except ConfigError:
        return True
    return False


def test_averaged_weights(data, teacher, student, tmp_path):
    """--teacher-ema: the translations of the model that has these weights as its own."""
    state = load(teacher)
    state["extra_state"]["ema"] = load(student)["model"]
    torch.save(state, tmp_path / "both.pt")
    made_of(data, tmp_path / "both.pt", tmp_path / "averaged", "--teacher-ema")
    for name, path in (("raw", tmp_path / "both.pt"), ("wanted", student)):
        made_of(data, path, tmp_path / name)
    assert both_sides(tmp_path / "averaged") == both_sides(tmp_path / "wanted") != both_sides(tmp_path / "raw")
    assert "--teacher-ema" in refused(data, teacher, tmp_path / "none", "--teacher-ema")


def test_truncated_sources(data, teacher, tmp_path):
    made_of(data, teacher, tmp_path / "out", "--truncate-source", "--max-source-positions", "4")
    assert both_sides(tmp_path / "out")[0] == [" ".join(source.split()[:3]) for source in both_sides(data)[0]]


def test_a_flag_that_decoding_refuses(data, teacher, tmp_path):
    """What was only begun is no work to go on with: the right flags do at once."""
    message = refused(data, teacher, tmp_path / "out", "--diverse-beam-groups", "3")
    assert "--beam" in message
    assert not (tmp_path / "out.part").exists()


def test_a_folder_named_with_a_slash(best, data, teacher, tmp_path):
    result = run(tmp_path / "log", COMMAND, data, "--path", teacher, "--destdir", f"{tmp_path}/out/", *FLAGS)
    assert result.returncode == 0, result.output[-1000:]
    assert contents(tmp_path / "out") == contents(best[0])


def test_other_sentences_of_the_same_lengths(data, teacher, tmp_path):
    """Work on data that was made anew is other work."""
    own = tmp_path / "data"
    shutil.copytree(data, own)
    command = Forked(tmp_path / "log", COMMAND, own, "--path", teacher, "--destdir", tmp_path / "out", *FLAGS)
    work = tmp_path / "out.part"
    command.kill_when(lambda: any(path.stat().st_size for path in work.glob("work-*")))
    words = Dictionary.load(str(own / "dict.src.txt"))
    prefix = str(own / "train.src-tgt.src")
    before = read(prefix, words)
    Path(f"{prefix}.bin").unlink()
    write_side(prefix, [words.encode_line(x, append_eos=False).tolist()[::-1] for x in before], words)
    assert "data" in refused(own, teacher, tmp_path / "out")


def test_languages_the_other_way_round(data, train, tmp_path):
    """All sets get the names of the new order, so that fairseq reads one pair of languages off them."""
    flags = ["--criterion", "label_smoothed_cross_entropy", "--max-update", "30", "-s", "tgt", "-t", "src"]
    assert train(tmp_path / "reverse", *flags).returncode == 0
    reverse = tmp_path / "reverse" / "checkpoint_last.pt"
    made_of(data, reverse, tmp_path / "out", "-s", "tgt", "-t", "src", "--beam", "1")
    pairs = {path.name.split(".")[1] for path in (tmp_path / "out").glob("*.idx")}
    assert pairs == {"tgt-src"}
    assert (tmp_path / "out" / "valid.tgt-src.src.bin").read_bytes() == (data / "valid.src-tgt.src.bin").read_bytes()


@pytest.mark.parametrize("arch", ["lstm", "short"])
def test_other_models_of_the_reverse_direction(arch, data, teacher, train, tmp_path):
    """A recurrent one wants its sentences sorted; one of few positions is not asked about what is too long for it."""
    flags = ["--criterion", "label_smoothed_cross_entropy", "--max-update", "1", "-s", "tgt", "-t", "src"]
    if arch == "short":
        flags += ["--encoder-learned-pos", "--decoder-learned-pos", "--max-source-positions", "8"]
        flags += ["--max-target-positions", "8", "--skip-invalid-size-inputs-valid-test"]
        result = train(tmp_path / "reverse", *flags)
    else:
        save_dir = tmp_path / "reverse"
        sizes = ["--encoder-embed-dim", "16", "--decoder-embed-dim", "16", "--encoder-hidden-size", "16"]
        sizes += ["--decoder-hidden-size", "16", "--decoder-out-embed-dim", "16", "--save-dir", save_dir]
        result = run(tmp_path / "log", "fairseq-train", data, *TRAINING, *flags, "--arch", "lstm", *sizes)
    assert result.returncode == 0, result.output
    reverse = tmp_path / "reverse" / "checkpoint_last.pt"
    made_of(data, teacher, tmp_path / "out", "--rescore", reverse, "--drop-worst", "0.25")
    rows = [line.split("\t") for line in (tmp_path / "out" / "translations.tsv").read_text().splitlines()[1:]]
    taken = [row for row in rows if row[3] != "reference"]
    sources, _ = both_sides(data)
    for row in taken:
        too_long = max(len(row[5].split()), len(sources[int(row[0])].split())) > 7
        assert (row[4] == "") == (arch == "short" and too_long)
    assert any(row[4] for row in taken)


def test_an_ensemble_that_is_asked_in_two_ways(folder, tmp_path):  # noqa: F811
    """Of one vocabulary, so that nothing else would show it."""
    for kind in ("m2m", "m2m by target"):
        words, _ = made(kind, tmp_path / f"{kind}.pt", folder)
    source, target = sentences(base_dictionary(), count=3)
    (tmp_path / "data").mkdir()
    for language, side in (("hi", source), ("en", target)):
        base_dictionary().save(str(tmp_path / "data" / f"dict.{language}.txt"))
        without_eos = [sentence.tolist()[:-1] for sentence in side]
        write_side(str(tmp_path / "data" / f"train.hi-en.{language}"), without_eos, words)
    both = f"{tmp_path}/m2m.pt:{tmp_path}/m2m by target.pt"
    assert "asked in different ways" in refused(tmp_path / "data", both, tmp_path / "out")


def test_a_teacher_of_other_words(data, tmp_path, train):
    other = preprocess(tmp_path / "other", tagged=False)
    flags = [other, *TRAINING, "--arch", "transformer", *SIZES, "--max-update", "1", "--save-dir", tmp_path / "t"]
    result = run(tmp_path / "log", "fairseq-train", *flags, "--criterion", "label_smoothed_cross_entropy")
    assert result.returncode == 0, result.output
    message = refused(data, tmp_path / "t" / "checkpoint_last.pt", tmp_path / "out")
    assert "--path" in message
    assert "dictionary differs" in message


@pytest.mark.parametrize(("language", "side"), [("src", "source"), ("tgt", "target")])
def test_data_of_another_dictionary(data, teacher, tmp_path, language, side):
    shutil.copytree(data, tmp_path / "bin")
    lines = (data / f"dict.{language}.txt").read_text().splitlines()
    (tmp_path / f"bin/dict.{language}.txt").write_text("\n".join(lines[:20]) + "\n")
    message = refused(tmp_path / "bin", teacher, tmp_path / "out")
    assert f"{tmp_path}/bin: the {side} of its train set was binarized with another dictionary" in message


def test_other_flags_than_it_was_begun_with(data, teacher, tmp_path):
    command = Forked(tmp_path / "log", COMMAND, data, "--path", teacher, "--destdir", tmp_path / "out", *FLAGS)
    work = tmp_path / "out.part"
    command.kill_when(lambda: any(path.stat().st_size for path in work.glob("work-*")))
    message = refused(data, teacher, tmp_path / "out", "--lenpen", "0.5")
    assert str(work) in message
    assert "remove the folder" in message
    made_of(data, teacher, tmp_path / "out")


def test_failures():
    """Random sequences, by definition."""
    rng = random.Random(5)
    found = set()
    for _ in range(4000):
        tokens = [rng.randint(4, 5 + rng.randint(0, 1)) for _ in range(rng.randint(0, 26))]
        assert has_loop(tokens) == plain_loop(tokens), tokens
        hypothesis = Hypothesis(tokens, 0.0, rng.random() < 0.05)
        source_length = rng.randint(1, 30)
        kind = failure_of(hypothesis, source_length, 3.0, 6)
        found.add(kind)
        longer, shorter = max(len(tokens), source_length), min(len(tokens), source_length)
        wanted = [
            ("empty", not tokens),
            ("limit", hypothesis.at_limit),
            ("loop", plain_loop(tokens)),
            ("ratio", shorter > 0 and longer / shorter > 3.0),
            ("words", any(token >= 6 for token in tokens)),
            ("", True),
        ]
        assert kind == next(name for name, holds in wanted if holds)
    assert found == {"empty", "limit", "loop", "ratio", "words", ""}


def test_equals_are_the_earlier_one():
    hypotheses = [Hypothesis([4 + i], -1.0 - i, False) for i in range(3)]
    taken = choose(hypotheses, "closest", lambda tokens: 7.0 if tokens != [4] else 1.0, lambda h: "")
    assert [(one.choice, one.failure) for one in taken] == [(2, "")]
    taken = choose(hypotheses, "all", None, lambda h: "loop")
    assert [(one.choice, one.failure) for one in taken] == [(1, "loop")]


def test_a_folder_of_somebody_elses(data, teacher, tmp_path):
    """What the work would be put into, and then removed, is not this command's."""
    work = tmp_path / "out.part"
    work.mkdir()
    (work / "mine").write_text("mine")
    assert str(work) in refused(data, teacher, tmp_path / "out")
    assert (work / "mine").read_text() == "mine"


def test_two_starts_at_once(data, teacher, tmp_path):
    first = Forked(tmp_path / "log", COMMAND, data, "--path", teacher, "--destdir", tmp_path / "out", *FLAGS)
    while not list((tmp_path / "out.part").glob("work-*")):
        time.sleep(0.01)
    second = distilled(data, teacher, tmp_path / "out")
    assert first.wait().returncode == 0
    assert second.returncode == 0 or "at work there" in second.last_line or "is there" in second.last_line


def test_an_ensemble(data, teacher, student, tmp_path):
    """Against fairseq-generate with both."""
    both = f"{teacher}:{student}"
    flags = [data, "--path", both, *PLUGIN, "--gen-subset", "train", *FLAGS]
    result = run(tmp_path / "log", "fairseq-generate", *flags)
    assert result.returncode == 0, result.output
    texts = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", result.output, re.MULTILINE))
    made_of(data, both, tmp_path / "out", "--max-ratio", "1000")
    sources, references = both_sides(data)
    wanted = []
    for i, (source, reference) in enumerate(zip(sources, references)):
        wanted.append(reference if plain_failure(texts[str(i)], source, 1000) else texts[str(i)])
    assert both_sides(tmp_path / "out") == [sources, wanted]


@pytest.mark.parametrize("room", [400, 4_200, 6_000])
def test_a_disk_that_fills_up(best, data, teacher, tmp_path, room):
    """In one line, and the same command goes on when there is room."""
    flags = [data, "--path", teacher, "--destdir", tmp_path / "out", *FLAGS]
    start = f"import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))"
    start += "; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from kd_ext.sequence_distillation import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", start, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stdout
    assert "cannot be written" in done.stdout.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
    made_of(data, teacher, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(best[0])


def test_a_teacher_for_each_language(data, teacher, student, tmp_path):
    """Each sentence is translated as by its language's teacher alone."""
    for name, path in (("base", teacher), ("of_hi", student)):
        made_of(data, path, tmp_path / name)
    made_of(data, f"hi={student},...={teacher}", tmp_path / "out")
    sources, base = both_sides(tmp_path / "base")
    _, of_hi = both_sides(tmp_path / "of_hi")
    wanted = [theirs if source.startswith("__src__hi ") else ours for source, ours, theirs in zip(sources, base, of_hi)]
    assert wanted != base
    assert wanted != of_hi
    assert both_sides(tmp_path / "out") == [sources, wanted]
    made_of(data, f"hi={student},...={teacher}", tmp_path / "two", "--processes", "2")
    assert contents(tmp_path / "two") == contents(tmp_path / "out")
    message = refused(data, f"hi={student}", tmp_path / "none")
    assert "--path" in message
    assert "none for" in message


@pytest.mark.parametrize("flag", ["--bf16", "--memory-efficient-bf16", "--torch-compile"])
def test_precision_and_compiled_layers(best, data, teacher, tmp_path, flag):
    """bfloat16 has other scores, compiled layers have the same."""
    if flag == "--torch-compile" and not HAS_COMPILER:
        pytest.skip("torch < 2.3")
    made_of(data, teacher, tmp_path / "out", flag)
    scores = [
        [row.split("\t")[1] for row in (out / "translations.tsv").read_text().splitlines()]
        for out in (best[0], tmp_path / "out")
    ]
    assert len(scores[0]) == len(scores[1])
    assert (scores[0] == scores[1]) == (flag == "--torch-compile")


@pytest.mark.parametrize(("words", "kind"), [(3, ""), (4, "ratio")])
def test_of_a_source_without_words(words, kind):
    """Its length counts as one."""
    assert failure_of(Hypothesis([4, 5, 6, 4, 5, 6][:words], 0.0, False), 0, 3.0, 9) == kind


class ByPreviousWord(torch.nn.Module):
    """Of features whose logits depend on the previous word and on how many words were asked."""

    def __init__(self, seed, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(20, 6, generator=generator).to(dtype)
        self.weight = (torch.randn(20, 6, generator=generator) * 2).to(dtype)

    def max_positions(self):
        return 50, 40

    def forward(self, src_tokens, src_lengths, prev_output_tokens, features_only):
        return self.table[prev_output_tokens] * src_lengths[:, None, None].to(self.table.dtype) / 8, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [4, 256])
def test_reverse_scores(monkeypatch, dtype, count, rows):
    """Word by word in float64, of one model or of the mean of several; the logits alone are in half precision."""
    monkeypatch.setattr(reverse_scores, "_ROWS", rows)
    words = Dictionary()
    models = [ByPreviousWord(seed, dtype) for seed in range(count)]
    projections = [lambda x, m=m: LinearLogits(x, m.weight) for m in models]
    scores = ReverseScores(Teacher(models, projections), words, torch.device("cpu"))
    generator = torch.Generator().manual_seed(9)
    translations, sources = (
        [torch.randint(4, 20, (n,), generator=generator).tolist() for n in lengths]
        for lengths in ((7, 5, 3), (2, 9, 4))
    )
    found = scores(translations, sources)
    for value, asked, source in zip(found, translations, sources):
        total, previous = 0.0, words.eos()
        for word in [*source, words.eos()]:
            logits = [(m.table[previous] * (len(asked) + 1) / 8) @ m.weight.t() for m in models]
            total += math.log(sum(x.double().softmax(0)[word].item() for x in logits) / count)
            previous = word
        assert value == pytest.approx(total / (len(source) + 1) / math.log(2), rel=2e-5)


def test_what_is_too_long_for_a_model_and_what_its_task_puts_in():
    teacher = SimpleNamespace(
        models=[SimpleNamespace(max_positions=lambda: (9, 8)), SimpleNamespace(max_positions=lambda: (7, 10))],
        formats=[None, SimpleNamespace(added=(2, 1))],
    )
    scores = ReverseScores(teacher, Dictionary(), torch.device("cpu"))
    # of 7 and 8 positions, less 2 and 1 for tokens of languages, and one for eos
    for translation, source, takes in ((4, 6, True), (5, 6, False), (4, 7, False)):
        assert scores.takes([4] * translation, [4] * source) == takes
