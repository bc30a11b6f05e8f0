"""``--bf16`` on a GPU: the optimizer takes all parameters as one, as it does with ``--fp16``."""

import functools
from typing import Any, Dict, List

import torch
from fairseq import optim
from fairseq.optim.fp16_optimizer import FP16Optimizer
from torch import Tensor


def apply() -> None:
    """Flatten where fairseq (0.12.2) does not since it takes bfloat16 for a TPU's.

    It gives a GPU some thousand small pieces of work an update less, which took more than half of a step's time on an
    H100. Either layout of an optimizer's state is read into the other, so that every checkpoint can be resumed.
    """
    original = FP16Optimizer.__dict__["build_optimizer"].__func__
    if getattr(original, "_kd_ext", False):
        return

    @functools.wraps(original)
    def build_optimizer(cls, cfg, params, **kwargs):
        if _should_be_flat(cfg, params):
            flat = cls.build_fp32_params(cfg.optimizer, params, flatten=True)
            optimizer = optim.build_optimizer(cfg.optimizer, [flat])
            if optimizer.supports_flat_params:
                return cls(cfg, params, optimizer, flat, **kwargs)
        return original(cls, cfg, params, **kwargs)

    build_optimizer._kd_ext = True
    FP16Optimizer.build_optimizer = classmethod(build_optimizer)
    _read_both_layouts()


def _should_be_flat(cfg: Any, params: List[Tensor]) -> bool:
    on_gpu = all(_is_on_gpu(parameter) for parameter in params)
    is_sharded = cfg.distributed_training.zero_sharding != "none"
    return cfg.common.bf16 and on_gpu and not is_sharded and not cfg.common.fp16_no_flatten_grads


def _is_on_gpu(parameter: Tensor) -> bool:
    return parameter.is_cuda


def _read_both_layouts() -> None:
    original = FP16Optimizer.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self, state_dict, *args, **kwargs):
        groups = self.fp32_optimizer.optimizer.param_groups
        if len(groups) == len(state_dict["param_groups"]) == 1:
            state_dict = fitted(state_dict, [parameter.shape for parameter in groups[0]["params"]])
        return original(self, state_dict, *args, **kwargs)

    FP16Optimizer.load_state_dict = load_state_dict


def fitted(state_dict: Dict[str, Any], shapes: List[torch.Size]) -> Dict[str, Any]:
    """The state of an optimizer with one group for parameters that are parted differently.

    Args:
        state_dict: an optimizer's, one of those that have a number for each of a parameter's, as Adam's
        shapes: of the parameters that it is for; together they have as many elements, in the same order

    Returns:
        the same object where it fits, or cannot be made to
    """
    (group,), sizes = state_dict["param_groups"], [shape.numel() for shape in shapes]
    states = [state_dict["state"].get(name, {}) for name in group["params"]]
    if len(states) == len(shapes) or not all(states):
        return state_dict
    parted: List[Dict[str, Any]] = [{} for _ in shapes]
    for name, first in states[0].items():
        if not torch.is_tensor(first) or first.dim() == 0:  # the count of steps
            parts = [first] * len(shapes)
        else:
            whole = torch.cat([state[name].reshape(-1) for state in states])
            if whole.numel() != sum(sizes):
                return state_dict
            parts = [part.view(shape) for part, shape in zip(whole.split(sizes), shapes)]
        for state, part in zip(parted, parts):
            state[name] = part
    group = {**group, "params": list(range(len(shapes)))}
    return {**state_dict, "state": dict(enumerate(parted)), "param_groups": [group]}
