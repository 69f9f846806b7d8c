"""Tasks as inputs of one session: the baked form's bits, the base's own where no task is given, one step."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from export_fixtures import VOCABULARY, make_adapter, make_model
from safetensors.numpy import load_file

from loracle.export import export
from loracle.export.names import SWAPPABLE_FILE, TASK_KEY
from loracle.files import Checkpoint, MergedWeights, read_adapter
from loracle.files.safetensors_file import SafetensorsFile
from loracle.reference import ConfigError, FileError

Array = np.ndarray[Any, Any]
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = make_model(root / "base")
    make_adapter(root / "french", base)
    make_adapter(root / "german", base, ("v_proj", "gate_proj"), r=2, seed=2)
    return root


def add(models: Path, out: Path, name: str, **options: Any) -> Path:
    export(models / "base", out, models / name, form="swappable", name=name, **options)
    return out


@pytest.fixture
def deployment(models: Path, tmp_path: Path) -> Path:
    """The base and the task `french`."""
    return add(models, tmp_path / "deployment", "french")


def logits(graph: Path, tensors: dict[str, Array] | None = None) -> Array:
    """The logits of a few tokens, with products that are not laid out ahead, as a session has of inputs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feeds: dict[str, Array] = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), TYPES[entry.type])
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values")
    }
    feeds["input_ids"] = np.arange(0, VOCABULARY, 20)[None]
    feeds["attention_mask"] = np.ones_like(feeds["input_ids"])
    result: Array = session.run(["logits"], {**feeds, **(tensors or {})})[0]
    return result


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_task_has_the_bits_of_the_baked_form_and_of_the_linked_one(
    models: Path, tmp_path: Path, dtype: str
) -> None:
    folder = add(models, tmp_path / "deployment", "french", dtype=dtype)
    export(models / "base", folder, models / "french", form="linked", name="linked", dtype=dtype)
    export(models / "base", tmp_path / "base", dtype=dtype)
    tensors = load_file(folder / "french.task.safetensors")
    expected = logits(folder / "linked.onnx")
    base = logits(folder / "model.onnx")
    assert not np.array_equal(expected, base)
    np.testing.assert_array_equal(logits(folder / SWAPPABLE_FILE, tensors), expected, strict=True)
    np.testing.assert_array_equal(logits(folder / SWAPPABLE_FILE), base, strict=True)


def test_a_file_holds_the_merged_tensors_and_no_other(models: Path, deployment: Path) -> None:
    with Checkpoint(models / "base") as checkpoint:
        weights = MergedWeights(checkpoint, read_adapter(models / "french"))
        expected = {name: np.array(weights.tensor(name)) for name in weights.merged_names}
    tensors = load_file(deployment / "french.task.safetensors")
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array, strict=True)


def test_the_first_tensor_of_a_file_starts_at_a_page(deployment: Path) -> None:
    file = SafetensorsFile(deployment / "french.task.safetensors")
    assert next(iter(file.entries.values())).offset % 4096 == 0


def test_the_header_tells_count_bytes_and_hash(deployment: Path) -> None:
    import hashlib

    file = SafetensorsFile(deployment / "french.task.safetensors")
    content = b"".join(file.tensor(name).tobytes() for name in file.entries)
    told = json.loads(file.metadata[TASK_KEY])
    assert (told["tensors"], told["bytes"]) == (len(file.entries), len(content))
    assert told["sha256"] == hashlib.sha256(content).hexdigest()


def test_the_graph_is_the_base_s_but_for_its_inputs(deployment: Path) -> None:
    base, swappable = (
        onnx.load(deployment / name, load_external_data=False) for name in ("model.onnx", SWAPPABLE_FILE)
    )
    added = [value.name for value in swappable.graph.input][len(base.graph.input) :]
    assert sorted(added) == sorted(load_file(deployment / "french.task.safetensors"))
    for field in ("node", "initializer", "output"):
        own, expected = (list(getattr(model.graph, field)) for model in (swappable, base))
        assert own == expected
    assert list(swappable.graph.input)[: len(base.graph.input)] == list(base.graph.input)
    assert list(swappable.metadata_props) == list(base.metadata_props)


def test_a_task_with_other_targets_adds_inputs_and_leaves_the_other_task_alone(
    models: Path, deployment: Path
) -> None:
    before = (deployment / "french.task.safetensors").read_bytes()
    expected = logits(deployment / SWAPPABLE_FILE, load_file(deployment / "french.task.safetensors"))
    add(models, deployment, "german")
    assert (deployment / "french.task.safetensors").read_bytes() == before
    tensors = load_file(deployment / "french.task.safetensors")
    np.testing.assert_array_equal(logits(deployment / SWAPPABLE_FILE, tensors), expected)
    linked = deployment.parent / "linked"
    export(models / "base", linked, models / "german", form="linked", name="german")
    german = load_file(deployment / "german.task.safetensors")
    np.testing.assert_array_equal(logits(deployment / SWAPPABLE_FILE, german), logits(linked / "german.onnx"))


def test_a_task_that_needs_no_more_inputs_leaves_the_graph_alone(models: Path, deployment: Path) -> None:
    before = (deployment / SWAPPABLE_FILE).stat()
    export(models / "base", deployment, models / "french", form="swappable", name="twin")
    assert (deployment / SWAPPABLE_FILE).stat().st_mtime_ns == before.st_mtime_ns


def test_a_name_that_is_taken_is_refused_unless_it_is_to_be_replaced(models: Path, deployment: Path) -> None:
    with pytest.raises(FileError, match="french"):
        add(models, deployment, "french")
    before = load_file(deployment / "french.task.safetensors")
    shutil.copytree(models / "german", deployment.parent / "other")
    export(models / "base", deployment, models / "german", form="swappable", name="french", replace=True)
    assert load_file(deployment / "french.task.safetensors").keys() != before.keys()


@pytest.mark.parametrize("name", ["model", "swappable", "Swappable", "../out", ""])
def test_names_that_no_task_can_have_are_refused(models: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        export(models / "base", tmp_path / "out", models / "french", form="swappable", name=name)
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_model_is_refused(models: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=5)
    export(other, tmp_path / "out")
    before = {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(FileError, match="another model"):
        add(models, tmp_path / "out", "french")
    assert {path.name for path in (tmp_path / "out").iterdir()} == before
