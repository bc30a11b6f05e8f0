"""A task, a student and a teacher whose logits are given, for tests of the criterion alone."""

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel, FairseqDecoder
from fairseq.models.transformer import TransformerDecoderBase
from torch.nn import functional as F

from kd_ext.criterions.label_smoothed_cross_entropy_with_kd import LabelSmoothedCrossEntropyWithKD
from kd_ext.models.output_projection import find_projection
from kd_ext.modules.language_tags import LanguageTags
from kd_ext.modules.teacher import Teacher
from kd_ext.tasks.languages import Languages
from kd_ext.tasks.translation_with_kd import TranslationWithKDConfig, TranslationWithKDTask

LANGUAGES = ["hi", "ta", "bn"]
VOCABULARY = 17


def dictionary(tags=True):
    words = Dictionary()
    for language in LANGUAGES if tags else []:
        words.add_symbol(f"__src__{language}")
    while len(words) < VOCABULARY:
        words.add_symbol(f"w{len(words)}")
    return words


def languages(words, prefix="__src__"):
    """Every word of that prefix, wherever it stands."""
    tags = {i: word[len(prefix) :] for i, word in enumerate(words.symbols) if word.startswith(prefix)}
    names = [words.symbols[i] for i in tags]
    return Languages(LanguageTags(tags, len(words)), names, "source", [1] * (1 + len(tags)))


class GivenLogits(BaseFairseqModel):
    """Returns the logits that it is given in `logits`, B x T x V; padding positions hold garbage."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(1))

    def forward(self, src_tokens, prev_output_tokens, src_lengths=None):
        return self.logits, None

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        return F.log_softmax(net_output[0], dim=-1, dtype=torch.float32)


class GivenFeatures(BaseFairseqModel):
    """The same with upstream's way from features to logits: the features are the logits, the projection is unity."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(1))
        self.decoder = Decoder(lambda: self.logits)

    def forward(self, src_tokens, prev_output_tokens, src_lengths=None, features_only=False):
        return self.decoder(prev_output_tokens, features_only=features_only)


class Decoder(FairseqDecoder):
    forward = TransformerDecoderBase.forward
    output_layer = TransformerDecoderBase.output_layer
    adaptive_softmax = None

    def __init__(self, features):
        super().__init__(None)
        self.output_projection = torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        torch.nn.init.eye_(self.output_projection.weight)
        self._features = features

    def extract_features(self, prev_output_tokens, **kwargs):
        self.output_projection.to(self._features().dtype)
        return self._features(), None


def random_batch(rng, languages, longest=6, teachers=1):
    """A batch as the oracle takes it: one sentence for each of `languages` (None: a sentence without a tag)."""
    batch = []
    for language in languages:
        length = int(rng.integers(2, longest + 1))
        targets = rng.integers(4, VOCABULARY, size=length)
        student = rng.normal(size=(length, VOCABULARY)) * 2
        batch.append((language, targets, student, [rng.normal(size=(length, VOCABULARY)) * 2 for _ in range(teachers)]))
    return batch


def padded(rows, fill, extra=0):
    """Right-padded to the longest row and `extra` more."""
    longest = max(map(len, rows)) + extra
    return np.stack([np.concatenate([row, np.full((longest - len(row), *row.shape[1:]), fill)]) for row in rows])


def to_sample(words, batch, extra=0):
    pad = words.pad()
    tags = [[words.index(f"__src__{x[0]}")] if x[0] is not None else [] for x in batch]
    source = [np.array([pad] * (3 - len(tag)) + tag + [10, 11, 2]) for tag in tags]  # left-padded, as upstream does
    return {
        "net_input": {
            "src_tokens": torch.tensor(np.stack(source)),
            "prev_output_tokens": torch.tensor(padded([x[1] for x in batch], pad, extra)),
        },
        "target": torch.tensor(padded([x[1] for x in batch], pad, extra)),
        "ntokens": sum(len(x[1]) for x in batch),
    }


class Run:
    """The criterion of one run, with a student and teachers whose logits a test sets."""

    student_kind = teacher_kind = GivenLogits

    def __init__(self, strategy, teachers=1, prefix=0, eps=0.1, tag="__src__", **flags):
        config = TranslationWithKDConfig(kd_strategy=strategy, kd_language_tag=tag)
        self.words = dictionary()
        self.task = TranslationWithKDTask(config, self.words, self.words)
        self.task._builds_student, self.task._languages = True, languages(self.words, tag)
        self.student = self.student_kind()
        self.teachers = [self.teacher_kind() for _ in range(teachers)]
        projections = [find_projection(x) if isinstance(x, GivenFeatures) else None for x in self.teachers]
        self.task.load_teacher = lambda temperature: Teacher(self.teachers, projections)
        self.criterion = LabelSmoothedCrossEntropyWithKD(
            self.task, False, eps, ignore_prefix_size=prefix, report_accuracy=True, **flags
        )
        self.criterion.train()
        self.student.train()

    def set_logits(self, batch, extra=0, dtype=torch.float32):
        self.student.logits = torch.nn.Parameter(torch.tensor(padded([x[2] for x in batch], 50.0, extra), dtype=dtype))
        for i, teacher in enumerate(self.teachers):
            logits = torch.tensor(padded([x[3][i] for x in batch], -7.0, extra), dtype=dtype)
            teacher.logits = torch.nn.Parameter(logits, requires_grad=False)

    def forward(self, batch, extra=0, dtype=torch.float32, **entries):
        """Run the criterion on a batch; returns the loss and what is logged. The gradient is in ``student.logits``."""
        self.set_logits(batch, extra, dtype)
        sample = {**to_sample(self.words, batch, extra), **entries}
        loss, _, logged = self.criterion(self.student, sample)
        if self.student.training:
            loss.backward()
        return loss, logged
