"""A setting of a recipe's model that the model does not read."""

import functools
from typing import Any

from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

from kd_ext.errors import ConfigError
from kd_ext.upstream.command_line import near


def apply() -> None:
    """Refuse it before training (fairseq 0.12.2).

    Hydra compares the settings of tasks and criterions with their dataclasses. Of a model without one, such as this
    project's, whatever a recipe or ``+model.`` says is taken: a misspelt setting of adapters trains the whole base. A
    checkpoint that is loaded to be used may have settings of a fork: a trainer is never made for it.
    """
    building = Trainer.__init__
    if getattr(building, "_kd_ext_reads", False):
        return

    @functools.wraps(building)
    def init(self, cfg, *args, **kwargs):
        _check(getattr(cfg, "model", None))
        building(self, cfg, *args, **kwargs)

    init._kd_ext_reads = True  # type: ignore[attr-defined]
    Trainer.__init__ = init


def _check(settings: Any) -> None:
    from kd_ext.models.same_function import settings_read  # models register themselves after every touch
    from kd_ext.models.transformer_ext import TransformerExtModel

    name = settings.get("_name", None) or settings.get("arch", None) if OmegaConf.is_config(settings) else None
    if not isinstance(name, str) or not issubclass(ARCH_MODEL_REGISTRY.get(name, object), TransformerExtModel):
        return
    known = settings_read(settings)
    for key in settings:
        if key not in known and key not in ("_name", "arch"):
            raise ConfigError(f"model.{key}: no setting of {name}{near(str(key), list(known)) or '; leave it out'}")
