"""A model with fewer layers is the same model, with random weights and a smaller budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import make

from loracle.export.bench.models import bench_model
from loracle.files import Checkpoint
from loracle.reference import ConfigError, FileError


def test_a_folder_is_measured_as_it_is(tmp_path: Path) -> None:
    folder = make(tmp_path / "own", "llama")
    model = bench_model(str(folder), None, tmp_path / "scratch")
    assert (model.name, model.folder, model.random) == ("own", folder, False)
    assert (model.layers, model.full_layers) == (2, 2)
    assert model.budget(100.0) == 100.0
    assert not (tmp_path / "scratch").exists()


def test_layers_are_left_out_and_the_rest_is_random(tmp_path: Path) -> None:
    folder = make(tmp_path / "own", "gemma3")
    state = torch.random.get_rng_state()
    model = bench_model(str(folder), 1, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (model.layers, model.full_layers, model.random) == (1, 3, True)
    assert model.budget(99.0) == 33.0
    config = json.loads((model.folder / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 1
    with Checkpoint(model.folder) as checkpoint, Checkpoint(folder) as whole:
        kept = {name for name in whole.names if ".layers.1." not in name and ".layers.2." not in name}
        assert set(checkpoint.names) == kept
        assert model.full_parameters == whole.total_parameters


def test_more_layers_than_there_are_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "own", "gpt2")
    with pytest.raises(ConfigError, match="layers: expected 1 to 2, as own has, got 3"):
        bench_model(str(folder), 3, tmp_path)


@pytest.mark.parametrize(("name", "got"), [("t5", "an encoder and a decoder"), ("vit", "pixel_values")])
def test_a_model_that_reads_no_single_text_is_refused(tmp_path: Path, name: str, got: str) -> None:
    with pytest.raises(ConfigError, match=f"expected a model that reads one text in one graph, got {got}"):
        bench_model(str(make(tmp_path / name, name)), None, tmp_path)


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"expected a model folder or one of gpt2, gpt2-medium"):
        bench_model(str(tmp_path / "none"), None, tmp_path)


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "own", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such"}))
    with pytest.raises(ConfigError, match=r"config\.json: transformers refuses it: "):
        bench_model(str(folder), None, tmp_path)
