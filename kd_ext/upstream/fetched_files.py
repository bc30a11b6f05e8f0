"""``from_pretrained`` fetches nothing from an address that a checkpoint names."""

import functools
from typing import Any

from fairseq.hub_utils import GeneratorHubInterface
from fairseq.registry import REGISTRIES
from omegaconf import DictConfig

from kd_ext.errors import ConfigError
from kd_ext.files.settings import shown


def apply() -> None:
    """Look at the settings of tokenizer and BPE before they are built (fairseq 0.12.2).

    fairseq's commands take them from the command line, ``from_pretrained`` from the checkpoint. Where such a setting
    names a file, fairseq fetches what is an address and keeps it in the user's cache.
    """
    original = GeneratorHubInterface.__init__
    if getattr(original, "_kd_ext", False):
        return

    @functools.wraps(original)
    def init(self, cfg, task, models):
        for group in ("tokenizer", "bpe"):
            _check(group, getattr(cfg, group, None))
        original(self, cfg, task, models)

    init._kd_ext = True  # type: ignore[attr-defined]
    GeneratorHubInterface.__init__ = init


def _check(group: str, settings: Any) -> None:
    if not isinstance(settings, DictConfig):
        return
    name = settings.get("_name")
    usual = REGISTRIES[group]["dataclass_registry"].get(name)
    for key in settings:
        value = settings[key] if key in settings else None  # noqa: SIM401  get() raises where a value is missing
        # fairseq's own, of gpt2, are what whoever asks for that wants
        if isinstance(value, str) and "://" in value and value != getattr(usual, str(key), None):
            raise ConfigError(
                f"{key} {shown(value)}: its {group} '{name}' would be fetched from there; fetch the file, and name it: "
                f"from_pretrained(..., {key}='file')"
            )
