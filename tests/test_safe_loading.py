"""Files that refer to more than is listed are refused before anything of them has run, with every torch."""

import importlib
import io
import pickle
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils

from kd_ext import upstream
from kd_ext.errors import ConfigError
from kd_ext.files import safe_loading
from kd_ext.upstream.mapped_checkpoints import mapped_checkpoints


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write(path, content, zipped):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def test_what_torch_by_itself_would_run(tmp_path):
    """The oracle of this file: these files are harmful."""
    path = write(tmp_path / "file", Calls(eval, f"open({str(tmp_path / 'witness')!r}, 'w')"), True)
    torch.load(path, weights_only=False)
    assert (tmp_path / "witness").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [eval, exec, open, getattr, __import__])
def test_calls_are_refused_by_name(tmp_path, function, zipped):
    content = {"model": {}, "extra_state": Calls(function, f"open({str(tmp_path / 'witness')!r}, 'w')")}
    path = write(tmp_path / "file", content, zipped)
    with pytest.raises(ConfigError, match=rf"refused, it refers to \S*{function.__name__}, which no checkpoint of fai"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    with pytest.raises(pickle.UnpicklingError, match=function.__name__):
        safe_loading.load(path)
    assert not (tmp_path / "witness").exists()


def test_the_way_around_it_that_is_advised_elsewhere(tmp_path, monkeypatch):
    """torch >= 2.6 by itself runs what is in a file where this is set."""
    path = write(tmp_path / "file", Calls(eval, f"open({str(tmp_path / 'witness')!r}, 'w')"), True)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ConfigError, match="refused, it refers to"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    with pytest.raises(ConfigError, match="refused, it refers to"), mapped_checkpoints():
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert not (tmp_path / "witness").exists()


def test_no_class_is_changed(monkeypatch):
    """A state for a class, in place of an object, would set the attributes of the class."""
    changing = b"\x80\x02cargparse\nNamespace\n(N}X\x04\x00\x00\x00markK\x01stb."
    oracle = "import pickle, sys; " + f"print(hasattr(pickle.loads({changing!r}), 'mark'))"
    done = subprocess.run([sys.executable, "-c", oracle], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "True\n"
    monkeypatch.setitem(safe_loading._allowed, "argparse.Namespace", Namespace)  # where torch itself reads it is empty
    with pytest.raises(pickle.UnpicklingError, match=r"Namespace.*would be changed"):
        safe_loading._Pickle.load(io.BytesIO(changing))


def test_no_way_from_an_allowed_name_to_its_attributes(tmp_path):
    """Protocol 4 has names with dots, which pickle by itself follows."""
    torch.save({"method": Namespace.__contains__}, tmp_path / "file", pickle_protocol=4)
    with pytest.raises(pickle.UnpicklingError):
        safe_loading.load(tmp_path / "file")


def test_a_program_is_refused(tmp_path):
    """torch itself takes a TorchScript archive for a file of tensors, if asked to load one."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "program.pt"))
    with pytest.raises(ConfigError, match=r"program\.pt: (refused|damaged).*torch"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "program.pt"))


@pytest.mark.parametrize("error", [MemoryError, lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")])
def test_no_memory_is_not_damage(tmp_path, monkeypatch, error):
    def load(*args, **kwargs):
        raise error()

    path = write(tmp_path / "file", {}, True)
    monkeypatch.setattr(safe_loading, "load", load)
    with pytest.raises((MemoryError, RuntimeError)):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_no_permission_is_not_damage(tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "file", {}, True)
    monkeypatch.setattr(safe_loading, "load", load)
    with pytest.raises(ConfigError, match="file: cannot be read: Permission denied"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_checkpoints_hold_is_read(tmp_path, zipped):
    tensors = {f"t{i}": torch.zeros(3, dtype=kind) for i, kind in enumerate((torch.half, torch.float, torch.long))}
    content = {"model": tensors, "scalar": np.float64(0.5), "array": np.arange(3), "list": [1, None, {"a": True}]}
    found = safe_loading.load(write(tmp_path / "file", content, zipped))
    assert found["scalar"] == 0.5
    assert found["array"].tolist() == [0, 1, 2]
    assert found["list"] == content["list"]
    assert all(torch.equal(found["model"][name], value) for name, value in tensors.items())


def test_only_fairseqs_reading_is_changed():
    """What other code of the same process loads is torch's own affair."""
    before = torch.load
    upstream.apply()
    assert torch.load is before
    assert checkpoint_utils.torch.save is torch.save
    assert checkpoint_utils.torch.Tensor is torch.Tensor


def test_models_that_load_what_a_setting_names(tmp_path):
    """Of xm_transformer ``load_pretrained_decoder_from``: asked to load unsafely, they do not."""
    torch.save({"model": Calls(eval, "1")}, tmp_path / "named.pt")
    for name in ("speech_to_text.xm_transformer", "text_to_speech.vocoder"):
        module = importlib.import_module(f"fairseq.models.{name}")
        with pytest.raises(pickle.UnpicklingError):
            module.torch.load(str(tmp_path / "named.pt"), weights_only=False)
        assert module.torch.nn is torch.nn
