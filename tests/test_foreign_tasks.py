"""Teachers of other tasks than translation: asked as their own task asks them, or refused."""

import re
from argparse import ArgumentParser, Namespace

import pytest
import torch
from commands import PLUGIN, run, run_as_typed
from conftest import KD, load
from corpus import WORDS, sentence_pairs
from fairseq import tasks
from fairseq.data import AppendTokenDataset, Dictionary, LanguagePairDataset, ListDataset, PrependTokenDataset
from fairseq.models import ARCH_CONFIG_REGISTRY, BaseFairseqModel
from test_bad_usage import assert_refused

from kd_ext import teacher_dictionary
from kd_ext.criterions.label_smoothed_cross_entropy_with_kd import LabelSmoothedCrossEntropyWithKD
from kd_ext.errors import ConfigError
from kd_ext.modules.positions import Positions
from kd_ext.tasks.translation_with_kd import TranslationWithKDConfig, TranslationWithKDTask
from kd_ext.teachers.load import Source, identify_teacher, load_teacher

LANGS = ["hi", "ta", "en"]
SIZES = dict(encoder_layers=1, decoder_layers=1, encoder_embed_dim=16, decoder_embed_dim=16)
SIZES.update(encoder_ffn_embed_dim=24, decoder_ffn_embed_dim=24, encoder_attention_heads=2, decoder_attention_heads=2)


def base_dictionary():
    words = Dictionary()
    for word in WORDS:
        words.add_symbol(word)
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Dictionaries without the words that tasks append, under the names of all languages."""
    folder = tmp_path_factory.mktemp("dictionaries")
    for language in [*LANGS, "src", "tgt", "hi_IN", "en_XX"]:
        base_dictionary().save(str(folder / f"dict.{language}.txt"))
    return folder


def settings(task, arch, **given):
    """A Namespace as the command line of fairseq-train makes it."""
    parser = ArgumentParser(allow_abbrev=False)
    kind = tasks.TASK_REGISTRY[task]
    if getattr(kind, "add_args", None) is not None:
        kind.add_args(parser)
    known, _ = parser.parse_known_args([str(given["data"])])
    args = Namespace(**{**vars(known), **SIZES, "arch": arch, "task": task, "dropout": 0.0, **given})
    args.criterion, args.optimizer, args.lr_scheduler = "cross_entropy", "adam", "fixed"
    args.lr, args.seed = [0.1], 1
    ARCH_CONFIG_REGISTRY[arch](args)
    return args


def save_teacher(path, task, arch="transformer", **given):
    """A checkpoint with random weights as that task would have trained it, and the task and model of its own."""
    args = settings(task, arch, **given)
    own = tasks.setup_task(Namespace(**vars(args)))
    torch.manual_seed(5)
    model = own.build_model(Namespace(**vars(args)))
    state = {"args": args, "model": model.state_dict(), "extra_state": {}, "last_optimizer_state": None}
    state["optimizer_history"] = [{"criterion_name": "x", "optimizer_name": "y", "lr_scheduler_state": {}}]
    state["optimizer_history"][0]["num_updates"] = 7
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return own, model.eval()


def student_task(words, source="hi", target="en", data="x"):
    config = TranslationWithKDConfig(source_lang=source, target_lang=target, data=str(data))
    config.max_source_positions = config.max_target_positions = 100
    return TranslationWithKDTask(config, words, words)


def sentences(words, heads=None, tails=None, count=9):
    """Encoded pairs; of sources what each begins and ends with."""
    pairs = list(sentence_pairs(count, seed=4, tagged=False))
    source, target = ([words.encode_line(p[i], add_if_not_exist=False).long() for p in pairs] for i in (0, 1))
    return source, target


def collate(words, source, target, left=True, **more):
    """What LanguagePairDataset makes of sentences, in the order in which they are given."""
    as_dataset = [ListDataset(x, [len(s) for s in x]) for x in (source, target)]
    sizes = [[len(s) for s in x] for x in (source, target)]
    dataset = LanguagePairDataset(
        *(as_dataset[0], sizes[0], words, as_dataset[1], sizes[1], words), left_pad_source=left, **more
    )
    return dataset.collater([dataset[i] for i in range(len(source))])


def wrap(sentences, kind, token):
    dataset = kind(ListDataset(sentences, [len(s) for s in sentences]), token)
    return [dataset[i] for i in range(len(sentences))]


def own_batch(words, source, target, layout):
    """A batch as the task lays it out, by upstream's own datasets."""
    place = layout.get("source_place")
    more = {}
    if layout.get("bos") is not None:
        source, target = (wrap(x, PrependTokenDataset, layout["bos"]) for x in (source, target))
    if place == "head":
        source = wrap(source, PrependTokenDataset, layout["source"])
    if place == "tail":
        source = wrap(source, AppendTokenDataset, layout["source"])
    if layout.get("target_place") == "head":
        target = wrap(target, PrependTokenDataset, layout["target"])
    if layout.get("target_place") == "tail":  # mBART: the decoder begins with what the target ends with
        target, more["eos"] = wrap(target, AppendTokenDataset, layout["target"]), layout["target"]
    batch = collate(words, source, target, **more)
    if place == "eos":
        batch["net_input"]["src_tokens"][:, -1] = layout["source"]
    if layout.get("target_place") == "begin":
        batch["net_input"]["prev_output_tokens"][:, 0] = layout["target"]
    return batch


MULTI = dict(lang_pairs="hi-en,ta-en,en-hi", langs=["hi", "ta", "en"])
KINDS = {
    "m2m": ("translation_multi_simple_epoch", dict(encoder_langtok="src", decoder_langtok=True, **MULTI)),
    "m2m by target": ("translation_multi_simple_epoch", dict(encoder_langtok="tgt", **MULTI)),
    "m2m decoder alone": ("translation_multi_simple_epoch", dict(decoder_langtok=True, **MULTI)),
    "m2m replacing": (
        "translation_multi_simple_epoch",
        dict(encoder_langtok="src", decoder_langtok=True, lang_tok_replacing_bos_eos=True, **MULTI),
    ),
    "mbart50": (
        "translation_multi_simple_epoch",
        dict(encoder_langtok="src", decoder_langtok=True, lang_tok_style="mbart", **MULTI),
    ),
    "mbart": ("translation_from_pretrained_bart", dict(langs="hi,ta,en", source_lang="hi", target_lang="en")),
    "mbart with bos": (
        "translation_from_pretrained_bart",
        dict(langs="hi,ta,en", source_lang="hi", target_lang="en", prepend_bos=True),
    ),
    "multilingual": ("multilingual_translation", dict(lang_pairs="hi-en,ta-en")),
    "multilingual langtok": (
        "multilingual_translation",
        dict(lang_pairs="hi-en,ta-en", encoder_langtok="tgt", decoder_langtok=True),
    ),
}


def layout_of(kind, words):
    hi, en = (words.index(f"__{x}__") for x in ("hi", "en"))
    bracket_hi, bracket_en = (words.index(f"[{x}]") for x in ("hi", "en"))
    return {
        "m2m": dict(source_place="head", source=hi, target_place="head", target=en),
        "m2m by target": dict(source_place="head", source=en),
        "m2m decoder alone": dict(target_place="head", target=en),
        "m2m replacing": dict(source_place="eos", source=hi, target_place="begin", target=en),
        "mbart50": dict(source_place="head", source=bracket_hi, target_place="head", target=bracket_en),
        "mbart": dict(source_place="tail", source=bracket_hi, target_place="tail", target=bracket_en),
        "mbart with bos": dict(
            source_place="tail", source=bracket_hi, target_place="tail", target=bracket_en, bos=words.bos()
        ),
        "multilingual": {},
        "multilingual langtok": dict(source_place="eos", source=en, target_place="begin", target=en),
    }[kind]


def trimmed(tokens, pad=1):
    """Rows without their padding."""
    return [row[row.ne(pad)].tolist() for row in tokens]


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def made(kind, path, folder, **more):
    task, given = KINDS[kind]
    arch = "multilingual_transformer" if task == "multilingual_translation" else "transformer"
    own, model = save_teacher(path, task, arch, data=str(folder), **{**given, **more})
    if task == "multilingual_translation":
        return own.dicts["hi"], model.models["hi-en"]
    return own.source_dictionary, model


class Recorder(torch.nn.Module):
    """Calls a model, and keeps what it was asked."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, []

    def forward(self, **inputs):
        self.asked.append(inputs)
        return self.model(**inputs)

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("model", "asked") else getattr(self.model, name)


def test_is_asked_as_its_own_task_asks(kind, folder, tmp_path):
    """Batch by batch the very tokens of upstream's datasets, and the probabilities of its own model, for any words."""
    words, model = made(kind, tmp_path / "teacher.pt", folder)
    plain = base_dictionary()
    loaded = load_teacher(Source(str(tmp_path / "teacher.pt")), student_task(plain))
    recorder = loaded.models[0] = Recorder(loaded.models[0])
    source, target = sentences(plain)
    batch = collate(plain, source, target)
    order = batch["id"].tolist()
    theirs = own_batch(words, [source[i] for i in order], [target[i] for i in order], layout_of(kind, words))
    real = batch["target"].ne(plain.pad())
    found = loaded.probs(batch, Positions(real))

    asked = recorder.asked[-1]
    back = theirs["id"].argsort()  # equal lengths may have changed places
    for key in ("src_tokens", "prev_output_tokens"):
        wanted = trimmed(theirs["net_input"][key][back])
        given = trimmed(asked[key])
        if key == "prev_output_tokens":  # behind the last that is asked about mBART has one more
            wanted = [row[: len(mine)] for row, mine in zip(wanted, given)]
        assert given == wanted, key
    assert asked["src_lengths"].tolist() == theirs["net_input"]["src_lengths"][back].tolist()

    with torch.no_grad():
        logits = model(**theirs["net_input"])[0][back].double()
    extra = int(layout_of(kind, words).get("target_place") == "head") + int("bos" in layout_of(kind, words))
    rows = [logits[i, extra : extra + len(target[order[i]])] for i in range(len(order))]
    wanted = torch.cat(rows)[:, : len(plain)].softmax(1)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)


class InItsOwnFormat(BaseFairseqModel):
    """A student with a teacher's weights, which lays out a batch as the teacher's task does, by upstream's datasets."""

    def __init__(self, model, words, student_words, source, target, layout):
        super().__init__()
        self.model = model
        self._words, self._layout, self._vocabulary = words, layout, len(student_words)
        self._source, self._target = source, target

    def forward(self, src_tokens, src_lengths, prev_output_tokens):
        theirs = own_batch(self._words, self._source, self._target, self._layout)
        logits = self.model(**theirs["net_input"])[0][theirs["id"].argsort()]
        extra = int(self._layout.get("target_place") == "head") + int("bos" in self._layout)
        return logits[:, extra : extra + prev_output_tokens.size(1), : self._vocabulary], None

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        return net_output[0].float().log_softmax(2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_in_its_own_format(kind, folder, tmp_path, temperature):
    words, model = made(kind, tmp_path / "teacher.pt", folder)
    plain = base_dictionary()
    task = student_task(plain)
    task.load_teacher = lambda _: load_teacher(Source(str(tmp_path / "teacher.pt")), task)
    source, target = sentences(plain)
    batch = collate(plain, source, target)
    order = batch["id"].tolist()
    layout = layout_of(kind, words)
    student = InItsOwnFormat(model, words, plain, [source[i] for i in order], [target[i] for i in order], layout)
    criterion = LabelSmoothedCrossEntropyWithKD(task, False, 0.1, kd_temperature=temperature)
    criterion.train()
    student.train()
    _, _, logged = criterion(student, batch)
    assert logged["kd_tokens"] == sum(map(len, target))
    assert abs(float(logged["kd_kl"])) / logged["kd_tokens"] < 1e-6


@pytest.mark.parametrize("kind", ["m2m", "m2m by target", "m2m decoder alone", "mbart50"], indirect=False)
def test_sentences_that_have_their_tokens(kind, folder, tmp_path):
    """Text with the tokens, by the dictionary with the words that the task appends: the very same batches."""
    words, model = made(kind, tmp_path / "teacher.pt", folder)
    layout = layout_of(kind, words)
    source, target = sentences(words)
    tagged_source = wrap(source, PrependTokenDataset, layout["source"]) if "source" in layout else source
    tagged_target = wrap(target, PrependTokenDataset, layout["target"]) if "target" in layout else target
    batch = collate(words, tagged_source, tagged_target)
    loaded = load_teacher(Source(str(tmp_path / "teacher.pt")), student_task(words, "src", "tgt", folder))
    found = loaded.probs(batch, Positions(batch["target"].ne(words.pad())))
    with torch.no_grad():
        logits = model(**batch["net_input"])[0].double()
    wanted = logits[batch["target"].ne(words.pad())].softmax(1)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)


def test_tokens_of_several_languages_and_of_none(folder, tmp_path):
    """A sentence's own token counts; one without gets that of the run's languages."""
    words, model = made("m2m", tmp_path / "teacher.pt", folder)
    hi, ta, en = (words.index(f"__{x}__") for x in LANGS)
    source, target = sentences(words, count=3)
    full_source = [torch.cat([torch.tensor([tag]), s]) for tag, s in zip((ta, hi, ta), source)]
    full_target = [torch.cat([torch.tensor([tag]), t]) for tag, t in zip((en, hi, en), target)]
    some_source, some_target = [full_source[0], source[1], full_source[2]], [target[0], full_target[1], target[2]]
    loaded = load_teacher(Source(str(tmp_path / "teacher.pt")), student_task(words, "hi", "en", folder))
    recorder = loaded.models[0] = Recorder(loaded.models[0])
    batch = collate(words, some_source, some_target)
    real = batch["target"].ne(words.pad())
    found = loaded.probs(batch, Positions(real)).double()
    asked = recorder.asked[-1]
    order = batch["id"].tolist()
    assert trimmed(asked["src_tokens"]) == [full_source[i].tolist() for i in order]
    eos = [words.eos()]
    assert trimmed(asked["prev_output_tokens"]) == [eos + full_target[i].tolist()[:-1] for i in order]
    wanted = []
    for i in order:
        prev = torch.tensor([eos + full_target[i].tolist()[:-1]])
        with torch.no_grad():
            one = model(full_source[i].unsqueeze(0), torch.tensor([len(full_source[i])]), prev)[0][0].double()
        wanted.append(one.softmax(1)[len(one) - len(some_target[i]) :])
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-6, rtol=0)


def test_logs_what_is_cut_off(folder, tmp_path, caplog):
    made("m2m", tmp_path / "teacher.pt", folder)
    plain = base_dictionary()
    with caplog.at_level("INFO"):
        loaded = load_teacher(Source(str(tmp_path / "teacher.pt")), student_task(plain))
        source, target = sentences(plain)
        for _ in range(2):
            batch = collate(plain, source, target)
            loaded.probs(batch, Positions(batch["target"].ne(1)))
    text = caplog.text
    assert "task translation_multi_simple_epoch, hi-en" in text
    assert "words that the teacher alone has, and that get no probability: __hi__ __ta__ __en__" in text
    (cut,) = re.findall(r"of the teacher's probability ([\d.e-]+) is on words", text)
    assert 0 < float(cut) < 0.5


def refused(path, words=None, source="hi", target="en", **more):
    with pytest.raises(ConfigError) as error:
        load_teacher(Source(str(path), **more), student_task(words or base_dictionary(), source, target, path.parent))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("mbart ") and kind != "mbart"])
def test_a_language_that_it_does_not_know(kind, folder, tmp_path):
    path = tmp_path / "teacher.pt"
    made(kind, path, folder)
    names_target = kind in ("m2m by target", "m2m decoder alone")
    message = refused(path, **{"target" if names_target else "source": "fr"})
    assert str(path) in message
    assert "fr" in message
    assert "--teacher-model-overrides" in message
    assert "hi" in message


def test_languages_that_mbart_does_not_know(folder, tmp_path):
    """Its file names its own pair, which counts; an override may name another."""
    path = tmp_path / "teacher.pt"
    made("mbart", path, folder)
    base_dictionary().save(str(folder / "dict.fr.txt"))
    message = refused(path, overrides="{'source_lang': 'fr'}")
    assert "a source language" in message
    assert "hi, ta, en" in message


def test_its_languages_by_overrides(folder, tmp_path):
    """A student of other names for the same languages."""
    made("m2m", tmp_path / "teacher.pt", folder)
    plain = base_dictionary()
    path, task = str(tmp_path / "teacher.pt"), student_task(plain, "hindi", "english")
    named = Source(path, "{'source_lang': 'ta', 'target_lang': 'en'}")
    source, target = sentences(plain)
    batch = collate(plain, source, target)
    real = Positions(batch["target"].ne(1))
    of_ta = load_teacher(named, task).probs(batch, real)
    wanted = load_teacher(Source(path), student_task(plain, "ta", "en")).probs(batch, real)
    assert torch.equal(of_ta, wanted)
    other = load_teacher(Source(path), student_task(plain, "hi", "en"))
    assert not torch.equal(other.probs(batch, real), wanted)
    assert identify_teacher(named, task) == load_teacher(named, task).identity
    assert identify_teacher(Source(path), student_task(plain, "hi", "en")) == other.identity
    assert identify_teacher(Source(path), student_task(plain, "ta", "en")) != other.identity


@pytest.mark.parametrize("chosen", ["translation", "translation_multi_simple_epoch"])
def test_its_task_cannot_be_overridden(folder, tmp_path, chosen):
    """An mBART teacher that is asked by the task of translation is asked wrongly."""
    path = tmp_path / "teacher.pt"
    made("mbart", path, folder)
    message = refused(path, overrides=f"{{'task': '{chosen}'}}")
    assert "translation_from_pretrained_bart" in message
    assert "leave it out" in message


def test_files_of_settings_that_are_elsewhere(folder, tmp_path):
    """A list of languages and a dictionary by paths of the machine that trained it."""
    own, there = tmp_path / "own", tmp_path / "there"
    for place in (own, there):
        place.mkdir()
    (own / "langs.txt").write_text("\n".join(LANGS) + "\n")
    base_dictionary().save(str(own / "model_dict.txt"))
    more = dict(langs=None, lang_dict=str(own / "langs.txt"), fixed_dictionary=str(own / "model_dict.txt"))
    path = own / "teacher.pt"
    made("m2m", path, folder, **more)
    moved = there / "teacher.pt"
    path.rename(moved)
    plain = base_dictionary()
    (own / "langs.txt").rename(there / "langs.txt")
    (own / "model_dict.txt").rename(there / "model_dict.txt")
    load_teacher(Source(str(moved)), student_task(plain))
    (there / "langs.txt").rename(there / "languages.txt")
    message = refused(moved)
    assert "langs.txt" in message
    assert "'lang_dict'" in message
    load_teacher(Source(str(moved), f"{{'lang_dict': '{there}/languages.txt'}}"), student_task(plain))


def test_nllb(folder, tmp_path):
    """Its own fairseq has marks of where data came from behind the languages, and settings that 0.12.2 has not."""
    path = tmp_path / "teacher.pt"
    made("m2m", path, folder)
    state = torch.load(path, weights_only=False)
    args = state["args"]
    args.add_data_source_prefix_tags, args.enable_m2m_validation, args.finetune_dict_specs = True, False, None
    marks = torch.randn(3, 16)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight"):
        state["model"][name] = torch.cat([state["model"][name], marks])
    torch.save(state, path)
    plain = base_dictionary()
    source, target = sentences(plain)
    batch = collate(plain, source, target)
    real = Positions(batch["target"].ne(1))
    found = load_teacher(Source(str(path)), student_task(plain)).probs(batch, real)
    made("m2m", tmp_path / "plain.pt", folder)
    wanted = load_teacher(Source(str(tmp_path / "plain.pt")), student_task(plain)).probs(batch, real)
    torch.testing.assert_close(found, wanted)


def test_flags_that_came_later(folder, tmp_path):
    """A file of M2M-100's first release has not all the flags of the task of today."""
    path = tmp_path / "teacher.pt"
    made("m2m", path, folder)
    state = torch.load(path, weights_only=False)
    plain = base_dictionary()
    source, target = sentences(plain)
    batch = collate(plain, source, target)
    real = Positions(batch["target"].ne(1))
    wanted = load_teacher(Source(str(path)), student_task(plain)).probs(batch, real)
    for name in ("lang_tok_style", "langtoks_specs", "lang_tok_replacing_bos_eos", "fixed_dictionary", "langtoks"):
        delattr(state["args"], name)
    torch.save(state, path)
    assert torch.equal(load_teacher(Source(str(path)), student_task(plain)).probs(batch, real), wanted)


def test_a_pair_that_it_was_not_trained_on(folder, tmp_path, caplog):
    """Languages that it knows, but the other way round, or never together."""
    path = tmp_path / "teacher.pt"
    made("m2m", path, folder, lang_pairs="en-hi,en-ta")
    message = refused(path)
    assert "it translates en-hi, en-ta, and is wanted for hi-en" in message
    assert "direction" in message
    load_teacher(Source(str(path)), student_task(base_dictionary(), "hi", "ta"))
    assert "not trained on hi-ta" in caplog.text


def test_a_run_of_another_language_than_its_own(folder, tmp_path, caplog):
    """The file's language counts; the run's, where it is another that the teacher has, is worth a warning."""
    made("mbart", tmp_path / "teacher.pt", folder)
    load_teacher(Source(str(tmp_path / "teacher.pt")), student_task(base_dictionary(), "hindi", "en", folder))
    assert "asked for hi" not in caplog.text
    load_teacher(Source(str(tmp_path / "teacher.pt")), student_task(base_dictionary(), "ta", "en", folder))
    assert "asked for hi, by its file or an override, in a run of ta" in caplog.text


@pytest.mark.parametrize("kind", ["m2m by target", "multilingual langtok"])
def test_a_token_of_the_sources_language_where_the_targets_is_wanted(kind, folder, tmp_path):
    """`__hi__ w1 w2` into English, by a teacher whose sources name the target: not asked for Hindi."""
    words, _ = made(kind, tmp_path / "teacher.pt", folder)
    for name in LANGS:
        base_dictionary().save(str(tmp_path / f"dict.{name}.txt"))
    loaded = load_teacher(Source(str(tmp_path / "teacher.pt")), student_task(words, data=folder))
    recorder = loaded.models[0] = Recorder(loaded.models[0])
    source, target = sentences(words)
    batch = collate(words, wrap(source, PrependTokenDataset, words.index("__hi__")), target)
    real = Positions(batch["target"].ne(words.pad()))
    with pytest.raises(ConfigError, match="a token of another language than the run's --target-lang"):
        loaded.probs(batch, real)
    assert recorder.asked == []
    batch = collate(words, wrap(source, PrependTokenDataset, words.index("__en__")), target)
    loaded.probs(batch, Positions(batch["target"].ne(words.pad())))


def test_its_dictionary_has_words_twice(tmp_path):
    """As sentencepiece's lists of pieces have special symbols again; written, it reads as it was."""
    for language in LANGS:
        lines = ["w1 5", "<pad> 3 #fairseq:overwrite", "w2 4", "w1 2 #fairseq:overwrite", "x y 1"]
        (tmp_path / f"dict.{language}.txt").write_text("\n".join(lines) + "\n")
    words, _ = made("m2m", tmp_path / "teacher.pt", tmp_path)
    result = run(tmp_path / "log", "kd_ext.teacher_dictionary", tmp_path / "teacher.pt", tmp_path / "out")
    assert result.returncode == 0, result.output
    written = Dictionary.load(str(tmp_path / "out" / "dict.source.txt"))
    assert written.symbols == words.symbols
    assert written.indices == words.indices


def test_a_folder_for_its_dictionary_that_cannot_be_made(m2m, tmp_path):
    own = tmp_path / "own"
    own.write_text("mine")
    for destdir, said in ((own, "File exists"), (own / "below", "Not a directory")):
        result = run(tmp_path / "log", "kd_ext.teacher_dictionary", m2m, destdir)
        assert result.returncode != 0
        assert result.last_line == f"kd_ext: error: DESTDIR {destdir}: cannot be made: {said}; name another folder"
        assert "Traceback" not in result.output
    assert own.read_text() == "mine"


@pytest.mark.parametrize("kind", ["languages", "the student's languages", "fixed_dictionary"])
def test_its_dictionary_does_not_replace_what_it_reads(folder, tmp_path, kind):
    """By its languages' names, by those of -s and -t, or by a setting."""
    path, flags = tmp_path / "teacher.pt", []
    for name in ("source", "target"):
        base_dictionary().save(str(tmp_path / f"dict.{name}.txt"))
    if kind == "fixed_dictionary":
        made("m2m", path, folder, fixed_dictionary=str(tmp_path / "dict.source.txt"))
    else:
        save_teacher(path, "translation", data=str(tmp_path), source_lang="source", target_lang="target")
    if kind == "the student's languages":
        flags = ["-s", "source", "-t", "target"]
        state = load(path)
        state["args"].source_lang, state["args"].target_lang = "xx", "yy"
        torch.save(state, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"dict\.source\.txt: this command reads it, and would replace it"):
        teacher_dictionary.main([str(path), str(tmp_path), *flags])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_language_ids_are_refused(folder, tmp_path):
    made("m2m", tmp_path / "teacher.pt", folder, enable_lang_ids=True)
    assert "--enable-lang-ids" in refused(tmp_path / "teacher.pt")


def test_a_target_with_a_token_that_mbart_never_predicts(folder, tmp_path):
    words, _ = made("mbart", tmp_path / "teacher.pt", folder)
    loaded = load_teacher(Source(str(tmp_path / "teacher.pt")), student_task(words, data=folder))
    source, target = sentences(words)
    batch = collate(words, source, wrap(target, PrependTokenDataset, words.index("[en]")))
    with pytest.raises(ConfigError, match="leave such tokens out of the targets"):
        loaded.probs(batch, Positions(batch["target"].ne(1)))


def test_a_source_without_a_token_where_each_needs_one(folder, tmp_path):
    words, _ = made("m2m", tmp_path / "teacher.pt", folder)
    loaded = load_teacher(Source(str(tmp_path / "teacher.pt")), student_task(words, "src", "en", folder))
    source, target = sentences(words)
    batch = collate(words, source, target)
    with pytest.raises(ConfigError, match="a source sentence has no token"):
        loaded.probs(batch, Positions(batch["target"].ne(1)))


def kl(output):
    return [float(x) for x in re.findall(r"kd_kl=([\d.e-]+)", output)]


@pytest.fixture(scope="module")
def m2m(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("m2m") / "teacher.pt"
    made("m2m", path, folder)
    return path


@pytest.fixture(scope="module")
def tagged(m2m, folder, tmp_path_factory):
    """Text with M2M-100's tokens, preprocessed as the command says, with the dictionary that it writes."""
    out = tmp_path_factory.mktemp("tagged")
    result = run(out / "log", "kd_ext.teacher_dictionary", m2m, out / "dict")
    assert result.returncode == 0, result.output
    command = result.last_line.split()
    assert command[0] == "fairseq-preprocess"
    assert command[-1] == "--joined-dictionary"
    assert (out / "dict/dict.source.txt").read_text().split("\n")[-4:-1] == ["__hi__ 1", "__ta__ 1", "__en__ 1"]
    assert (out / "dict/dict.source.txt").read_bytes() == (out / "dict/dict.target.txt").read_bytes()
    pairs = list(sentence_pairs(60, seed=8, tagged=False))
    (out / "train.src").write_text("".join(f"__{('hi', 'ta')[i % 2]}__ {p[0]}\n" for i, p in enumerate(pairs)))
    (out / "train.tgt").write_text("".join(f"__en__ {p[1]}\n" for p in pairs))
    more = ["-s", "src", "-t", "tgt", "--trainpref", out / "train", "--validpref", out / "train", "--workers", "1"]
    result = run_as_typed(*command, *more, "--destdir", out / "bin")
    assert result.returncode == 0, result.output
    return out / "bin"


TRAIN = ["--optimizer", "sgd", "--lr", "1e-9", "--max-tokens", "200", "--cpu", "--num-workers", "0"]
TRAIN += ["--max-update", "2", "--no-progress-bar", "--log-interval", "1", "--disable-validation", "--dropout", "0"]
TRAIN += [*PLUGIN, *KD, "--kd-strategy", "word_level", "--arch", "transformer"]
TRAIN += [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]


def test_kl_of_a_student_with_its_weights(m2m, tagged, tmp_path):
    """The command line, from a file of M2M-100's to a student that says what it says: kd_kl is 0."""
    flags = [*TRAIN, "--teacher-checkpoint-path", m2m, "--finetune-from-model", m2m, "--save-dir", tmp_path]
    result = run(tmp_path / "log", "fairseq-train", tagged, *flags)
    assert result.returncode == 0, result.output
    assert [abs(x) for x in kl(result.output)] == [0.0, 0.0]
    assert "task translation_multi_simple_epoch" in result.output


def test_a_student_of_one_pair(m2m, tmp_path, folder):
    """Plain text of one pair, by the teacher's dictionary without the words that its task appends; and a cache."""
    pairs = list(sentence_pairs(60, seed=8, tagged=False))
    for side, language in ((0, "ta"), (1, "en")):
        (tmp_path / f"train.{language}").write_text("".join(f"{p[side]}\n" for p in pairs))
    words = ["--srcdict", folder / "dict.hi.txt", "--joined-dictionary", "--destdir", tmp_path / "bin"]
    data = [
        "-s",
        "ta",
        "-t",
        "en",
        "--trainpref",
        tmp_path / "train",
        "--validpref",
        tmp_path / "train",
        "--workers",
        "1",
    ]
    assert run_as_typed("fairseq-preprocess", *data, *words).returncode == 0
    limits = ["--max-source-positions", "1023", "--max-target-positions", "1023"]  # the tokens come on top
    flags = [tmp_path / "bin", *TRAIN, *limits, "--lr", "0.1", "--teacher-checkpoint-path", m2m, "--save-dir"]
    direct = run(tmp_path / "log", "fairseq-train", *flags, tmp_path / "direct")
    assert direct.returncode == 0, direct.output
    cache = ["--teacher-cache-dir", tmp_path / "cache", "--teacher-cache-top-k", "44"]
    for _ in range(2):
        cached = run(tmp_path / "log", "fairseq-train", *flags, tmp_path / "cached", *cache, "--reset-optimizer")
        assert cached.returncode == 0, cached.output
        assert len(kl(direct.output)) == 2
        for path in (tmp_path / "cached").glob("*.pt"):
            path.unlink()
        assert kl(cached.output) == pytest.approx(kl(direct.output), abs=2e-3)  # probabilities of a cache are rounded
    other = [
        tmp_path / "bin",
        *TRAIN,
        *limits,
        "--teacher-checkpoint-path",
        m2m,
        *cache,
        "--save-dir",
        tmp_path / "other",
    ]
    other += ["--teacher-model-overrides", "{'source_lang': 'hi'}"]
    result = run(tmp_path / "log", "fairseq-train", *other)
    assert_refused(result, tmp_path / "other", "the cache", "other teacher")
