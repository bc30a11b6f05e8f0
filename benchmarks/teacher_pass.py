"""(h) The teacher's pass and a whole step of word-level distillation on a CPU, by ways of making the pass cheaper.

``python benchmarks/teacher_pass.py`` trains the student of steps.py with its teacher, in one process: in every round
all variants do a step of the same batch by turns, so that whatever else the machine does disturbs them alike. What
they cost in exactness is measured on the demo's teacher and student, after ``make demo`` or its first steps.
"""

import argparse
import copy
import functools
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait use no processor time

import torch
from common import HERE, THREADS, save
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.modules import MultiheadAttention
from fairseq.trainer import Trainer
from padding import random_lengths
from steps import DISTIL, VOCABULARY, model_flags
from torch import nn
from torch.nn import functional as F

import kd_ext.upstream  # noqa: F401
from kd_ext.models.output_projection import find_projection
from kd_ext.modules.compiled_layers import compile_layers
from kd_ext.modules.positions import Positions
from kd_ext.modules.teacher import Teacher

MAX_TOKENS, BATCHES, WARM_UP = 2048, 12, 2
FEATURES = ("avx512_bf16", "amx_bf16", "amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2")


class CannotError(Exception):
    """Why this torch does not have a variant."""


# ---- what is tried ----


class Attention(nn.Module):
    """A frozen fairseq attention of full passes, whose projections are modules: quantized ones can be called alone."""

    def __init__(self, old: MultiheadAttention) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = old.q_proj, old.k_proj, old.v_proj, old.out_proj
        self.heads = old.num_heads

    def forward(self, query, key, value, key_padding_mask=None, attn_mask=None, **_):
        """Shapes ``(T, B, d)``, as fairseq's; no weights."""
        steps, sentences, width = query.shape
        q, k, v = (
            projection(x).view(x.size(0), sentences, self.heads, -1).permute(1, 2, 0, 3)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = attn_mask
        if key_padding_mask is not None:
            hidden = torch.zeros(key_padding_mask.shape, dtype=q.dtype)
            hidden = hidden.masked_fill(key_padding_mask.bool(), float("-inf"))[:, None, None]
            mask = hidden if mask is None else mask + hidden
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.permute(2, 0, 1, 3).reshape(steps, sentences, width)), None

    def _get_input_buffer(self, _):
        return {}  # fairseq's decoder layer asks, in full passes too


def layers_of(model: nn.Module) -> List[Any]:
    return [*model.encoder.layers, *model.decoder.layers]


def quantize(model: nn.Module) -> None:
    """int8 weights of each row's own scale, activations scaled as they come; the projection to words stays as it is."""
    if not hasattr(F, "scaled_dot_product_attention"):
        raise CannotError("torch < 2")
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    except ImportError as error:
        raise CannotError("this torch has no quantize_dynamic") from error
    for layer in layers_of(model):
        for name in ("self_attn", "encoder_attn"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, Attention(getattr(layer, name)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it will move to a package of its own
            try:
                quantize_dynamic(layer, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)
            except RuntimeError as error:
                raise CannotError(str(error).splitlines()[0]) from error


class Gather(nn.Module):
    """A feed-forward part's first matrix, of the real positions alone."""

    def __init__(self, inner: nn.Module, where: Dict[str, Any], side: str) -> None:
        super().__init__()
        self.inner, self.where, self.side = inner, where, side

    def forward(self, x):
        self.where["shape"] = x.shape
        return self.inner(x.flatten(0, 1)[self.where[self.side]])


class Scatter(nn.Module):
    """Its second matrix, with zeros at padding."""

    def __init__(self, inner: nn.Module, where: Dict[str, Any], side: str) -> None:
        super().__init__()
        self.inner, self.where, self.side = inner, where, side

    def forward(self, x):
        real = self.inner(x)
        whole = real.new_zeros(self.where["shape"]).flatten(0, 1)
        return whole.index_copy(0, self.where[self.side], real).view(self.where["shape"])


def drop_padding(model: nn.Module) -> None:
    """Feed-forward parts of real positions alone. These are found from the tokens, once a pass."""
    where: Dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        for layer in getattr(model, side).layers:
            layer.fc1, layer.fc2 = Gather(layer.fc1, where, side), Scatter(layer.fc2, where, side)
    inner = model.forward

    @functools.wraps(inner)  # of its arguments the loss asks
    def forward(src_tokens, src_lengths, prev_output_tokens, **kwargs):
        for side, tokens in (("encoder", src_tokens), ("decoder", prev_output_tokens)):
            where[side] = tokens.t().ne(model.decoder.padding_idx).flatten().nonzero().squeeze(1)
        return inner(src_tokens=src_tokens, src_lengths=src_lengths, prev_output_tokens=prev_output_tokens, **kwargs)

    model.forward = forward


def compiled(model: nn.Module) -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 3):
        raise CannotError("torch < 2.3")
    compile_layers(model)


class Variant(NamedTuple):
    """What is done to the teacher, its dtype, and what to the student."""

    change: Optional[Callable] = None
    dtype: torch.dtype = torch.float32
    of_student: Optional[Callable] = None


VARIANTS = {
    "float32": Variant(),
    "bfloat16": Variant(dtype=torch.bfloat16),
    "int8": Variant(quantize),
    "compiled": Variant(compiled),
    "compiled, bfloat16": Variant(compiled, torch.bfloat16),
    "padding dropped": Variant(drop_padding),
    "padding dropped, student too": Variant(drop_padding, of_student=drop_padding),
    "compiled, student too": Variant(compiled, of_student=compiled),
    "compiled, student too, teacher bfloat16": Variant(compiled, torch.bfloat16, compiled),
}


def prepared(loaded: Teacher, variant: Variant) -> Teacher:
    """A teacher of its own for a variant."""
    models = copy.deepcopy(loaded.models)
    teacher = Teacher(models, [find_projection(model) for model in models])
    teacher.place(torch.device("cpu"), variant.dtype)
    if variant.change is not None:
        for model in teacher.models:
            variant.change(model)
    return teacher


# ---- speed ----


def make_data(folder: Path) -> None:
    """Sentences of random words, 8 to 60 long, for the two sides of a batch to have padding as real text has."""
    from fairseq.data import Dictionary, indexed_dataset

    words = Dictionary()
    for i in range(VOCABULARY - len(words)):
        words.add_symbol(f"w{i}")
    generator = torch.Generator().manual_seed(0)
    sources, targets = random_lengths(same=False)
    for language, lengths in (("xx", sources), ("yy", targets)):
        words.save(str(folder / f"dict.{language}.txt"))
        prefix = str(folder / f"train.xx-yy.{language}")
        builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", vocab_size=VOCABULARY)
        for length in lengths[:3000]:
            sentence = torch.randint(4, VOCABULARY, (int(length),), generator=generator)
            sentence[-1] = words.eos()
            builder.add_item(sentence)
        builder.finalize(f"{prefix}.idx")


def trainer_of(folder: Path, *flags: Any) -> Trainer:
    """What fairseq-train would train with."""
    given = [folder, "--user-dir", HERE.parent / "kd_ext", "--optimizer", "adam", "--lr", "1e-4", "--dropout", 0]
    given += ["--max-tokens", MAX_TOKENS, "--label-smoothing", 0.1, "--cpu", "--num-workers", 0, *DISTIL]
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, list(map(str, [*given, *flags]))))
    task = tasks.setup_task(cfg.task)
    task.load_dataset("train")
    torch.manual_seed(1)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    return Trainer(cfg, task, model, criterion)


def batches_of(trainer: Trainer, subset: str, count: int) -> List[Any]:
    """Batches of all lengths that fairseq makes."""
    made = trainer.task.get_batch_iterator(
        trainer.task.dataset(subset), max_tokens=MAX_TOKENS, required_batch_size_multiple=8, seed=1
    )
    found = list(made.next_epoch_itr(shuffle=True))
    return found[:: max(1, len(found) // count)][:count]


def real_positions(sample: Any, padding: int = 1) -> Positions:
    return Positions(sample["target"].ne(padding))


def seconds(function: Callable, *arguments: Any) -> Tuple[float, float]:
    """How long a call takes by the clock, and of processors."""
    start, used = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - start, time.process_time() - used


def speed(variants: Dict[str, Variant], rounds: int, note: Callable) -> None:
    """Give `note` what has been measured so far, after every round."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        checkpoint = folder / "teacher.pt"
        teacher = trainer_of(folder, *model_flags("teacher"), "--alpha", 0)
        teacher.consolidate_optimizer()  # asked for before a checkpoint is saved
        teacher.save_checkpoint(str(checkpoint), {"train_iterator": {"epoch": 1}})
        student = ["--teacher-checkpoint-path", checkpoint, "--kd-strategy", "word_level"]
        # each change to a student is a trainer of its own
        trainers, teachers, why = {}, {}, {}
        for name, variant in variants.items():
            try:
                if variant.of_student not in trainers:
                    made = trainer_of(folder, *model_flags("student"), *student)
                    loaded, made.criterion.teacher = made.criterion.teacher, None
                    if variant.of_student is not None:
                        variant.of_student(made.model)
                    trainers[variant.of_student] = made
                teachers[name] = prepared(loaded, variant)
            except CannotError as error:
                why[name] = str(error)
        batches = batches_of(trainers[None], "train", BATCHES)
        times: Dict[str, Dict[str, List[Tuple[float, float]]]] = {name: {"pass": [], "step": []} for name in teachers}
        names = list(teachers)
        for number in range(-WARM_UP, rounds):
            batch = batches[number % len(batches)]
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                trainer, teacher = trainers[variants[name].of_student], teachers[name]
                trainer.criterion.teacher = teacher
                alone = seconds(teacher.output, batch, real_positions(batch))
                step = seconds(trainer.train_step, [batch])
                if number >= 0:
                    times[name]["pass"].append(alone)
                    times[name]["step"].append(step)
            if number >= 0:
                note([{"variant": name, "skipped": reason} for name, reason in why.items()] + rows_of(times))


def rows_of(times: Dict[str, Dict[str, List[Tuple[float, float]]]]) -> List[Dict[str, Any]]:
    """Medians, over rounds, of each variant and of what it took over what float32 took in the same round."""
    rows = []
    for name, found in times.items():
        row: Dict[str, Any] = {"variant": name, "rounds": len(found["step"])}
        for what in ("pass", "step"):
            for i, clock in enumerate(("seconds", "processor_seconds")):
                over = sorted(a[i] / b[i] for a, b in zip(found[what], times["float32"][what]))
                row[f"{what}_{clock}"] = statistics.median(x[i] for x in found[what])
                row[f"{what}_{clock}_over_float32"] = statistics.median(over)
                row[f"{what}_{clock}_quartiles"] = [over[len(over) // 4], over[3 * len(over) // 4]]
        rows.append(row)
    return rows


# ---- exactness ----


def student_log_probs(model: nn.Module, sample: Any, positions: Positions) -> torch.Tensor:
    return positions.take(model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)).float()


@torch.no_grad()
def exactness(variants: Dict[str, Variant], demo: Path) -> List[Dict[str, Any]]:
    """What each variant does to a trained teacher's probabilities, and to kd_kl with a trained student, in bits."""
    from fairseq import checkpoint_utils

    paths = {name: demo / name / "checkpoint_last.pt" for name in ("teacher", "student")}
    (student,), _ = checkpoint_utils.load_model_ensemble([str(paths["student"])], {"data": str(demo / "data")})
    student.eval()
    data = demo / "data"
    teacher_flags = ["--teacher-checkpoint-path", paths["teacher"], "--teacher-model-overrides", {"data": str(data)}]
    trainer = trainer_of(data, *model_flags("student"), *teacher_flags)
    trainer.task.load_dataset("valid")
    batches = batches_of(trainer, "valid", 100)
    reference: List[torch.Tensor] = []
    rows: List[Dict[str, Any]] = []
    for name, variant in variants.items():
        if variant.of_student is not None:
            continue
        try:
            teacher = prepared(trainer.criterion.teacher, variant)
        except CannotError as error:
            rows.append({"variant": name, "skipped": str(error)})
            continue
        moved, kl, same, tokens = [], 0.0, 0, 0
        for i, sample in enumerate(batches):
            positions = real_positions(sample)
            probs = teacher.probs(sample, positions)
            if name == "float32":
                reference.append(probs)
            log_q, base = probs.clamp_min(1e-30).log2(), reference[i]
            moved.append((base * (base.clamp_min(1e-30).log2() - log_q)).sum(1))
            log_p = student_log_probs(student, sample, positions) / torch.tensor(2.0).log()
            kl += float((probs * (log_q - log_p)).sum(1).double().sum())
            same += int((probs.argmax(1) == base.argmax(1)).sum())
            tokens += len(probs)
        of_tokens = torch.cat(moved).double()
        row = {"variant": name, "tokens": tokens, "kd_kl": kl / tokens}
        row["moved_kd_kl"] = row["kd_kl"] - (rows[0]["kd_kl"] if rows else row["kd_kl"])
        row.update(kl_mean=float(of_tokens.mean()), kl_max=float(of_tokens.max()), same_best_word=same / tokens)
        row["entropy"] = float(-torch.cat([(p * p.clamp_min(1e-30).log2()).sum(1) for p in reference]).mean())
        rows.append(row)
        print(row, flush=True)
    return rows


def processor() -> Dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in lines.items()}
    flags = found.get("flags", "").split()
    family = {name: found.get(name) for name in ("model name", "cpu family", "model")}
    return {**family, **{feature: feature in flags for feature in FEATURES}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="its folder: %(default)s")
    parser.add_argument("--rounds", type=int, default=24, help="steps of each variant: %(default)s")
    parser.add_argument("--only", choices=["speed", "exactness"], help="one of the two parts")
    parser.add_argument("--without", nargs="*", default=[], help="leave out variants whose names contain one of these")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    settings = {"processor": processor(), "max_tokens": MAX_TOKENS, "rounds": given.rounds}
    print(settings, flush=True)
    variants = {name: x for name, x in VARIANTS.items() if not any(part in name for part in given.without)}
    if given.only != "exactness":
        speed(variants, given.rounds, lambda rows: save("teacher_pass", rows, **settings))
    if given.only != "speed":
        save("teacher_exactness", exactness(variants, given.demo.resolve()), **settings)


if __name__ == "__main__":
    main()
