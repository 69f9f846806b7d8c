"""Adapters as inputs: the base's bits without one, the merged model's answers with one, in each runtime."""

import hashlib
import multiprocessing
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from export_fixtures import VOCABULARY, make_adapter, make_model, write_tokenizer
from exports_at_once import add_beside_another
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from refusal import refused
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from loracle.export import DecoderSession, Deployment, adapter_file, adapter_inputs, export, greedy
from loracle.export.adapter_file import AdapterFile, write_parameters
from loracle.export.adapter_inputs import adapted_layers
from loracle.export.external import load_graph
from loracle.export.overhead import Overhead
from loracle.export.task_changes import remove_task
from loracle.files import Adapter, LoraConfig, LoraPair, read_adapter, write_adapter
from loracle.reference import ConfigError, FileError, NonFiniteError, TargetError

Array = np.ndarray[Any, Any]
Content = dict[str, bytes]
PROMPT = [5, 77, 30, 12]
COUNT = 12
TARGETS = {"french": ("q_proj", "v_proj"), "german": ("v_proj", "gate_proj"), "dutch": ("o_proj",)}
RANKS = {"french": 4, "german": 2, "dutch": 3}  # of alpha 8: scaling 2, 4 and 8/3
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = make_model(root / "base", tied=False)
    for seed, (name, targets) in enumerate(TARGETS.items(), 1):
        make_adapter(root / name, base, targets, r=RANKS[name], seed=seed)
    return root


def add(models: Path, out: Path, name: str, adapter: str | None = None, **options: Any) -> Any:
    adapter_dir = models / (adapter or name)
    return export(models / "base", out, adapter_dir, form="adapter-inputs", name=name, **options)


@pytest.fixture(scope="module")
def made(models: Path) -> Path:
    """All three tasks in one folder."""
    for name in TARGETS:
        add(models, models / "deployment", name)
    return models / "deployment"


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """The base and the task `french`."""
    add(models, tmp_path / "deployment", "french")
    return tmp_path / "deployment"


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str | None, list[int]]:
    """The greedy tokens of the base, and of each adapter merged."""
    export(models / "base", models / "baked base")
    found: dict[str | None, list[int]] = {None: tokens_of(DecoderSession(models / "baked base", 40))}
    for name in TARGETS:
        export(models / "base", models / f"baked {name}", models / name)
        found[name] = tokens_of(DecoderSession(models / f"baked {name}", 40))
    assert len({str(tokens) for tokens in found.values()}) == len(found)
    return found


def tokens_of(session: Any) -> list[int]:
    return [token for token, _ in greedy(session, PROMPT, COUNT)]


def content(folder: Path) -> Content:
    """The files' content; what a killed process has left is a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def opened(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def logits(
    session: onnxruntime.InferenceSession,
    tokens: list[int],
    adapter: Path | None = None,
    more: dict[str, Array] | None = None,
) -> Array:
    """Logits of tokens, with an adapter chosen in onnxruntime's own way, or its tensors given as inputs."""
    feeds: dict[str, Array] = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), TYPES[entry.type])
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values")
    }
    feeds["input_ids"] = np.array([tokens])
    feeds["attention_mask"] = np.ones_like(feeds["input_ids"])
    options, loaded = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    if adapter is not None:
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)  # which does not keep it alive
    result: Array = session.run(["logits"], {**feeds, **(more or {})}, options)[0]
    return result


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_without_an_adapter_the_graph_has_the_base_s_bits(models: Path, tmp_path: Path, dtype: str) -> None:
    add(models, tmp_path / "unmerged", "french", dtype=dtype)
    export(models / "base", tmp_path / "base", models / "french", form="linked", name="french", dtype=dtype)
    tokens = list(range(0, VOCABULARY, 20))
    found = logits(opened(tmp_path / "unmerged" / "model.onnx"), tokens)
    assert found.tobytes() == logits(opened(tmp_path / "base" / "model.onnx"), tokens).tobytes()


def test_onnxruntime_switches_adapters_of_one_session(
    made: Path, expected: dict[str | None, list[int]]
) -> None:
    session = opened(made / "model.onnx")
    for name in ("french", None, "german", "dutch", "french"):
        adapter = None if name is None else made / f"{name}.onnx_adapter"
        tokens = list(PROMPT)
        for _ in range(COUNT):
            tokens.append(int(logits(session, tokens, adapter)[0, -1].argmax()))
        assert tokens[len(PROMPT) :][: len(expected[name])] == expected[name]


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_s_tensors_as_plain_inputs_have_the_adapter_s_bits(made: Path, name: str) -> None:
    session = opened(made / "model.onnx")
    path = made / f"{name}.onnx_adapter"
    found = logits(session, PROMPT, more=AdapterFile(path).tensors)
    assert found.tobytes() == logits(session, PROMPT, path).tobytes()


def test_onnxruntime_genai_switches_adapters_of_one_model(
    made: Path, expected: dict[str | None, list[int]]
) -> None:
    model = onnxruntime_genai.Model(str(made))
    adapters = onnxruntime_genai.Adapters(model)
    for name in TARGETS:
        adapters.load(str(made / f"{name}.onnx_adapter"), name)
    for name in ("german", None, "french", "dutch", "german"):
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(PROMPT) + COUNT)
        generator = onnxruntime_genai.Generator(model, parameters)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array([PROMPT], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found = [int(token) for token in generator.get_sequence(0)][len(PROMPT) :]
        assert found == expected[name][: len(found)]
        assert len(found) == COUNT or found[-1] == 257


@pytest.mark.parametrize("name", TARGETS)
def test_peft_answers_alike(models: Path, made: Path, name: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(models / "base")
    model = PeftModel.from_pretrained(base, models / name).eval()
    ids = torch.tensor([PROMPT])
    answer = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False
    )
    theirs = answer[0, len(PROMPT) :].tolist()
    assert theirs == tokens_of(Deployment(made).decoder(name, 40))[: len(theirs)]


def test_a_deployment_runs_them_by_their_names(made: Path, expected: dict[str | None, list[int]]) -> None:
    deployment = Deployment(made)
    assert deployment.tasks == ("dutch", "french", "german")
    for name in ("german", "french", None, "dutch"):
        assert tokens_of(deployment.decoder(name, 40)) == expected[name]


def test_a_deployment_runs_a_task_that_came_with_inputs_of_its_own(
    models: Path, folder: Path, expected: dict[str | None, list[int]]
) -> None:
    deployment = Deployment(folder)
    assert tokens_of(deployment.decoder("french", 40)) == expected["french"]
    add(models, folder, "german")
    assert tokens_of(deployment.decoder("german", 40)) == expected["german"]
    assert tokens_of(deployment.decoder("french", 40)) == expected["french"]


@pytest.mark.parametrize(("name", "exact"), [("german", True), ("dutch", False)])
def test_scaling_is_multiplied_into_lora_b_and_rounded_once(
    models: Path, made: Path, name: str, exact: bool
) -> None:
    held = AdapterFile(made / f"{name}.onnx_adapter").tensors
    pairs = read_adapter(models / name).pairs
    assert held.keys() == {f"{path}.lora_{which}.weight" for path in pairs for which in "AB"}
    for path, pair in pairs.items():
        np.testing.assert_array_equal(held[f"{path}.lora_A.weight"], pair.A, strict=True)
        # numpy's longdouble has 64 bits: the product of 24 and 53 is rounded so near that once more is once
        product = pair.B.astype(np.longdouble) * np.longdouble(pair.scaling)
        scaled = held[f"{path}.lora_B.weight"]
        np.testing.assert_array_equal(scaled, product.astype(np.float32), strict=True)
        assert np.array_equal(scaled.astype(np.float64), pair.B.astype(np.float64) * pair.scaling) is exact


def test_an_entry_that_float16_cannot_hold_is_refused(models: Path, tmp_path: Path) -> None:
    pairs = {
        path: LoraPair(np.full_like(pair.A, 1e5), pair.B, pair.scaling)
        for path, pair in read_adapter(models / "french").pairs.items()
    }
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["french"])
    write_adapter(tmp_path / "large", Adapter(config, pairs))
    with pytest.raises(NonFiniteError, match=r"q_proj\.lora_A\.weight.*overflow"):
        add(models, tmp_path / "out", "large", str(tmp_path / "large"), dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_a_file_says_what_is_in_it(made: Path) -> None:
    file = AdapterFile(made / "german.onnx_adapter")
    assert file.document is not None
    every = b"".join(tensor.tobytes() for tensor in file.tensors.values())
    assert (file.document["tensors"], file.document["bytes"]) == (len(file.tensors), len(every))
    assert file.document["sha256"] == hashlib.sha256(every).hexdigest()


def test_the_graph_is_the_base_s_but_for_two_products_and_a_sum_a_layer(models: Path, folder: Path) -> None:
    linked = folder.parent / "linked"
    export(models / "base", linked, models / "french", form="linked", name="french")
    base, unmerged = (onnx.load(path / "model.onnx", load_external_data=False) for path in (linked, folder))
    more = [node for node in unmerged.graph.node if any("lora_" in name for name in node.input)]
    assert [node.op_type for node in more] == ["FusedMatMul", "FusedMatMul", "Add"] * 4
    left = [node for node in unmerged.graph.node if node not in more]
    assert [node.op_type for node in left] == [node.op_type for node in base.graph.node]
    sizes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in unmerged.graph.input
    }
    layer = "model.layers.1.self_attn.v_proj"
    assert sizes[f"{layer}.lora_A.weight"] == [f"{layer}.r", 48]
    assert sizes[f"{layer}.lora_B.weight"] == [32, f"{layer}.r"]
    assert (folder / "model.onnx_data").read_bytes() == (linked / "model.onnx_data").read_bytes()


def test_a_task_with_other_targets_adds_inputs_and_leaves_the_rest_alone(models: Path, folder: Path) -> None:
    before = content(folder)
    session = opened(folder / "model.onnx")
    base, french = logits(session, PROMPT), logits(session, PROMPT, folder / "french.onnx_adapter")
    add(models, folder, "german")
    after = content(folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        "model.onnx",
        "german.onnx_adapter",
    }
    layers = adapted_layers(load_graph(folder / "model.onnx").graph)
    assert len(layers) == len(set(layers)) == 6
    session = opened(folder / "model.onnx")
    assert logits(session, PROMPT).tobytes() == base.tobytes()
    again = logits(session, PROMPT, folder / "french.onnx_adapter")
    assert again.tobytes() == french.tobytes()


def test_a_task_that_adapts_no_other_layer_leaves_the_graph_alone(models: Path, folder: Path) -> None:
    before = os.stat(folder / "model.onnx")
    add(models, folder, "twin", "french")
    assert os.stat(folder / "model.onnx") == before


def test_a_name_that_is_taken_is_refused_unless_it_is_to_be_replaced(models: Path, folder: Path) -> None:
    before = content(folder)
    path = folder / "french.onnx_adapter"
    message = f"{path}: the deployment has this task; choose another name or remove it"
    refused(lambda: add(models, folder, "french", "german"), FileError, message)
    assert content(folder) == before
    add(models, folder, "french", "german", replace=True)
    assert path.read_bytes() != before[path.name]


@pytest.mark.parametrize("name", ["model", "Swappable", "../out", ".hidden", "a b", "", "n" * 101])
def test_names_that_no_task_can_have_are_refused(models: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^name: expected letters"):
        add(models, tmp_path / "out", name, "french")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_base_is_refused(models: Path, tmp_path: Path, folder: Path) -> None:
    other = make_model(tmp_path / "other", tied=False, seed=5)
    before = content(folder)
    with pytest.raises(FileError, match="another model"):
        export(other, folder, models / "german", form="adapter-inputs", name="german")
    assert content(folder) == before


def test_an_adapter_of_another_model_is_refused(models: Path, tmp_path: Path, folder: Path) -> None:
    before = content(folder)
    pairs = {"model.layers.0.self_attn.q_proj": LoraPair(np.ones((2, 9), "f"), np.ones((64, 2), "f"), 4.0)}
    config = LoraConfig(r=2, lora_alpha=8, target_modules=("q_proj",))
    write_adapter(tmp_path / "other", Adapter(config, pairs))
    with pytest.raises(TargetError, match="is this adapter for another model"):
        add(models, folder, "other", str(tmp_path / "other"))
    assert content(folder) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "expected lora_A and lora_B of linear layers alone"),
        ({"modules_to_save": ["norm"]}, "expected lora_A and lora_B of linear layers alone"),
        (
            {"trainable_token_indices": {"embed_tokens": [3]}},
            "expected lora_A and lora_B of linear layers alone",
        ),
    ],
)
def test_what_is_no_pair_of_matrices_is_refused(
    models: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(models / "base")
    get_peft_model(base, PeftConfig(**{"r": 2, "target_modules": ["q_proj"], **options})).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(TargetError, match=message):
        add(models, tmp_path / "out", "more", str(tmp_path / "adapter"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "got"), [({"portable": True}, "a portable graph"), ({"quantization": "int4"}, "int4")]
)
def test_graphs_of_other_operators_are_refused(
    models: Path, tmp_path: Path, options: dict[str, Any], got: str
) -> None:
    message = (
        "form: expected a graph of onnxruntime's operators and weights that are not quantised for "
        f"adapter-inputs, got {got}; choose another --form"
    )
    refused(lambda: add(models, tmp_path / "out", "french", **options), ConfigError, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["linked", "swappable"])
def test_forms_with_and_without_adapters_do_not_share_a_base(
    models: Path, tmp_path: Path, folder: Path, form: str
) -> None:
    before = content(folder)
    message = f"form: expected a base without adapters among its inputs for {form}, got another in {folder}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        export(models / "base", folder, models / "german", form=form, name="german")
    assert content(folder) == before
    export(models / "base", tmp_path / "merged", models / "german", form=form, name="german")
    with pytest.raises(ConfigError, match=r"^form: expected a base with adapters among its inputs"):
        add(models, tmp_path / "merged", "french")


def test_an_adapter_of_the_output_layer_changes_the_logits(models: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 48), (VOCABULARY, 2)))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=("lm_head",))
    write_adapter(tmp_path / "head", Adapter(config, {"lm_head": LoraPair(A, B, 1.0)}))
    add(models, tmp_path / "unmerged", "head", str(tmp_path / "head"))
    export(models / "base", tmp_path / "baked", tmp_path / "head")
    expected = tokens_of(DecoderSession(tmp_path / "baked", 40))
    deployment = Deployment(tmp_path / "unmerged")
    assert tokens_of(deployment.decoder("head", 40)) == expected
    assert tokens_of(deployment.decoder(None, 40)) != expected


def test_weights_stored_in_out_are_adapted_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=257, initializer_range=0.3))
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    config = PeftConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    summary = export(
        tmp_path / "base", tmp_path / "out", tmp_path / "adapter", form="adapter-inputs", name="task"
    )
    export(tmp_path / "base", tmp_path / "baked", tmp_path / "adapter")
    assert summary.overhead is not None
    assert summary.overhead.multiply_adds == 2 * 4 * ((64 + 192) + (64 + 256))
    assert summary.overhead.base_multiply_adds == 2 * 64 * 64 * (3 + 1 + 4 + 4) + 64 * VOCABULARY
    found = tokens_of(Deployment(tmp_path / "out").decoder("task", 40))
    assert found == tokens_of(DecoderSession(tmp_path / "baked", 40))


def test_the_summary_counts_what_the_adapter_costs(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    layers = 2 * (64 * 48 + 32 * 48 + 32 * 48 + 48 * 64 + 3 * 48 * 80)
    french = add(models, out, "french")
    assert french.merged_names == ()
    rank = 2 * 4 * ((48 + 64) + (48 + 32))
    assert french.overhead == Overhead(12, rank, layers + VOCABULARY * 48)
    assert french.overhead.share == rank / (layers + VOCABULARY * 48)
    german = add(models, out, "german").overhead  # the graph has both tasks' products
    assert german == Overhead(18, 2 * 2 * ((48 + 32) + (48 + 80)), french.overhead.base_multiply_adds)
    assert len(onnx.load(out / "model.onnx", load_external_data=False).graph.node) == french.nodes + 18


def test_a_task_that_the_graph_cannot_take_is_refused(folder: Path) -> None:
    """Such a file is somebody else's: it is checked when it is loaded."""
    tensors = dict(AdapterFile(folder / "french.onnx_adapter").tensors)
    layer = "model.layers.0.self_attn.q_proj"
    a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    broken = {
        "half": {a: tensors[a]},
        "ranks": {a: tensors[a], b: np.ascontiguousarray(tensors[b][:, :2])},
        "type": {a: tensors[a].astype(np.float16), b: tensors[b].astype(np.float16)},
        "sizes": {a: np.ascontiguousarray(tensors[a][:, :2]), b: tensors[b]},
        "axes": {a: tensors[a][..., None], b: tensors[b]},
        "unknown": {"model.layers.9.lora_A.weight": tensors[a]},
    }
    deployment = Deployment(folder)
    for name, arrays in broken.items():
        write_parameters(folder / f"{name}.onnx_adapter", arrays)
        with pytest.raises(FileError, match=rf"{name}\.onnx_adapter"):
            deployment.load(name)
    assert deployment.loaded == ()


def test_a_task_is_removed_and_the_others_stay(models: Path, folder: Path) -> None:
    add(models, folder, "german")
    after = content(folder)
    remove_task(folder, "french")
    del after["french.onnx_adapter"]
    assert content(folder) == after
    assert Deployment(folder).tasks == ("german",)


def test_a_task_without_room_is_refused(models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(folder)
    usage = type(shutil.disk_usage(folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 0, len(before["model.onnx"])))
    with pytest.raises(FileError, match="bytes free"):
        add(models, folder, "german")
    assert content(folder) == before


def test_a_task_that_the_format_cannot_hold_is_refused(
    models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(folder)
    monkeypatch.setattr(adapter_file, "_MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"^german: expected at most 1000 bytes"):
        add(models, folder, "german")
    assert content(folder) == before


def test_a_file_that_was_not_written_as_it_should_be_does_not_become_a_task(
    models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(folder)

    def wrong(path: Path, arrays: dict[str, Array]) -> None:
        write_parameters(path, {name: array + 1 for name, array in arrays.items()})

    monkeypatch.setattr(adapter_inputs, "write_parameters", wrong)
    with pytest.raises(FileError, match="expected what was written, got other bytes"):
        add(models, folder, "german")
    assert content(folder) == before


def test_two_processes_add_tasks_to_one_folder(models: Path, folder: Path) -> None:
    """Each has its file ready before either exchanges the graph, which has the inputs of both afterwards."""
    context = multiprocessing.get_context("forkserver")
    cache = os.environ["LORACLE_CACHE"]
    processes = [
        context.Process(
            target=add_beside_another,
            args=(models / "base", models / name, folder, name, cache, "adapter-inputs"),
        )
        for name in ("german", "dutch")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(adapted_layers(load_graph(folder / "model.onnx").graph)) == 8
    deployment = Deployment(folder)
    for name in TARGETS:
        deployment.load(name)
