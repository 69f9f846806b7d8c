"""A task that shares the base's data file: the baked form's bits, its own bytes alone, no other change."""

import multiprocessing
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from export_fixtures import VOCABULARY, make_adapter, make_model
from exports_at_once import add_beside_another
from refusal import refused

from loracle.export import export, write
from loracle.export.task_changes import remove_task
from loracle.export.task_names import find_tasks
from loracle.reference import ConfigError, FileError, TargetError

Content = dict[str, bytes]
ATTENTION, MLP = ("q_proj", "v_proj"), ("gate_proj",)


def content(folder: Path) -> Content:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def of_base(held: Content, *tasks: str) -> Content:
    """What `held` has beside the files of `tasks`."""
    return {name: data for name, data in held.items() if not name.startswith(tuple(f"{t}." for t in tasks))}


def task_names(deployment: Path) -> tuple[str, ...]:
    return tuple(name for name, _ in find_tasks(deployment))


def data_files(folder: Path, task: str) -> list[str]:
    return [path.name for path in folder.glob(f"{task}.*.onnx_data")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for tied in (True, False):
        base = make_model(root / f"tied {tied}", tied=tied)
    make_adapter(root / "attention", base, ATTENTION)
    make_adapter(root / "mlp", base, MLP, seed=2)
    return root


@pytest.fixture
def deployment(models: Path, tmp_path: Path) -> Path:
    """The base and the task `french`."""
    return linked(models, tmp_path / "deployment", "french")


def linked(models: Path, out: Path, name: str, adapter: str = "attention", **options: Any) -> Path:
    export(models / "tied True", out, models / adapter, form="linked", name=name, **options)
    return out


def logits(graph: Path) -> np.ndarray[Any, Any]:
    """The logits of a few tokens, with the default options of a session."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feeds: dict[str, np.ndarray[Any, Any]] = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), types[entry.type])
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values")
    }
    feeds["input_ids"] = np.arange(0, VOCABULARY, 20)[None]
    feeds["attention_mask"] = np.ones_like(feeds["input_ids"])
    result: np.ndarray[Any, Any] = session.run(["logits"], feeds)[0]
    return result


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_linked_task_gives_the_bits_of_the_baked_form(
    models: Path, tmp_path: Path, dtype: str, tied: bool
) -> None:
    base, adapter = models / f"tied {tied}", models / "attention"
    export(base, tmp_path / "baked", adapter, dtype=dtype)
    export(base, tmp_path / "linked", adapter, dtype=dtype, form="linked", name="french")
    export(base, tmp_path / "other", models / "mlp", dtype=dtype, form="linked", name="german")
    assert of_base(content(tmp_path / "linked"), "french") == of_base(content(tmp_path / "other"), "german")
    expected = logits(tmp_path / "baked" / "model.onnx")
    assert logits(tmp_path / "linked" / "french.onnx").tobytes() == expected.tobytes()
    assert logits(tmp_path / "linked" / "model.onnx").tobytes() != expected.tobytes()


def test_a_task_is_added_to_an_ordinary_export_of_its_base(models: Path, tmp_path: Path) -> None:
    """Its products of query, key and value are one, so that the task's are too."""
    base, adapter = models / "tied True", models / "attention"
    export(base, tmp_path / "linked")
    export(base, tmp_path / "linked", adapter, form="linked", name="french")
    export(base, tmp_path / "baked", adapter)
    expected = ir.load(tmp_path / "baked" / "model.onnx").graph.initializers
    task = ir.load(tmp_path / "linked" / "french.onnx").graph.initializers
    assert list(task) == list(expected)
    for name, value in expected.items():
        assert value.const_value is not None
        assert task[name].const_value is not None
        assert task[name].const_value.numpy().tobytes() == value.const_value.numpy().tobytes()


def test_onnx_and_onnx_ir_read_the_task_as_it_is(deployment: Path) -> None:
    onnx.load(deployment / "french.onnx")
    for value in ir.load(deployment / "french.onnx").graph.initializers.values():
        assert value.const_value is not None
        value.const_value.numpy()


def test_the_task_has_the_bytes_of_its_merged_tensors_alone(models: Path, deployment: Path) -> None:
    (data,) = data_files(deployment, "french")
    tensors = {
        name: value.const_value
        for name, value in ir.load(deployment / "french.onnx").graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    own = {name for name, tensor in tensors.items() if tensor.location == data}
    expected = {f"model.layers.{layer}.self_attn.{target}.weight" for layer in (0, 1) for target in ATTENTION}
    assert own == expected
    assert all(tensors[name].location == "model.onnx_data" for name in tensors.keys() - own)
    starts = sorted(tensors[name].offset or 0 for name in own)
    ends = sorted((tensors[name].offset or 0) + tensors[name].nbytes for name in own)
    assert all(start % 4096 == 0 for start in starts)
    assert all(0 <= start - end < 4096 for start, end in zip(starts[1:], ends, strict=False))
    assert (starts[0], ends[-1]) == (0, (deployment / data).stat().st_size)
    summary = export(models / "tied True", deployment, models / "attention", form="linked", name="again")
    files = [deployment / "again.onnx", deployment / data_files(deployment, "again")[0]]
    assert summary.bytes == sum(path.stat().st_size for path in files)


def test_tasks_come_and_go_without_a_change_of_anything_else(models: Path, deployment: Path) -> None:
    before = content(deployment)
    linked(models, deployment, "german", "mlp")
    assert task_names(deployment) == ("french", "german")
    assert of_base(content(deployment), "german") == before
    both = content(deployment)
    assert logits(deployment / "german.onnx").tobytes() != logits(deployment / "french.onnx").tobytes()
    remove_task(deployment, "french")
    assert task_names(deployment) == ("german",)
    assert content(deployment) == of_base(both, "french")
    linked(models, deployment, "french")
    assert content(deployment) == both
    remove_task(deployment, "german")
    assert content(deployment) == before


def test_what_a_renamed_graph_refers_to_stays(models: Path, deployment: Path) -> None:
    before = logits(deployment / "french.onnx")
    (deployment / "french.onnx").rename(deployment / "copy.onnx")
    linked(models, deployment, "german", "mlp")
    remove_task(deployment, "german")
    assert logits(deployment / "copy.onnx").tobytes() == before.tobytes()


def test_a_task_that_is_there_is_kept_unless_it_is_to_be_replaced(models: Path, deployment: Path) -> None:
    before = content(deployment)
    message = f"{deployment / 'french.onnx'}: the deployment has this task; choose another name or remove it"
    written: list[int] = []
    refused(
        lambda: linked(models, deployment, "french", "mlp", progress=lambda *_: written.append(1)),
        FileError,
        message,
    )
    assert not written
    assert content(deployment) == before


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", ".a", "model", "MODEL", "a\0", "a\n", "é"]
)
def test_a_name_that_could_be_another_file_is_refused(models: Path, tmp_path: Path, name: str) -> None:
    message = (
        "name: expected letters, digits, '.', '_' and '-' for a task, and not 'model' or 'swappable', "
        f"got {name!r}"
    )
    refused(lambda: linked(models, tmp_path / "out", name), ConfigError, message)
    refused(lambda: remove_task(tmp_path, name), ConfigError, message)
    assert not list(tmp_path.iterdir())


def test_a_task_that_appears_while_another_is_written_is_kept(models: Path, deployment: Path) -> None:
    there: list[Content] = []

    def progress(*_: int) -> None:
        if not there:
            linked(models, deployment, "german", "mlp")
            there.append(content_of_files(deployment))

    message = f"{deployment / 'german.onnx'}: the deployment has this task; choose another name or remove it"
    refused(lambda: linked(models, deployment, "german", progress=progress), FileError, message)
    assert [content(deployment)] == there


def test_options_that_do_not_fit_the_form_are_refused(models: Path, tmp_path: Path) -> None:
    base, out = models / "tied True", tmp_path / "out"
    for options, message in (
        ({"form": "frozen"}, "form: expected one of baked, linked, swappable, adapter-inputs, got 'frozen'"),
        ({"name": "a"}, "name: expected none in the form baked, got 'a'; choose another --form"),
        ({"form": "linked"}, "name: expected the task's name in the form linked, got none"),
        (
            {"form": "linked", "name": "a"},
            "adapter: expected one in the form linked, got none; give the task's adapter",
        ),
    ):
        refused(partial(export, base, out, **options), ConfigError, message)


def test_a_base_of_other_weights_is_refused(models: Path, tmp_path: Path, deployment: Path) -> None:
    before = content(deployment)
    other = make_model(tmp_path / "other", seed=3)
    with pytest.raises(FileError, match=r"model\.onnx: model\.\S+: \d+ of \d+ entries differ") as caught:
        export(other, deployment, models / "attention", form="linked", name="german")
    assert str(caught.value).endswith(
        "; the deployment's base is another model, or in another --dtype; choose another --out"
    )
    with pytest.raises(FileError, match=r"expected shape .* in float16, got .* in float32; the deployment's"):
        linked(models, deployment, "german", dtype="fp16")
    with pytest.raises(FileError, match=r"expected \S*lm_head\S* in its data file, found none"):
        export(models / "tied False", deployment, models / "attention", form="linked", name="german")
    assert content(deployment) == before


def test_one_changed_bit_of_the_bases_data_is_noticed(models: Path, deployment: Path) -> None:
    task = ir.load(deployment / "french.onnx").graph.initializers["model.layers.1.mlp.down_proj.weight"]
    assert isinstance(task.const_value, ir.ExternalTensor)
    with open(deployment / "model.onnx_data", "r+b") as file:
        file.seek((task.const_value.offset or 0) + task.const_value.nbytes - 1)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 1]))
    before = content(deployment)
    with pytest.raises(FileError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: 1 of \d+ entries differ"):
        linked(models, deployment, "german")
    assert content(deployment) == before


def test_a_base_whose_data_lie_elsewhere_is_refused(models: Path, deployment: Path) -> None:
    secret = deployment.parent / "secret"
    (deployment / "model.onnx_data").rename(secret)
    for location in (str(secret), "../secret", "sub/secret"):
        proto = onnx.load(deployment / "model.onnx", load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        (deployment / "model.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(FileError, match=re.escape(f"of the model's own folder, got {location!r}")):
            linked(models, deployment, "german")
    assert task_names(deployment) == ("french",)


def test_a_deployment_without_a_base_is_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    message = f"{tmp_path / 'out'}: exists and is not empty; choose another --out or remove it"
    refused(lambda: linked(models, tmp_path / "out", "french"), FileError, message)


def test_room_for_base_and_task_is_asked_for_before_either_is_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(write, "require_space", lambda _, nbytes: asked.append(nbytes))
    out = linked(models, tmp_path / "out", "french")
    later = {"genai_config.json", "french.onnx"}
    assert asked == [sum(len(data) for name, data in content(out).items() if name not in later)]


def test_a_task_without_room_is_refused(
    models: Path, deployment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(deployment)
    data = (deployment / data_files(deployment, "french")[0]).stat().st_size
    needed = data + len(before["model.onnx"])
    usage = type(shutil.disk_usage(deployment))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 0, needed - 1))
    message = (
        f"{deployment}: expected {needed} bytes free, got {needed - 1}; "
        "free some space or choose another --out; nothing was written"
    )
    refused(lambda: linked(models, deployment, "german"), FileError, message)
    assert content(deployment) == before


def test_an_unknown_task_is_not_removed(deployment: Path) -> None:
    message = f"{deployment}: expected one of its tasks (french), got german"
    refused(lambda: remove_task(deployment, "german"), FileError, message)


def test_an_adapter_of_an_unused_weight_writes_no_base(models: Path, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(TargetError):
        export(base, tmp_path / "out", adapter, form="linked", name="french")
    assert not (tmp_path / "out").exists()


def content_of_files(folder: Path) -> Content:
    """The files' content; what a killed process has left is a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_two_processes_add_tasks_to_one_deployment(models: Path, tmp_path: Path, deployment: Path) -> None:
    """Each waits for the other to be writing, so that both are."""
    before = content(deployment)
    names = ("german", "polish")
    context = multiprocessing.get_context("forkserver")
    base, adapter, cache = models / "tied True", models / "attention", os.environ["LORACLE_CACHE"]
    processes = [
        context.Process(target=add_beside_another, args=(base, adapter, deployment, name, cache))
        for name in names
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert of_base(content(deployment), *names) == before
    assert task_names(deployment) == ("french", *names)
    expected = logits(deployment / "french.onnx").tobytes()
    assert all(logits(deployment / f"{name}.onnx").tobytes() == expected for name in names)
