"""An adapter is a PEFT folder or a loralib file, and what a file does not hold has to be given."""

from pathlib import Path

import numpy as np
import pytest
import torch

from loracle.export.verification.trained import LoralibLayers, read_trained
from loracle.files import write_adapter
from loracle.reference import ConfigError, FileError
from tests.files_fixtures import Q0, small_adapter


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "lora.pt"
    tensors = {"lora_A": torch.arange(6.0).reshape(2, 3), "lora_B": torch.ones(4, 2)}
    torch.save({f"{Q0}.{name}": tensor for name, tensor in tensors.items()}, path)
    return path


def test_a_loralib_file_with_its_rank_and_alpha(state: Path) -> None:
    adapter = read_trained(state, LoralibLayers(2, 6.0))
    pair = adapter.pairs[Q0]
    assert pair.scaling == 3.0
    assert np.array_equal(pair.A, np.arange(6, dtype=np.float32).reshape(2, 3))
    assert np.array_equal(pair.B, np.ones((4, 2), np.float32))


def test_a_file_needs_them_and_a_folder_has_them(state: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank and alpha"):
        read_trained(state)
    write_adapter(tmp_path / "adapter", small_adapter())
    assert read_trained(tmp_path / "adapter").pairs.keys() == small_adapter().pairs.keys()
    with pytest.raises(ConfigError, match="leave them out"):
        read_trained(tmp_path / "adapter", LoralibLayers(2, 6.0))


def test_what_is_wrong_names_the_file(state: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, state)
    with pytest.raises(FileError, match=r"lora\.pt: tensor weight"):
        read_trained(state, LoralibLayers(2, 6.0))
    state.write_bytes(b"not a pickle")
    with pytest.raises(FileError, match=r"lora\.pt"):
        read_trained(state, LoralibLayers(2, 6.0))
