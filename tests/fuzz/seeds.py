"""Small valid files of every kind that is read, as the project writes them: bytes by their names."""

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from loracle.export.adapter_file import document_bytes, write_parameters
from loracle.export.names import OPTIONS_KEY, SHARDS_KEY, TASK_KEY
from loracle.export.options import GraphOptions
from loracle.export.shards import shards_text
from loracle.files import Adapter, LoraConfig, LoraPair, write_adapter
from loracle.files.safetensors_writer import write_safetensors

Files = Mapping[str, bytes]
Array = NDArray[Any]

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
DOCUMENT = {
    "version": 1,
    "form": "swappable",
    "r": [2, 4],
    "lora_alpha": 8.0,
    "use_rslora": False,
    "use_dora": True,
    "target_modules": ["q_proj", "v_proj"],
    "adapter_sha256": "0" * 64,
    "tensors": 2,
    "bytes": 64,
    "sha256": "f" * 64,
}
RECORD = {
    "version": 1,
    "sha256": "f" * 64,
    "time": "2026-11-01T00:00:00+00:00",
    "checks": [{"name": "graph", "figure": "12 nodes"}],
    "largest_error": 1e-5,
    "tolerance": None,
    "versions": {"numpy": "2.0"},
}


def written(write: Callable[[Path], object]) -> Files:
    """Return what ``write`` leaves in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def array(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def safetensors() -> list[Files]:
    tensors = {
        "a": array(2, 3),
        "b.weight": array(4, seed=1, dtype=ml_dtypes.bfloat16),
        "c": np.arange(3, dtype=np.int64),
        "d": np.zeros((0, 4), np.float16),
        "e": array(seed=2, dtype=np.float64).reshape(()),
    }
    several = written(lambda folder: write_safetensors(folder / "x.safetensors", tensors, {"format": "pt"}))
    single = written(lambda folder: write_safetensors(folder / "x.safetensors", {"t": array(2, 2)}))
    return [several, single]


def base_tensors() -> dict[str, Array]:
    return {
        "lm_head.weight": array(10, 6, seed=3),
        "model.embed_tokens.weight": array(10, 6, seed=4),
        f"{Q}.weight": array(8, 6, seed=5),
        f"{V}.weight": array(4, 6, seed=6),
        "model.norm.weight": array(6, seed=7),
    }


CONFIG = {
    "model_type": "llama",
    "tie_word_embeddings": False,
    "dtype": "float32",
    "vocab_size": 10,
    "architectures": ["LlamaForCausalLM"],
}


def checkpoint() -> list[Files]:
    items = list(base_tensors().items())
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        for name, part in zip(names, (items[:2], items[2:]), strict=True):
            write_safetensors(folder / name, dict(part), {"format": "pt"})
        placed = {key: names[number >= 2] for number, (key, _) in enumerate(items)}
        index = {"metadata": {"total_size": 1}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def write_single(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        write_safetensors(folder / "model.safetensors", dict(items), {"format": "pt"})

    return [written(write), written(write_single)]


def adapter() -> list[Files]:
    def plain(**options: Any) -> Adapter:
        config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ("q_proj", "v_proj"), **options})
        bias = {"bias": array(8, seed=9)} if options.get("lora_bias") else {}
        magnitude = {"magnitude": np.abs(array(8, seed=9)) + 1} if options.get("use_dora") else {}
        own = config.rank_of(Q)
        pairs = {
            Q: LoraPair(
                array(own, 6, seed=1), array(8, own, seed=2), config.scaling_of(Q), **bias, **magnitude
            )
        }
        if not bias and not magnitude:
            pairs[V] = LoraPair(array(2, 6, seed=3), array(4, 2, seed=4), config.scaling_of(V))
        return Adapter(config, pairs)

    def embedded() -> Adapter:
        config = LoraConfig(r=2, target_modules=("embed_tokens",), modules_to_save=("lm_head",))
        pair = LoraPair(
            array(2, 10, seed=1), array(6, 2, seed=2), config.scaling_of("embed_tokens"), "embedding"
        )
        return Adapter(config, {"model.embed_tokens": pair}, {"lm_head.weight": array(10, 6, seed=5)})

    def write(own: Adapter) -> Files:
        def into(folder: Path) -> None:
            write_adapter(folder, own)
            (folder / "head.json").write_text(json.dumps(HEAD))

        return written(into)

    return [
        write(plain()),
        write(plain(rank_pattern={"q_proj": 3}, alpha_pattern={r".*\.q_proj": 5.0}, use_rslora=True)),
        write(plain(use_dora=True, target_modules=r".*\.(q|v)_proj")),
        write(plain(lora_bias=True)),
        write(embedded()),
        write(plain(layers_to_transform=[0], layers_pattern="layers")),
    ]


HEAD = {
    "architectures": ["BertForSequenceClassification"],
    "id2label": {"0": "no", "1": "yes"},
    "label2id": {"no": 0, "yes": 1},
    "pad_token_id": 0,
    "problem_type": "single_label_classification",
}


def parameters() -> list[Files]:
    arrays = {"layers.0.lora_A.weight": array(3, 5), "layers.0.lora_B.weight": array(7, 3, dtype=np.float16)}

    def write(folder: Path) -> None:
        path = folder / "x.onnx_adapter"
        write_parameters(path, arrays)
        path.write_bytes(path.read_bytes() + document_bytes({**DOCUMENT, "form": "adapter-inputs"}))

    return [written(write)]


def task() -> list[Files]:
    metadata = {TASK_KEY: json.dumps(DOCUMENT)}
    tensors = {"w": array(4, 6), "half": array(2, 2, dtype=np.float16)}
    return [written(lambda folder: write_safetensors(folder / "x.task.safetensors", tensors, metadata))]


def graph() -> onnx.ModelProto:
    """Every place where a tensor may stand: initializers, a constant, a graph in a node, a function."""
    shape = [2, 6]
    external = TensorProto(
        name="far", data_type=TensorProto.FLOAT, dims=[6, 4], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", "model.onnx_data"), ("offset", "16"), ("length", "96")):
        external.external_data.add(key=key, value=value)
    packed = helper.make_tensor("packed", TensorProto.INT4, [4], [1, 2, 3, 4])
    listed = helper.make_tensor("listed", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    half = helper.make_tensor("half", TensorProto.BFLOAT16, [2], [1.0, 2.0])
    words = helper.make_tensor("words", TensorProto.STRING, [1], [b"x"])
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["chosen"])],
        "branch",
        [],
        [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(array(4), "inner")],
    )
    constant = helper.make_node("Constant", [], ["constant"], value=numpy_helper.from_array(array(4), "c"))
    nodes = [
        constant,
        helper.make_node("MatMul", ["x", "far"], ["y"], name="product"),
        helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["y", "z"], ["s"]),
        helper.make_node("Scaled", ["s"], ["t"], domain="local"),
        helper.make_node("Add", ["t", "listed"], ["out"]),
    ]
    scaled = helper.make_function(
        "local",
        "Scaled",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.float32([2]))),
            helper.make_node("Mul", ["a", "two"], ["b"]),
        ],
        [helper.make_opsetid("", 20)],
    )
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 4])]
    own = helper.make_graph(nodes, "main", inputs, outputs, [external, listed, packed, half, words])
    own.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], 4]))
    return helper.make_model(
        own,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("local", 1)],
        functions=[scaled],
        ir_version=10,
    )


def model() -> list[Files]:
    def write(folder: Path) -> None:
        write_safetensors(folder / "s.safetensors", {"t": array(2, 2)})
        made = graph()
        notes = {
            OPTIONS_KEY: json.dumps(GraphOptions().to_json()),
            SHARDS_KEY: shards_text(folder, ["s.safetensors"]),
            TASK_KEY: json.dumps({**DOCUMENT, "form": "linked"}),
        }
        helper.set_model_props(made, notes)
        (folder / "model.onnx").write_bytes(made.SerializeToString())
        (folder / "model.onnx_data").write_bytes(bytes(16) + array(6, 4).tobytes())

    return [written(write)]


def tokenizers() -> list[Files]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = {letter: number for number, letter in enumerate("abcdefghijklmnop")}
    bpe = Tokenizer(models.BPE({**letters, "ab": 16, "abc": 17}, [("a", "b"), ("ab", "c")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<s>", "</s>"])
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "##b": 5, "c": 6}
    pieces = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -2.5)], 0))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("x", "y")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    beside = {
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}).encode(),
        "chat_template.jinja": (
            b"{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            b"{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
        ),
        "generation_config.json": b'{"eos_token_id": [17, 2]}',
    }
    return [{"tokenizer.json": own.to_str().encode(), **beside} for own in (bpe, pieces, unigram)]


def states() -> list[Files]:
    import torch

    plain = {
        "first.lora_A": torch.ones(2, 3),
        "first.lora_B": torch.zeros(5, 2, dtype=torch.bfloat16),
        "first.bias": torch.ones(5, dtype=torch.float64),
    }
    shared = torch.arange(12.0)
    views = {"second.lora_A": shared[:6].view(2, 3), "second.lora_B": shared[6:].view(3, 2).half()}
    wrapped = {
        "model": {
            "transformer.h.0.attn.proj.lora_A": torch.ones(2, 4),
            "transformer.h.0.attn.proj.lora_B": torch.ones(4, 2),
        }
    }
    made = []
    for state in (plain, views, wrapped):
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
            made.append({"x.pt": buffer.getvalue()})
    return made


def json_documents() -> list[Files]:
    document = {"a": 1, "b": [1.5, "x", None, True], "c": {"d": {"e": []}, "f": "é"}, "g": "\U0001f600"}
    return [
        {"x.json": json.dumps(document).encode()},
        {"x.json": json.dumps(CONFIG, ensure_ascii=False).encode()},
    ]


def documents() -> list[Files]:
    return [{"x.json": json.dumps(DOCUMENT).encode(), "x.verified.json": json.dumps(RECORD).encode()}]


def heads() -> list[Files]:
    return [{"head.json": json.dumps(HEAD).encode()}]


def deployments() -> list[Files]:
    (linked,) = model()
    (swapped,) = task()
    (unmerged,) = parameters()
    record = {"x.verified.json": json.dumps(RECORD).encode()}
    files = {
        "x.task.safetensors": swapped["x.task.safetensors"],
        "y.onnx_adapter": unmerged["x.onnx_adapter"],
    }
    return [{**linked, **files, "z.onnx": linked["model.onnx"], **record}]
