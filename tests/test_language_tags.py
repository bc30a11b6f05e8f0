"""Language tags as corpora have them: the sentences of each, against a count by a plain script over the raw text."""

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import KD, load, strategy_flags
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from test_bad_usage import assert_refused

from kd_ext.modules.language_tags import LanguageTags
from kd_ext.modules.token_selection import selector_class
from kd_ext.tasks.translation_with_kd import TranslationWithKDConfig, TranslationWithKDTask

SHARES = {"hi": 6, "ta": 3, "bn": 1}
REGIONS = {"hi": "hi_IN", "ta": "ta_IN", "bn": "bn_BD"}
SCRIPTS = {"hi": "hin_Deva", "ta": "tam_Taml", "bn": "ben_Beng"}
LIST = ["--kd-language-tags", ",".join(SCRIPTS.values())]


def of_first(line):
    return line.split()[0]


def of_second(line):
    return line.split()[1]


def of_last(line):
    return line.split()[-1]


def after_marks(line):
    return next(word for word in line.split() if word not in ("__bt__", "__noisy__"))


def after_source(line):
    return line.split("__src__en ")[1].split()[0]


def anywhere(line):
    return next((word for word in line.split() if word in SCRIPTS.values()), None)


def of_source(line):
    return next(word for word in line.split() if word.startswith("__src__"))


# of each convention: how a line is written, the flags, and the plain script that reads the tag
CONVENTIONS = {
    "the document's": ("__src__{l} __tgt__en {w}", [], of_first),
    "the document's target": ("__src__en __tgt__{l} {w}", ["--kd-language-tag", "__tgt__"], of_second),
    "IndicTrans2": ("{s} eng_Latn {w}", LIST, of_first),
    "NLLB": ("{s} {w}", LIST, of_first),
    "NLLB, at the end": ("{w} </s> {s}", LIST, of_last),
    "mBART": ("{w} [{r}]", ["--kd-language-tag", "["], of_last),
    "mBART, with </s>": ("{w} </s> [{r}]", ["--kd-language-tag", "["], of_last),
    "M2M-100": ("__{l}__ {w}", ["--kd-language-tag", "__"], of_first),
    "M2M-100, two": ("__{l}__ __en__ {w}", ["--kd-language-tag", "__"], of_first),
    "<2hi>": ("<2{l}> {w}", ["--kd-language-tag", "<2"], of_first),
    "OPUS-MT": (">>{l}<< {w}", ["--kd-language-tag", ">>"], of_first),
    "sentencepiece": ("\u2581 __src__{l} \u2581 __tgt__en {w} \u2581 w1 \u2581", [], of_source),
    "sentencepiece, mBART": ("\u2581 {w} \u2581 w1 \u2581 [{r}]", ["--kd-language-tag", "["], of_last),
    "marked": ("{m}__src__{l} __tgt__en {w}", [], after_marks),
    "marked target": ("{m}__src__en __tgt__{l} {w}", ["--kd-language-tag", "__tgt__"], after_source),
    "marked IndicTrans2": ("{m}{s} eng_Latn {w}", LIST, anywhere),
    "marked M2M-100": ("{m}__{l}__ {w}", ["--kd-language-tag", "__"], after_marks),
    "marked M2M-100, two": ("{m}__{l}__ __en__ {w}", ["--kd-language-tag", "__"], after_marks),
    "marked <2hi>": ("{m}<2{l}> {w}", ["--kd-language-tag", "<2"], after_marks),
    "marked OPUS-MT": ("{m}>>{l}<< {w}", ["--kd-language-tag", ">>"], after_marks),
}


def write_lines(convention, seed=1, count=400):
    """Lines with words that look like tags: as the first, the last, and in between."""
    rng = random.Random(seed)
    alike, ordinary = ["[1]", "[2]", "__x", "<20", ">>", "__"], ["w1", "w2", "w3", "w4"]
    for _ in range(count):
        words = [rng.choice(alike if rng.random() < 0.15 else ordinary) for _ in range(rng.randint(3, 9))]
        if convention.startswith("mBART") and rng.random() < 0.1:
            words[0] = "[1]"  # and nowhere else so often
        language = rng.choices(list(SHARES), SHARES.values())[0]
        mark = rng.choice(["", "__bt__ ", "__bt__ ", "__noisy__ __bt__ "])
        yield CONVENTIONS[convention][0].format(
            l=language, r=REGIONS[language], s=SCRIPTS[language], m=mark, w=" ".join(words)
        )


def binarize(folder, sources, targets, words=None):
    """What fairseq-preprocess writes of them, in this process; maybe with the dictionary of another folder."""
    words = Dictionary.load(str(words / "dict.src.txt")) if words else Dictionary()
    for line in (*sources, *targets):
        words.encode_line(line, append_eos=True, add_if_not_exist=True)
    folder.mkdir(parents=True, exist_ok=True)
    for side, lines in (("src", sources), ("tgt", targets)):
        words.save(str(folder / f"dict.{side}.txt"))
        for split in ("train", "valid"):
            prefix = f"{folder}/{split}.src-tgt.{side}"
            builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
            for line in lines:
                builder.add_item(words.encode_line(line, append_eos=True, add_if_not_exist=False))
            builder.finalize(f"{prefix}.idx")
    return folder


def make_task(data, *flags, side="source"):
    names = [name[2:].replace("-", "_") for name in flags[::2]]
    others = {"train_subset": "train", "dataset_impl": "mmap", "required_seq_len_multiple": 1}
    settings = TranslationWithKDConfig(data=str(data), kd_language_side=side, **others, **dict(zip(names, flags[1::2])))
    return TranslationWithKDTask.setup_task(settings)


def of_batches(task):
    """How many sentences of the training set go to each queue, batch by batch."""
    languages = task.languages
    task.load_dataset("train")
    pairs = task.dataset("train")
    found = Counter()
    for start in range(0, len(pairs), 37):
        sample = pairs.collater([pairs[i] for i in range(start, min(start + 37, len(pairs)))])
        found.update(languages.of_batch(sample).tolist())
    assert found == Counter({i: n for i, n in enumerate(languages.counts) if n})
    tags = [*languages.words, None]
    return {tags[pool]: count for pool, count in found.items()}


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions(tmp_path, convention, side):
    lines = list(write_lines(convention))
    others = ["w1 w2 w3"] * len(lines)
    _, flags, read = CONVENTIONS[convention]
    data = binarize(tmp_path, *((lines, others) if side == "source" else (others, lines)))
    assert of_batches(make_task(data, *flags, side=side)) == Counter(map(read, lines))


def test_the_rule_for_prefixes():
    """The first tag of the words that lead, else the last word; tables of two devices' kind must not be mixed up."""
    pad, eos, hi, ta, mark, word = range(6)
    tags = LanguageTags({hi: "hi", ta: "ta"}, 6, [pad, eos], leading=[hi, ta, mark])
    rows = {
        (pad, pad, hi, word, word, eos): "hi",  # as upstream pads sources
        (ta, hi, word, eos, pad, pad): "ta",  # and targets
        (mark, mark, ta, word, hi, eos): "ta",
        (eos, hi, ta, word, word, eos): "hi",
        (word, ta, word, word, hi, eos): "hi",  # ta does not lead
        (mark, word, ta, word, word, eos): "untagged",
        (word, word, word, eos, hi, eos): "hi",  # mBART with </s>
        (word, word, hi, word, word, eos): "untagged",
        (pad, pad, pad, pad, pad, eos): "untagged",
        (word, word, word, word, mark, eos): "untagged",
    }
    found = tags.of_sentences(torch.tensor(list(rows)))
    assert [tags.pools[i] for i in found] == list(rows.values())
    anywhere = LanguageTags({hi: "hi", ta: "ta"}, 6, [pad, eos])
    found = anywhere.of_sentences(torch.tensor(list(rows)))
    first = [next(({hi: "hi", ta: "ta"}[x] for x in row if x in (hi, ta)), "untagged") for row in rows]
    assert [anywhere.pools[i] for i in found] == first


@pytest.mark.parametrize("names", [["untagged"], ["hi", "_untagged", "untagged"]])
def test_a_language_named_as_the_sentences_without_a_tag(names):
    tags = LanguageTags(dict(enumerate(names, 1)), 9)
    assert len(set(tags.pools)) == len(tags.pools) == 1 + len(names)
    assert tags.pools[:-1] == names
    assert tags.of_sentences(torch.tensor([[1, 0], [0, 0]])).tolist() == [0, len(names)]


def languages_of(tmp_path, lines, *flags, **settings):
    return make_task(binarize(tmp_path, lines, ["w1"] * len(lines)), *flags, **settings).languages


def by_name(languages):
    return dict(zip(languages.pools, languages.counts))


MANY = ["[hi_IN]", "[ta_IN]"] * 50
PREFIXES = {
    # numbers of paragraphs, always first and nowhere else; a sentence without a tag is not of the language '1]'
    "words that look alike, first": (
        "[",
        [f"[{i % 5}] w1 w2 {tag}" for i, tag in enumerate(MANY)] + [f"w1 w2 {tag}" for tag in MANY] + ["[1] w2"] * 3,
        {"hi_IN": 100, "ta_IN": 100, "untagged": 3},
    ),
    "words that look alike, behind the tag": (
        "[",
        [f"{tag} {words}" for tag in MANY for words in ("[1] w1", "w2 w3 [1]", *["w1 [1] w2"] * 3)],
        {"hi_IN": 250, "ta_IN": 250, "untagged": 0},
    ),
    "before the tag": (
        "[",
        [f"[1] {tag} w1" for tag in MANY[:20]] + [f"{tag} w1" for tag in MANY],
        {"hi_IN": 60, "ta_IN": 60, "untagged": 0},
    ),
    "many to many": (
        "__",
        ["__en__ __hi__ w1"] * 90 + ["__hi__ __en__ w1"] * 10 + ["__en__ __ta__ w1"] * 20,
        {"en": 110, "hi": 10, "untagged": 0},
    ),
    "a lost tag": ("__", ["__hi__ __en__ w1"] * 999 + ["__en__ w1"], {"hi": 999, "en": 1, "untagged": 0}),
    "most are marked": (
        "__",
        ["__bt__ __hi__ w"] * 900 + ["__hi__ w"] * 100 + ["__bt__ __ta__ w"] * 95 + ["__ta__ w"] * 5,
        {"hi": 1000, "ta": 100, "untagged": 0},
    ),
    "rare languages behind rare words": (
        "__tgt__",
        ["__src__as __tgt__en w"] + ["__src__hi __tgt__en w"] * 50 + ["__src__en __tgt__hi w"] * 50 + ["w w w"] * 2,
        {"en": 51, "hi": 50, "untagged": 2},
    ),
    "one language": ("<2", ["<2hi> w <20 w"] * 9 + ["<20 <20 w"], {"hi": 9, "untagged": 1}),
    "without closing": ("lang:", ["lang:hi w", "lang:pi w"] * 5, {"hi": 5, "pi": 5, "untagged": 0}),
    # one mark in twenty is missing
    "nearly all are marked": (
        "__",
        ["__bt__ __hi__ w"] * 950 + ["__hi__ w"] * 50 + ["__ta__ w"] * 9,
        {"hi": 1000, "ta": 9, "untagged": 0},
    ),
    # 'x' stands before [1] in three of four sentences: it leads no run, and [1] behind it is a word
    "a word that is often before one": (
        "[",
        ["x [1] w"] * 30 + ["x w w"] * 10 + ["[hi] w"] * 50,
        {"hi": 50, "untagged": 40},
    ),
    "half of its places are those of tags": ("<2", ["<2hi> w"] * 10 + ["w <2hi> w"] * 10, {"hi": 10, "untagged": 10}),
    "half of its places are not, by one": (
        "<2",
        ["<2hi> w"] * 9 + ["w <2ta> w"] * 11 + ["<2ta> w"] * 10,
        {"hi": 9, "untagged": 21},
    ),
    "half of what it leads has a tag of its own": (
        "__",
        ["__en__ __hi__ w"] * 10 + ["__hi__ w"] * 10 + ["__en__ w"] * 10,
        {"en": 20, "hi": 10, "untagged": 0},
    ),
    "specials behind the last word": (
        "[",
        ["w w [hi] </s>", "w w [ta] </s> </s>"] * 9 + ["w w"] * 9,
        {"hi": 9, "ta": 9, "untagged": 9},
    ),
    # more kinds of ends than of beginnings
    "numbers first, languages last": (
        "[",
        [f"{number}w [{language}]" for language in ("as", "bn", "hi", "ta", "te") for number in ("", "w ", "[1] ")]
        * 10,
        {"as": 30, "bn": 30, "hi": 30, "ta": 30, "te": 30, "untagged": 0},
    ),
    "more than 255 of them": (
        "<2",
        [f"<2l{i}> w" for i in range(600)],
        {**{f"l{i}": 1 for i in range(600)}, "untagged": 0},
    ),
    "special symbols": ("<", ["<pad> <2hi> w", "</s> <2ta> w", "<unk> w", "<s>"], {"2hi": 1, "2ta": 1, "untagged": 2}),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_which_words_are_tags(tmp_path, case):
    prefix, lines, expected = PREFIXES[case]
    languages = languages_of(tmp_path, lines, "--kd-language-tag", prefix)
    assert by_name(languages) == expected


def test_what_the_log_says(tmp_path, caplog):
    caplog.set_level("INFO")
    lines = ["__hi__ w [1] __x w"] * 2000 + ["__bt__ __hi__ w w"] * 1000 + ["__ta__ w w", "w w w"]
    languages_of(tmp_path, lines, "--kd-language-tag", "__")
    said = [record.getMessage() for record in caplog.records if "kd_ext" in record.name]
    assert said == [
        "--kd-language-tag __: languages of the training set's 3,002 sentences, by tags of the source: "
        "hi (__hi__) 3,000, ta (__ta__) 1; untagged 1",
        "--kd-language-tag __: these begin so, too, but only stand before a tag, and name no language: __bt__; if they "
        "do, list the tags by --kd-language-tags",
        "--kd-language-tag __: these begin so, too, but stand anywhere in sentences, and name no language: __x; if "
        "they do, list the tags by --kd-language-tags",
        "--kd-language-tag __: next to no sentence is of ta 1",
    ]
    assert caplog.records[-1].levelname == "WARNING"


def test_a_file_of_tags(tmp_path):
    lines = ["a=b w", "c,d w w", "# w", "w w"]
    (tmp_path / "tags.txt").write_text("\ufeffa=b\n\n c,d \n#\n", encoding="utf-8")
    assert by_name(languages_of(tmp_path, lines, "--kd-language-tags", str(tmp_path / "tags.txt"))) == {
        **{"a=b": 1, "c,d": 1, "#": 1, "untagged": 1}
    }


def test_several_parts_of_the_data_and_buckets(tmp_path):
    """All parts are counted, in their real length; nothing of it is left in the task."""
    for name, lines in (("a", ["__src__hi w"] * 3), ("b", ["__src__hi w", "__src__hi w w"])):
        binarize(tmp_path / name, lines, ["w"] * len(lines))
    task = make_task(f"{tmp_path}/a:{tmp_path}/b")
    task.cfg.num_batch_buckets = 2
    assert by_name(task.languages) == {"hi": 5, "untagged": 0}
    assert task.datasets == {}
    assert task.cfg.num_batch_buckets == 2


def test_sentences_that_cannot_be_read_at_once(tmp_path):
    lines = ["__src__hi w w w", "__src__ta w"] * 20
    task = make_task(binarize(tmp_path, lines, ["w"] * 40), "--truncate-source", True, "--max-source-positions", 3)
    assert by_name(task.languages) == {"hi": 20, "ta": 20, "untagged": 0}


BAD = {
    "not in the dictionary": (["--kd-language-tags", "hin_Deva,__src__h"], ["'hin_Deva' is not in the source dict"]),
    "nearly": (["--kd-language-tags", "__src__hh"], ["'__src__hh' is not", "near to it: __src__hi"]),
    "special": (["--kd-language-tags", "</s>"], ["'</s>' is a special symbol"]),
    "twice": (["--kd-language-tags", "__src__hi,__src__ta,__src__hi"], ["'__src__hi' is there twice"]),
    "empty word": (["--kd-language-tags", "__src__hi,,__src__ta"], ["an empty word", "joined by commas"]),
    "empty": (["--kd-language-tags", ""], ["--kd-language-tags '': empty"]),
    "no such file": (
        ["--kd-language-tags", "tags.txt"],
        ["no such file, and 'tags.txt' is not in the source"],
    ),
    "a folder": (["--kd-language-tags", "{folder}"], ["--kd-language-tags {folder}: a folder; name a file, or tags"]),
    "both": (["--kd-language-tags", "__src__hi", "--kd-language-tag", "<2"], ["--kd-language-tag <2 as well"]),
    "side": (["--kd-language-side", "both"], ["--kd-language-side both: unknown; one of source, target"]),
    "not on that side": (
        ["--kd-language-side", "target", "--kd-language-tag", "<2"],
        ["of the target dictionary"],
    ),
    "no sentence": (["--kd-language-side", "target"], ["no sentence of the training set begins or ends with a tag"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage(train, teacher, tmp_path, case):
    flags, parts = BAD[case]
    flags, parts = ([text.replace("{folder}", str(tmp_path)) for text in texts] for texts in (flags, parts))
    known = [*KD, "--teacher-checkpoint-path", teacher, *strategy_flags("global_language_wise")]
    assert_refused(train(tmp_path / "run", *known, *flags), tmp_path / "run", *parts)


def a_run(folder, prefix=None, window="each", tags=None):
    """The queues of a run on `folder`'s data, of whose tags `prefix` is the beginning, or which `tags` lists."""
    named = ["--kd-language-tags", tags] if tags else ["--kd-language-tag", prefix]
    task = make_task(folder, *named, "--kd-strategy", "global_language_wise")
    task.selector = selector_class("global_language_wise", window)(0.5, 20, task.languages.pools)
    return task


def push(task, languages):
    pools = torch.tensor([task.languages.pools.index(name) for name in languages])
    task.selector.select(torch.arange(len(pools)).float(), pools)
    task.selector.commit()


@pytest.mark.parametrize("window", ["each", "shared"])
def test_queues_of_a_checkpoint(tmp_path, window, caplog):
    lines = ["<2hi> w", "<2ta> w", "__x w"] * 20
    data = binarize(tmp_path / "data", lines, lines)
    task = a_run(data, "<2", window)
    push(task, ["ta", "hi", "hi", "untagged"])
    saved = task.state_dict()

    resumed = a_run(data, "<2", window)
    resumed.load_state_dict(saved)
    assert resumed.selector.sizes() == task.selector.sizes() == {"hi": 2, "ta": 1, "untagged": 1}

    # before tags were counted, all that begin as one had a queue, by another name
    old = copy.deepcopy(saved)
    del old["kd"]["languages"]
    if window == "each":
        queues = old["kd"]["queues"]
        old["kd"]["queues"] = {"ta>": queues["ta"], "hi>": queues["hi"], "untagged": queues["untagged"]}
    else:
        old["kd"]["pools"] = ["hi>", "ta>", "untagged"]
    resumed = a_run(data, "<2", window)
    resumed.load_state_dict(old)
    assert resumed.state_dict()["kd"]["queues"].keys() == saved["kd"]["queues"].keys()
    assert resumed.selector.sizes() == task.selector.sizes()

    caplog.clear()
    resumed = a_run(data, "<", window)  # other tags
    resumed.load_state_dict(saved)
    assert sum(resumed.selector.sizes().values()) == 0
    assert "by other tags (source <2*; now source <*); they start empty" in caplog.text

    lines = [line for line in lines if "ta" not in line]
    fewer = binarize(tmp_path / "fewer", lines, lines, data)
    resumed = a_run(fewer, "<2", window)
    resumed.load_state_dict(saved)
    assert resumed.selector.sizes() == {"hi": 2, "untagged": 1}


def test_the_order_of_a_list_does_not_matter(tmp_path, caplog):
    """Queues go on, also those of a checkpoint of before, which has the list in its own order."""
    lines = ["hi w", "ta w", "w w"] * 20
    data = binarize(tmp_path / "data", lines, lines)
    task = a_run(data, tags="ta,hi")
    push(task, ["ta", "hi", "hi", "untagged"])
    saved = task.state_dict()
    for recorded in (saved["kd"]["languages"], "source ta,hi", "source hi,ta"):
        saved["kd"]["languages"] = recorded
        resumed = a_run(data, tags="hi,ta")
        resumed.load_state_dict(copy.deepcopy(saved))
        assert resumed.selector.sizes() == {"hi": 2, "ta": 1, "untagged": 1}
    assert "start empty" not in caplog.text
    for other in ("target hi,ta", "source hi,w", "source hi"):
        saved["kd"]["languages"] = other
        resumed = a_run(data, tags="hi,ta")
        resumed.load_state_dict(copy.deepcopy(saved))
        assert sum(resumed.selector.sizes().values()) == 0
    assert caplog.text.count("start empty") == 3


def test_as_typed(train, distil, teacher, corpus, tmp_path):
    """Queues of listed tags, and a resumption; the tokens of each are those of the raw text."""
    flags = ["--kd-language-tags", "__src__hi,__src__ta", "--max-update", 16]  # an epoch
    result = distil(tmp_path, *flags, strategy="global_language_wise")
    assert result.returncode == 0, result.output[-2000:]
    sources = (corpus / "raw" / "train.src").read_text().splitlines()
    targets = (corpus / "raw" / "train.tgt").read_text().splitlines()
    of_each, tokens = Counter(), Counter()
    for source, target in zip(sources, targets):
        tag = source.split()[0] if source.split()[0] != "__src__bn" else "untagged"
        of_each[tag] += 1
        tokens[tag] += len(target.split()) + 1
    said = ", ".join(f"{tag} {of_each[tag]}" for tag in ("__src__hi", "__src__ta"))
    assert f"by tags of the source: {said}; untagged {of_each['untagged']}" in result.output
    kd = load(tmp_path / "checkpoint_last.pt")["task_state"]["kd"]
    assert {name: len(queue) for name, queue in kd["queues"].items()} == {
        name: min(count, 300) for name, count in tokens.items()
    }
    assert kd["languages"] == "source __src__hi,__src__ta"
    flags[1], flags[-1] = "__src__ta,__src__hi", 18
    result = distil(tmp_path, *flags, strategy="global_language_wise")
    assert result.returncode == 0, result.output[-2000:]
    assert "restored the queues" in result.output
    result = distil(tmp_path, "--max-update", 20, strategy="global_language_wise")
    assert "are of languages by other tags" in result.output
