"""Training on the probabilities of an adaptive softmax."""

import functools

from fairseq.modules import AdaptiveSoftmax
from torch import nn


class _LogSoftmax(nn.LogSoftmax):
    """Its result may be written over."""

    def forward(self, x):
        return super().forward(x).clone()


def apply() -> None:
    """Let gradients flow through ``AdaptiveSoftmax.get_log_prob`` (fairseq 0.12.2, every torch).

    It adds to the result of a log-softmax in place, which the backward pass of that needs: label-smoothed losses end
    in an error. fairseq trains these layers by its criterion ``adaptive_loss`` alone, which does not come here.
    """
    original = AdaptiveSoftmax.__init__
    if getattr(original, "_kd_ext", False):
        return

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.lsm = _LogSoftmax(dim=1)

    init._kd_ext = True
    AdaptiveSoftmax.__init__ = init
