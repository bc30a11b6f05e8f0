"""Distillation as its definition reads: float64, numpy, loops over sentences and tokens; no code of kd_ext."""

from decimal import ROUND_CEILING, Decimal

import numpy as np


def softmax(logits, temperature=1.0):
    scaled = logits / temperature
    e = np.exp(scaled - scaled.max())
    return e / e.sum()


class Oracle:
    """One run of training. Feed it the batches in order, as many at a time as there are workers.

    A batch is a list of sentences (language, targets, student logits T x V, [teacher logits T x V, ...]), unpadded.
    """

    def __init__(
        self, strategy, alpha=0.5, rate=None, queue_size=None, temperature=1.0, eps=0.1, prefix=0, window="each"
    ):
        self.strategy, self.alpha, self.rate, self.queue_size = strategy, alpha, rate, queue_size
        self.temperature, self.eps, self.prefix = temperature, eps, prefix
        self.window = window
        self.queues = {}

    def tokens(self, batch):
        for s, (language, targets, student, teachers) in enumerate(batch):
            for t in range(self.prefix, len(targets)):
                yield (s, t), language, targets[t], student[t], [teacher[t] for teacher in teachers]

    def gate(self, pool):
        k = int((Decimal(str(self.rate)) * len(pool)).to_integral_value(ROUND_CEILING))
        return sorted(pool, reverse=True)[k - 1]

    def gate_in_window(self, language):
        """Of the language's tokens among the newest of all; of fewer than 20 and than 1 %: of all."""
        window = self.queues["shared"]
        own = [x for name, x in window if name == language]
        is_too_few = len(own) < 20 and 100 * len(own) < len(window)
        return self.gate([x for _, x in window] if is_too_few else own)

    def gates(self, batches):
        """For each batch a function from a language to its gate."""
        nlls = [
            [(language, -np.log(softmax(student)[y])) for _, language, y, student, _ in self.tokens(batch)]
            for batch in batches
        ]
        if self.strategy in ("word_seq_level", "word_level"):
            return [lambda language: -np.inf for _ in batches]
        if self.strategy == "batch_level":
            gates = [self.gate([x for _, x in batch]) if batch else None for batch in nlls]
            return [lambda language, gate=gate: gate for gate in gates]
        if self.window == "shared":
            pushed = [pair for batch in nlls for pair in batch]
            self.queues["shared"] = (self.queues.get("shared", []) + pushed)[-self.queue_size :]
            gates = {language: self.gate_in_window(language) for language in {name for name, _ in pushed}}
            return [lambda language: gates[language] for _ in batches]
        for batch in nlls:  # every worker's batch is pushed, in rank order, before any is gated
            for language, nll in batch:
                name = "all" if self.strategy == "global_level" else language
                self.queues.setdefault(name, []).append(nll)
        for name in self.queues:
            self.queues[name] = self.queues[name][-self.queue_size :]
        if self.strategy == "global_level":
            gate = self.gate(self.queues["all"]) if self.queues["all"] else None
            return [lambda language: gate for _ in batches]
        gates = {name: self.gate(pool) for name, pool in self.queues.items()}
        return [lambda language: gates[language] for _ in batches]

    def step(self, batches):
        """Losses, gradients of the student's logits and selections of one step: a dictionary for each batch."""
        return [self._loss(batch, gate) for batch, gate in zip(batches, self.gates(batches))]

    def _loss(self, batch, gate):
        golden_weight, kd_weight = {
            "word_seq_level": (1 - self.alpha, self.alpha),
            "word_level": (0.0, 1.0),
        }.get(self.strategy, (1.0, 1.0))
        out = {"loss": 0.0, "nll": 0.0, "kd": 0.0, "kl": 0.0, "selected": [], "tokens": 0}
        out["gradients"] = [np.zeros_like(student) for _, _, student, _ in batch]
        T = self.temperature
        for (s, t), language, y, student, teachers in self.tokens(batch):
            p, p_T = softmax(student), softmax(student, T)
            q = sum(softmax(teacher, T) for teacher in teachers) / len(teachers)
            # the label-smoothed target as a distribution: its cross-entropy is upstream's loss
            smooth = np.full(len(p), self.eps / (len(p) - 1))
            smooth[y] = 1 - self.eps
            nll = -np.log(p[y])
            out["nll"] += nll
            out["tokens"] += 1
            out["loss"] += golden_weight * -(smooth * np.log(p)).sum()
            gradient = golden_weight * (p - smooth)
            if nll >= gate(language):
                cross_entropy = T**2 * -(q * np.log(p_T)).sum()
                out["kd"] += cross_entropy
                out["kl"] += T**2 * (q * (np.log(q) - np.log(p_T))).sum()
                out["loss"] += kd_weight * cross_entropy
                gradient = gradient + kd_weight * T * (p_T - q)
                out["selected"].append((s, t))
            out["gradients"][s][t] = gradient
        return out
