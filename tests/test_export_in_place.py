"""A deployment on the checkpoint's own files: the baked form's bits, nothing copied, nothing changed."""

from __future__ import annotations

import json
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
import torch
from deployments import content
from export_fixtures import VOCABULARY, make_adapter, make_model
from refusal import refused
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.export import Deployment, export, open_session, verify
from loracle.export.deployed_tasks import manifest
from loracle.export.external import load_graph
from loracle.export.task_changes import add_task, remove_task
from loracle.files import Checkpoint
from loracle.reference import ConfigError, FileError, LoracleError, TargetError

Array = np.ndarray[Any, Any]
FORMS = ("linked", "swappable")
SHARD = "model.safetensors"
MB = 10**6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for tied in (True, False):
        make_model(root / f"tied {tied}", tied=tied)
    make_adapter(root / "attention", root / "tied True")
    make_adapter(root / "mlp", root / "tied True", ("gate_proj",), r=2, seed=2)
    return root


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Path:
    """A checkpoint of this test's own, with one shard."""
    return shutil.copytree(models / "tied True", tmp_path / "model")


def in_place(model: Path, adapter: Path, name: str, form: str = "linked", **options: Any) -> Any:
    return export(model, model, adapter, form=form, name=name, in_place=True, **options)


def logits(graph: Path, task: Path | None = None) -> bytes:
    """Of a few tokens, in onnxruntime alone; with the tensors of a task's file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feeds: dict[str, Array] = {} if task is None else load_file(task)
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values"):
            feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), types[entry.type])
    feeds["input_ids"] = np.arange(0, VOCABULARY, 20)[None]
    feeds["attention_mask"] = np.ones_like(feeds["input_ids"])
    result: Array = session.run(["logits"], feeds)[0]
    return result.tobytes()


def task_logits(folder: Path, name: str, form: str) -> bytes:
    if form == "linked":
        return logits(folder / f"{name}.onnx")
    return logits(folder / "swappable.onnx", folder / f"{name}.task.safetensors")


def places(graph: Path) -> dict[str, str]:
    """Initializers to the files that hold them."""
    values = ir.load(graph).graph.initializers
    tensors = {name: value.const_value for name, value in values.items()}
    return {
        name: str(tensor.location)
        for name, tensor in tensors.items()
        if isinstance(tensor, ir.ExternalTensor)
    }


def data_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.onnx_data"))


def change_dtypes(model: Path, dtype: torch.dtype, only: str = "") -> None:
    """Save tensors whose names hold `only` in another dtype."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / SHARD)
    save_file(
        {name: tensor.to(dtype) if only in name else tensor for name, tensor in tensors.items()},
        model / SHARD,
        {"format": "pt"},
    )


def split(model: Path) -> list[str]:
    """Save the checkpoint again in several shards."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / SHARD).unlink()
    loaded.save_pretrained(model, max_shard_size="60KB")
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    assert len(shards) >= 2
    return shards


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_task_on_the_shards_gives_the_bits_of_the_baked_form(
    models: Path, tmp_path: Path, form: str, tied: bool
) -> None:
    model = shutil.copytree(models / f"tied {tied}", tmp_path / "model")
    in_place(model, models / "attention", "french", form)
    in_place(model, models / "mlp", "german", form)
    for name, adapter in (("french", "attention"), ("german", "mlp")):
        export(models / f"tied {tied}", tmp_path / name, models / adapter)
        assert task_logits(model, name, form) == logits(tmp_path / name / "model.onnx")
    export(models / f"tied {tied}", tmp_path / "base")
    assert logits(model / "model.onnx") == logits(tmp_path / "base" / "model.onnx")


def test_every_weight_lies_in_the_shard_and_nothing_there_is_changed(models: Path, model: Path) -> None:
    before = content(model)
    summary = in_place(model, models / "attention", "french")
    after = content(model)
    new = after.keys() - before.keys()
    assert {name: after[name] for name in before} == before
    own, base = data_files(model)
    assert new == {"model.onnx", "french.onnx", "genai_config.json", own, base}
    assert (own.partition(".")[0], base.partition(".")[0]) == ("french", "model")
    with Checkpoint(model) as checkpoint:
        held, task = places(model / "model.onnx"), places(model / "french.onnx")
        assert {name for name, file in held.items() if file == SHARD} == set(checkpoint.names)
        merged = {name for name in held if "q_proj" in name or "v_proj" in name}
        assert {name for name, file in task.items() if file == own} == merged
        assert {name: task[name] for name in held.keys() - merged} == {
            name: held[name] for name in held.keys() - merged
        }
        nbytes = sum(checkpoint.tensor(name).nbytes for name in merged)
    assert nbytes <= len(after[own]) < nbytes + 4 * 4096
    # The tables of cosines and sines are in no checkpoint.
    assert {name.rpartition(".")[2] for name, file in held.items() if file == base} == {"cos_0", "sin_0"}
    assert summary.bytes == sum(len(after[name]) for name in new - {"genai_config.json"})
    onnx.load(model / "french.onnx")


def test_other_programs_read_the_folder_as_before(models: Path, model: Path) -> None:
    tokens = torch.arange(0, VOCABULARY, 20)[None]
    expected = AutoModelForCausalLM.from_pretrained(model)(tokens).logits
    for form, name in zip(FORMS, ("french", "german"), strict=True):
        in_place(model, models / "attention", name, form)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(model)(tokens).logits, expected)
    with Checkpoint(model) as checkpoint, Checkpoint(models / "tied True") as before:
        assert checkpoint.names == before.names


def test_shards_are_referred_to_each_by_its_name(models: Path, model: Path, tmp_path: Path) -> None:
    shards = split(model)
    in_place(model, models / "attention", "french", "swappable")
    assert set(places(model / "model.onnx").values()) - set(data_files(model)) == set(shards)
    export(models / "tied True", tmp_path / "baked", models / "attention")
    assert task_logits(model, "french", "swappable") == logits(tmp_path / "baked" / "model.onnx")


@pytest.mark.parametrize("form", FORMS)
def test_what_has_another_dtype_is_copied(models: Path, model: Path, tmp_path: Path, form: str) -> None:
    change_dtypes(model, torch.bfloat16, only="norm")
    export(model, tmp_path / "baked", models / "attention")
    in_place(model, models / "attention", "french", form)
    held = places(model / "model.onnx")
    copied = {name for name, file in held.items() if file != SHARD}
    assert copied == {name for name in held if "norm" in name or "rotary" in name}
    (data,) = {held[name] for name in copied}
    assert task_logits(model, "french", form) == logits(tmp_path / "baked" / "model.onnx")
    # A linked task refers to the copy of the base's, which is no file of its own.
    assert {file["name"] for file in manifest(model)["base"]["files"]} == {"model.onnx", SHARD, data}
    assert data not in {file["name"] for file in manifest(model)["tasks"][0]["files"]}
    remove_task(model, "french")
    assert data_files(model) == [data]


def test_a_dtype_of_the_checkpoints_own_is_referred_to(models: Path, model: Path, tmp_path: Path) -> None:
    change_dtypes(model, torch.float16)
    export(model, tmp_path / "baked", models / "attention", dtype="fp16")
    in_place(model, models / "attention", "french", dtype="fp16")
    with Checkpoint(model) as checkpoint:
        held = places(model / "model.onnx")
        assert {name for name, file in held.items() if file == SHARD} == set(checkpoint.names)
    assert task_logits(model, "french", "linked") == logits(tmp_path / "baked" / "model.onnx")


def test_weights_that_lie_between_two_entries_are_not_referred_to(models: Path, model: Path) -> None:
    """The format lets the tensors' bytes begin anywhere."""
    raw = (model / SHARD).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    header += b" " * (-len(header) % 4 + 2)
    (model / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    with Checkpoint(model) as checkpoint:
        assert checkpoint.place("model.norm.weight")[1] % 4 == 2
    before = content(model)
    with pytest.raises(ConfigError, match=r"in_place: expected float32 tensors .* got another place"):
        in_place(model, models / "attention", "french")
    assert content(model) == before


def test_a_checkpoint_of_another_dtype_is_refused(models: Path, model: Path) -> None:
    change_dtypes(model, torch.bfloat16)
    before = content(model)
    with pytest.raises(ConfigError) as error:
        in_place(model, models / "attention", "french")
    assert str(error.value) == (
        f"in_place: expected float32 tensors in {model} that the graph can refer to, got bfloat16 in "
        "model.embed_tokens.weight; leave --in-place out or convert the checkpoint"
    )
    assert content(model) == before


def test_a_deployment_on_shards_takes_tasks_as_any_other(models: Path, model: Path) -> None:
    in_place(model, models / "attention", "french", "swappable")
    before = content(model)
    add_task(model, "german", model, models / "mlp", form="linked")
    add_task(model, "spanish", models / "tied True", models / "mlp", form="swappable")
    after = content(model)
    assert {name for name in before if after[name] != before[name]} == {"swappable.onnx"}
    deployment = Deployment(model, adapters={"merged": models / "mlp"})
    texts = {
        name: deployment.generate(name, ["abc"], max_new_tokens=8, raw=True)[0].text
        for name in (None, "french", "spanish", "merged")
    }
    assert texts["merged"] == texts["spanish"]
    assert len(set(texts.values())) == 3
    for name, adapter in (("french", "attention"), ("german", "mlp"), ("spanish", "mlp")):
        assert verify(model, model, models / adapter, name=name).passed
    assert verify(model, model).passed
    for name in ("french", "german", "spanish"):
        remove_task(model, name)
    kept = content(model)
    (data,) = data_files(model)
    assert kept.keys() == content(models / "tied True").keys() | {"model.onnx", data, "genai_config.json"}


def test_a_description_that_is_there_stays(models: Path, model: Path) -> None:
    (model / "genai_config.json").write_text('{"model": {"context_length": 17}}')
    before = content(model)
    in_place(model, models / "attention", "french")
    assert content(model)["genai_config.json"] == before["genai_config.json"]


@pytest.mark.parametrize("file", ["model.onnx", "swappable.onnx"])
@pytest.mark.parametrize("kind", ["export", "rubbish", "link"])
def test_a_graph_of_another_maker_is_refused(
    models: Path, model: Path, tmp_path: Path, file: str, kind: str
) -> None:
    if kind == "export":
        export(models / "tied True", tmp_path / "other")
        shutil.copy(tmp_path / "other" / "model.onnx", model / file)
        shutil.copy(tmp_path / "other" / "model.onnx_data", model)
    elif kind == "rubbish":
        (model / file).write_bytes(b"\xff\xfe rubbish")
    else:
        (model / file).symlink_to(tmp_path / "nowhere")
    before = sorted(model.iterdir())
    said = "an ONNX model" if kind == "rubbish" else "none, or one that|an exported model, found none"
    with pytest.raises(FileError, match=rf"{re.escape(file)}: expected ({said})"):
        in_place(model, models / "attention", "french")
    assert sorted(model.iterdir()) == before


def test_what_cannot_be_in_place_is_refused(models: Path, model: Path, tmp_path: Path) -> None:
    adapter = models / "attention"
    before = content(model)
    for options, message in (
        (
            {"form": "baked"},
            "in_place: expected the form linked or swappable, got baked; leave --in-place out",
        ),
        (
            {"form": "adapter-inputs", "name": "french"},
            "in_place: expected the form linked or swappable, got adapter-inputs; leave --in-place out",
        ),
        (
            {"form": "linked", "name": "french", "out_dir": tmp_path / "out"},
            f"in_place: expected --out {model}, the model's own folder, got {tmp_path / 'out'}: runtimes "
            "open data in a graph's own folder or below alone; choose this --out or leave --in-place out",
        ),
    ):
        values = {"out_dir": model, "adapter_dir": adapter, "in_place": True, **options}
        refused(partial(export, model, **values), ConfigError, message)
    (tmp_path / "elsewhere").mkdir()
    os.rename(model / SHARD, tmp_path / "elsewhere" / SHARD)
    (model / SHARD).symlink_to(tmp_path / "elsewhere" / SHARD)
    with pytest.raises(FileError, match="expected a file, got a link"):
        in_place(model, adapter, "french")
    (model / SHARD).unlink()
    os.rename(tmp_path / "elsewhere" / SHARD, model / SHARD)
    assert content(model) == before
    (tmp_path / "link").symlink_to(model)
    export(tmp_path / "link", model, adapter, form="linked", name="french", in_place=True)


def test_a_task_that_cannot_be_added_leaves_no_base(models: Path, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 96}))
    other = make_adapter(tmp_path / "other", tmp_path)
    (model / "french.onnx").write_bytes(b"somebody's")
    before = content(model)
    with pytest.raises(TargetError):
        in_place(model, other, "german")
    with pytest.raises(FileError, match="the deployment has this task"):
        in_place(model, models / "attention", "french")
    assert content(model) == before


def exchange(model: Path, how: str) -> None:
    """Put another shard in the place of the checkpoint's."""
    tensors = {name: array.copy() for name, array in load_file(model / SHARD).items()}
    if how == "values":
        for array in tensors.values():
            array *= 1.0001
    elif how == "one tensor":
        tensors["model.layers.1.mlp.up_proj.weight"][:] *= 1.0001
    elif how == "longer":
        tensors["more"] = np.zeros(3, np.float32)
    save_file(tensors, model / SHARD, {"format": "pt", **({"a": "b"} if how == "header" else {})})


@pytest.mark.parametrize("how", ["values", "one tensor", "longer", "header"])
def test_an_exchanged_shard_is_noticed(models: Path, model: Path, how: str) -> None:
    for form, name in zip(FORMS, ("french", "german"), strict=True):
        in_place(model, models / "attention", name, form)
    exchange(model, how)
    graphs = [model / name for name in ("model.onnx", "french.onnx", "swappable.onnx")]
    ways = [
        *(partial(open_session, graph) for graph in graphs),
        *(partial(load_graph, graph) for graph in graphs),
        lambda: Deployment(model),
        lambda: Deployment(model, adapters={"new": models / "mlp"}),
        lambda: verify(model, model, models / "attention", name="french"),
        lambda: verify(model, model, models / "attention", name="german"),
        lambda: add_task(model, "new", model, models / "mlp"),
        lambda: in_place(model, models / "mlp", "new"),
    ]
    for way in ways:
        with pytest.raises(FileError, match=r"model\.safetensors: expected the shard that .* was made of"):
            way()
    remove_task(model, "french")
    remove_task(model, "german")


def test_a_missing_shard_is_noticed(models: Path, model: Path) -> None:
    in_place(model, models / "attention", "french")
    (model / SHARD).rename(model / "elsewhere")
    with pytest.raises(FileError):
        open_session(model)
    with pytest.raises(FileError, match=SHARD):
        load_graph(model / "model.onnx")


@pytest.mark.parametrize(
    ("noted", "said"),
    [
        ("[]", "expected"),
        ('{"../model/model.safetensors": {"bytes": 1, "sha256": ""}}', "expected plain names of shards"),
        ('{"": {"bytes": 1, "sha256": ""}}', "expected plain names of shards"),
        ('{"model.safetensors": 3}', "expected plain names of shards"),
        ('{"model.safetensors": {"bytes": 1}}', "sha256: expected 64 digits of a SHA-256, found none"),
        ('{"model.safetensors": {"bytes": -1, "sha256": ""}}', "bytes: expected an integer of at least 0"),
        ('{"model.safetensors": {"bytes": 1, "sha256": "%s"}}' % ("0" * 64), "expected the shard"),
    ],
)
def test_a_graph_that_notes_nonsense_is_refused(models: Path, model: Path, noted: str, said: str) -> None:
    in_place(model, models / "attention", "french")
    graph = onnx.load(model / "model.onnx", load_external_data=False)
    for entry in graph.metadata_props:
        if entry.key == "loracle.shards":
            entry.value = noted
    (model / "model.onnx").write_bytes(graph.SerializeToString())
    for way in (open_session, lambda folder: load_graph(folder / "model.onnx")):
        with pytest.raises(LoracleError) as error:
            way(model)
        assert said in str(error.value)


def test_a_shard_that_has_become_a_link_is_refused(models: Path, model: Path, tmp_path: Path) -> None:
    in_place(model, models / "attention", "french")
    os.rename(model / SHARD, tmp_path / SHARD)
    (model / SHARD).symlink_to(tmp_path / SHARD)
    with pytest.raises(FileError, match="expected a file, got a link"):
        load_graph(model / "model.onnx")


def test_the_command_makes_the_models_folder_a_deployment(models: Path, model: Path) -> None:
    def call(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    before = content(model)
    export_it = ("export", "--model", model, "--out", model, "--in-place", "--adapter", models / "attention")
    call(*export_it, "--form", "linked", "--name", "french")
    call("tasks", "add", model, "german", "--model", model, "--adapter", models / "mlp")
    call("verify", model, "--name", "german", "--model", model, "--adapter", models / "mlp", "--record")
    assert "model.safetensors" in call("tasks", model, "--json")
    call("run", model, "--name", "french", "--prompt", "hello", "--max-new-tokens", 3)
    after = content(model)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("form", FORMS)
def test_what_a_killed_export_left_of_other_options_goes(models: Path, model: Path, form: str) -> None:
    (model / "model.0123456789abcdef.onnx_data").write_bytes(b"left over")
    (model / ".task.0123456789abcdef.partial").mkdir()
    in_place(model, models / "attention", "french", form, portable=True)
    assert not list(model.glob(".*.partial"))
    assert "model.0123456789abcdef.onnx_data" not in data_files(model)
    described = json.loads((model / "genai_config.json").read_text())
    assert described["search"]["past_present_share_buffer"] is False
    for path in (*model.glob("*.onnx*"), *model.glob("*.task.safetensors")):
        path.unlink()
    in_place(model, models / "attention", "french", form)
    described = json.loads((model / "genai_config.json").read_text())
    assert described["search"]["past_present_share_buffer"] is True


def test_a_base_that_another_process_has_made_meanwhile_is_taken(
    models: Path, model: Path, tmp_path: Path
) -> None:
    made: list[bytes] = []

    def progress(*_: int) -> None:
        if not made:
            made.append(b"")
            in_place(model, models / "mlp", "german")
            made[0] = (model / "model.onnx").read_bytes()
            os.utime(model / "model.onnx", (1, 1))

    in_place(model, models / "attention", "french", progress=progress)
    assert (model / "model.onnx").read_bytes() == made[0]
    assert os.stat(model / "model.onnx").st_mtime == 1
    export(models / "tied True", tmp_path / "baked", models / "attention")
    assert logits(model / "french.onnx") == logits(tmp_path / "baked" / "model.onnx")
    assert (model / "german.onnx").is_file()


def test_a_full_disk_leaves_the_checkpoint(
    models: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(model)
    (model / ".task.0123456789abcdef.partial").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(MB, MB, 10))
    with pytest.raises(FileError, match=r"expected \d+ bytes free, got 10"):
        in_place(model, models / "attention", "french")
    assert content(model) == before
    # What another export has left is gone: it may be what fills the disk.
    assert not list(model.glob(".*.partial"))
