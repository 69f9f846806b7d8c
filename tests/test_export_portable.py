"""Portable graphs: operators of the ONNX standard alone and a cache that grows; the models that need them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import transformers as hf
from architecture_runs import FLOAT32, TASK, compare, make_adapter, without_optimisations
from architectures import CASES, FIRST_TOKEN, SIZES, VOCABULARY, make
from export_fixtures import make_adapter as make_llama_adapter
from export_fixtures import make_model
from refusal import refused
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.export import DecoderSession, export, generate, open_decoder, open_session, verify
from loracle.export.external import load_graph
from loracle.export.growing_session import GrowingSession
from loracle.export.lowering import lower
from loracle.export.options import GraphOptions, noted_options
from loracle.export.replicate import trace_replicated
from loracle.export.trace import trace
from loracle.export.verification.graph_diff import first_difference
from loracle.export.verification.truth import Float64Model
from loracle.files import read_adapter
from loracle.reference import ConfigError, FileError, LoracleError, ShapeError

PROMPTS = ([5, 77, 30, 12, 90, 41, 3], [8], [200, 100, 50, 20])
FOLLOWING = np.array([[9, 30, 77], [1, 2, 3], [250, 249, 248]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("portable") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_llama_adapter(base.parent / "adapter", base, ("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def folder(base: Path, adapter: Path) -> Path:
    export(base, base.parent / "onnx", adapter, portable=True)
    return base.parent / "onnx"


@pytest.fixture(scope="module")
def opened(folder: Path) -> onnxruntime.InferenceSession:
    return open_session(folder, threads=1)


@pytest.fixture(scope="module")
def truth(base: Path, adapter: Path) -> Float64Model:
    return Float64Model(base, read_adapter(adapter))


def check_row(logits: list[np.ndarray], tokens: list[int], truth: Float64Model) -> None:
    """Logits of the last positions of a text lie inside the derived bound of the float64 model."""
    (right,) = truth.evaluate([tokens], FLOAT32)
    assert np.abs(np.stack(logits) - right.logits[-len(logits) :]).max() <= right.tolerance


@pytest.mark.parametrize(
    "name",
    ["mistral", "gemma2", "gpt2", pytest.param("gpt_neox", marks=pytest.mark.slow), "bert", "distilbert"],
)
def test_standard_operators_answer_within_the_bound_of_the_unmerged(name: str, tmp_path: Path) -> None:
    """Prefill with padding on either side, then cached steps. Catches an operator that is not the standard's,
    a wrong mask, window, cap, position or grouping of heads, and a weight stored in the wrong order."""
    base = make(tmp_path / "base", name)
    adapter = make_adapter(base, name, tmp_path / "adapter")
    export(base, tmp_path / "onnx", adapter, portable=True)
    path = str(tmp_path / "onnx/model.onnx")
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""}
    assert all(onnx.defs.has(node.op_type, 20, "") for node in model.graph.node)
    session = onnxruntime.InferenceSession(path, without_optimisations())
    task = TASK[CASES[name].task]
    tuned, untuned = Float64Model(base, read_adapter(adapter), task), Float64Model(base, None, task)
    for error, tolerance, effect in compare(name, [session], tuned, untuned):
        assert error <= tolerance
        assert effect > 10 * tolerance


def test_inputs_and_outputs_are_the_fused_graphs(tmp_path: Path, base: Path, folder: Path) -> None:
    """But for the one that chooses positions, which has a default value that not every runtime reads."""
    export(base, tmp_path / "fused")

    def interface(path: Path) -> list[tuple[str, list[object]]]:
        session = open_session(path)
        entries = [*session.get_inputs(), *session.get_outputs()]
        return [(entry.name, entry.shape) for entry in entries if entry.name != "num_logits_to_keep"]

    assert interface(folder) == interface(tmp_path / "fused")


def test_several_tokens_may_follow_a_cache_in_a_padded_batch(
    opened: onnxruntime.InferenceSession, truth: Float64Model
) -> None:
    """Rows padded on different sides, and padding among the later tokens too. Catches places that are counted
    in the cache instead of in the text."""
    rng = np.random.default_rng(2)
    texts = rng.integers(FIRST_TOKEN, VOCABULARY, (3, 9))
    mask = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0, 0, 1]])
    cache = {
        entry.name: np.zeros((3, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in opened.get_inputs()
        if entry.name.startswith("past")
    }
    names = [entry.name for entry in opened.get_outputs()]
    logits = []
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        feeds = {"input_ids": texts[:, start:stop], "attention_mask": mask[:, :stop], **cache}
        answers = opened.run(None, feeds)
        logits.append(answers[0])
        cache = {
            name.replace("present", "past_key_values"): array
            for name, array in zip(names[1:], answers[1:], strict=True)
        }
    assert cache["past_key_values.0.key"].shape[2] == 9
    whole = np.concatenate(logits, 1)
    for row in range(3):
        there = mask[row] == 1
        check_row(list(whole[row, there]), texts[row, there].tolist(), truth)


def test_a_batch_in_step_answers_as_the_truth_does(
    opened: onnxruntime.InferenceSession, truth: Float64Model
) -> None:
    session = open_decoder(opened, 12, batch=3)
    assert type(session) is GrowingSession
    rows = [[logits] for logits in session.prefill(PROMPTS)]
    for tokens in FOLLOWING.T:
        for row, logits in zip(rows, session.decode(tokens), strict=True):
            row.append(logits)
    assert session.length == 10
    for prompt, following, row in zip(PROMPTS, FOLLOWING.tolist(), rows, strict=True):
        check_row(row, [*prompt, *following], truth)


def test_rows_that_are_kept_go_on_alone(opened: onnxruntime.InferenceSession, truth: Float64Model) -> None:
    """In another order, without the longest, whose room is free again."""
    session = open_decoder(opened, 8, batch=3)
    session.prefill(PROMPTS)
    session.decode(FOLLOWING[:, 0])
    session.keep([2, 1])
    assert (session.rows, session.length) == (2, 5)
    first, second = session.decode(FOLLOWING[[2, 1], 1])
    check_row([first], [*PROMPTS[2], 250, 249], truth)
    check_row([second], [*PROMPTS[1], 1, 2], truth)
    session.prefill(PROMPTS)
    assert (session.rows, session.length) == (3, 7)


def test_one_text_takes_several_tokens_at_a_time(
    opened: onnxruntime.InferenceSession, truth: Float64Model
) -> None:
    session = open_decoder(opened, 7)
    tokens = np.array(PROMPTS[0])
    logits = [*session.step(tokens[:3]), *session.step(tokens[3:4]).copy(), *session.step(tokens[4:])]
    check_row(logits, PROMPTS[0], truth)
    refused(
        lambda: session.decode([1]),
        ShapeError,
        "input_ids: expected 1 to 0 more tokens, got 1; open the session with a larger capacity",
    )
    refused(
        lambda: open_decoder(opened, 7, batch=2).decode([1]),
        ShapeError,
        "tokens: expected 2, one a row, got 1",
    )
    refused(lambda: session.keep([1]), ShapeError, "rows: expected some of 0 to 0, got [1]")


def test_a_session_for_the_other_kind_of_cache_is_refused(
    base: Path, folder: Path, opened: onnxruntime.InferenceSession, tmp_path: Path
) -> None:
    message = "cache: expected one that {}, got the other kind; open the model with open_decoder"
    refused(lambda: DecoderSession(opened, 4), FileError, message.format("is appended to in place"))
    export(base, tmp_path / "fused")
    refused(lambda: GrowingSession(tmp_path / "fused", 4), FileError, message.format("grows"))
    assert type(open_decoder(tmp_path / "fused", 4)) is DecoderSession
    refused(
        lambda: open_decoder(folder, 129),
        ConfigError,
        "capacity: expected at most the model's context of 128 tokens, got 129",
    )


def test_onnxruntime_genai_runs_it_with_a_cache_that_grows(folder: Path) -> None:
    assert not json.loads((folder / "genai_config.json").read_text())["search"]["past_present_share_buffer"]
    prompt = PROMPTS[0]
    ours = [token for _, token in generate(open_decoder(folder, 16), [prompt], 8)]
    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 8)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    assert theirs == ours[: len(theirs)]
    assert len(theirs) == 8 or theirs[-1] == 257


def test_weights_are_stored_once(base: Path, folder: Path, tmp_path: Path) -> None:
    """A tied embedding too: it is not stored transposed beside itself."""
    export(base, tmp_path / "fused")
    sizes = [(path / "model.onnx_data").stat().st_size for path in (folder, tmp_path / "fused")]
    page = 4096
    assert sizes[0] <= sizes[1] + page


def test_verify_passes_and_finds_one_changed_entry_of_a_transposed_weight(
    base: Path, adapter: Path, folder: Path, tmp_path: Path
) -> None:
    assert verify(folder, base, adapter).passed
    export(base, tmp_path / "onnx", adapter, portable=True)
    model = onnx.load(str(tmp_path / "onnx/model.onnx"), load_external_data=False)
    name = "model.layers.1.mlp.down_proj.weight"
    (held,) = [tensor for tensor in model.graph.initializer if tensor.name == f"{name}.transposed"]
    assert list(held.dims) == [80, 48]
    offset = next(int(entry.value) for entry in held.external_data if entry.key == "offset")
    with open(tmp_path / "onnx/model.onnx_data", "r+b") as file:
        file.seek(offset + 4 * (48 * 3 + 5))
        before = file.read(4)
        file.seek(-4, 1)
        file.write(bytes([before[0] ^ 1]) + before[1:])
    report = verify(tmp_path / "onnx", base, adapter)
    failed = [check for check in report.checks if not check.passed]
    assert "correctly rounded merge" in failed[0].name
    (line,) = failed[0].failures
    assert line.startswith(f"{name}: ")
    assert "1 of 3840 entries differ from the correctly rounded merge, [5,3]: expected " in line


def test_float16_norms_and_softmax_are_computed_in_float32(base: Path, tmp_path: Path) -> None:
    export(base, tmp_path / "onnx", dtype="fp16", portable=True)
    onnx.checker.check_model(str(tmp_path / "onnx/model.onnx"), full_check=True)
    (right,) = Float64Model(base, None).evaluate([PROMPTS[0]], np.dtype(np.float16))
    logits = open_decoder(tmp_path / "onnx", 7).step(np.array(PROMPTS[0]))
    assert logits.dtype == np.float16
    assert np.abs(logits - right.logits).max() <= right.tolerance


@pytest.mark.parametrize("name", ["llama", "gptj"])
@pytest.mark.slow
def test_a_deep_graph_from_a_few_layers_is_that_of_tracing_them_all(name: str, tmp_path: Path) -> None:
    """Catches a node before the layers, or a part of a norm, that reads a layer other than its own."""
    values = CASES[name].config().to_dict()
    config = type(CASES[name].config())(
        **values | {key: 4 for key in ("num_hidden_layers", "n_layer") if key in values}
    )
    config.architectures = ["AnyForCausalLM"]
    config.save_pretrained(tmp_path)
    few = trace_replicated(tmp_path, TASK["text-generation"], FLOAT32, portable=True)
    assert few is not None
    few, whole = lower(few), lower(trace(tmp_path, TASK["text-generation"], FLOAT32, portable=True))
    assert first_difference(few.model, whole.model, whole.unbound) is None
    assert (few.made, few.shapes, few.decoder) == (whole.made, whole.shapes, whole.decoder)


def test_what_cannot_be_portable_is_refused(tmp_path: Path) -> None:
    refused(
        lambda: GraphOptions(quantization="int8", portable=True),
        ConfigError,
        "quantization: expected none in a portable graph, got 'int8', whose operators are onnxruntime's own; "
        "leave one of them out",
    )
    base = make(tmp_path / "t5", "t5")
    refused(
        lambda: export(base, tmp_path / "onnx", portable=True),
        ConfigError,
        "portable: expected a model of one graph, got one for text2text-generation; "
        "export without --portable",
    )
    assert not (tmp_path / "onnx").exists()


def _unplaced() -> Iterator[tuple[object, str]]:
    yield (
        hf.MptConfig(vocab_size=VOCABULARY, d_model=64, n_heads=4, n_layers=1, max_seq_len=32),
        "MptForCausalLM: expected position_ids in its forward, found none",
    )
    yield (
        hf.GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_layers=1,
            num_heads=4,
            window_size=4,
            attention_types=[[["local"], 1]],
            max_position_embeddings=32,
        ),
        "attn.attention.bias: expected causal attention, got a window counted by places in the cache",
    )
    yield (
        hf.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4, n_positions=32),
        "OpenAIGPTLMHeadModel: expected a key-value cache in its forward, found none",
    )
    yield (
        hf.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, alibi=True
        ),
        "expected no bfloat16",
    )


@pytest.mark.parametrize(("config", "words"), list(_unplaced()))
def test_code_that_no_graph_can_be_right_for_is_refused(config: object, words: str, tmp_path: Path) -> None:
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(LoracleError, match=words) as caught:
        export(tmp_path / "base", tmp_path / "onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "onnx").exists()


def test_codes_need_attention_that_can_be_exchanged(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "gptj")
    refused(
        lambda: export(base, tmp_path / "onnx", quantization="int8"),
        ConfigError,
        "quantization: expected none for a model whose code computes attention by itself, got 'int8'; "
        "leave --quantization out",
    )


MODELING = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class DampedConfig(LlamaConfig):
    model_type = "damped"


class DampedForCausalLM(LlamaForCausalLM):
    config_class = DampedConfig

    def __init__(self, config):
        super().__init__(config)
        self.gain = nn.Linear(config.vocab_size, config.vocab_size, bias=False)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
        out = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **more,
        )
        out.logits = self.gain(torch.tanh(out.logits))
        return out
"""
AUTO_MAP = {
    "AutoConfig": "modeling_damped.DampedConfig",
    "AutoModelForCausalLM": "modeling_damped.DampedForCausalLM",
}


def make_damped(folder: Path) -> Path:
    """A decoder with modelling code of its own, whose logits go through a last layer."""
    folder.mkdir()
    (folder / "modeling_damped.py").write_text(MODELING)
    config = hf.LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False).to_dict()
    config |= {"model_type": "damped", "architectures": ["DampedForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    own = hf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = hf.AutoModelForCausalLM.from_config(own, trust_remote_code=True)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.3, 0.3)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_commands_have_the_options(base: Path, folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()

    def call(*arguments: object) -> tuple[int, str]:
        result = runner.invoke(app, [*map(str, arguments)])
        return result.exit_code, result.output

    code, out = call("export", "--model", base, "--out", tmp_path / "onnx", "--portable")
    assert (code, " 20 weights in fp32" in out) == (0, True)
    assert GraphOptions(portable=True) == noted_options(load_graph(tmp_path / "onnx/model.onnx"), "")
    code, out = call("run", folder, "--prompt", "a", "--max-new-tokens", 3, "--json")
    assert (code, len(json.loads(out)["answers"][0]["tokens"])) == (0, 3)


@pytest.mark.slow
def test_code_of_the_models_own_runs_where_it_is_trusted(tmp_path: Path) -> None:
    base = make_damped(tmp_path / "base")
    source = base / "config.json"
    refused(
        lambda: export(base, tmp_path / "onnx"),
        ConfigError,
        f"{source}: auto_map: expected none, got code of the model's own; read it, and let it run with "
        "--trust-remote-code",
    )
    export_command = ["export", "--model", str(base), "--out", str(tmp_path / "onnx"), "--trust-remote-code"]
    assert CliRunner().invoke(app, export_command).exit_code == 0
    report = verify(tmp_path / "onnx", base, trust_remote_code=True)
    assert report.passed
    assert report.error is not None
    refused(
        lambda: verify(tmp_path / "onnx", base),
        ConfigError,
        f"{source}: auto_map: expected none, got code of the model's own; read it, and let it run with "
        "--trust-remote-code",
    )
    # Another line of the code is another graph, though config.json is the same.
    (base / "modeling_damped.py").write_text(MODELING.replace("torch.tanh", "torch.sin"))
    assert not verify(tmp_path / "onnx", base, trust_remote_code=True).checks[0].passed


def test_code_from_elsewhere_is_refused_though_trusted(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    path = base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "some/where--m.M"}}))
    refused(
        lambda: export(base, tmp_path / "onnx", trust_remote_code=True),
        ConfigError,
        f"{path}: auto_map: AutoModelForCausalLM: expected code in the model's folder, got "
        "'some/where--m.M'; copy its files into the folder",
    )
