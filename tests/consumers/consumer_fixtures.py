"""Exported folders for other people's runtimes, what loracle answers with them, and running the runtimes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export_fixtures import SHAPE, TEMPLATE, make_adapter
from head_fixtures import LABELS
from task_fixtures import tiny_bert, write_words_model
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM

from loracle.export import Deployment, export, generate, open_decoder, verify
from loracle.files import Adapter, LoraConfig, LoraPair, write_adapter

ROOT = Path(__file__).parents[2]
NODE_FOLDER = Path(__file__).parent / "node"
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
INSTALL = "run `make test-consumers`, which installs it"

# No head size of its own: Optimum takes it to be what a head has of the hidden size.
SIZES = {**SHAPE, "hidden_size": 64}
PROMPTS = ([5, 77, 30, 12], [8, 9, 200], [100], [3, 1, 4, 1, 5, 9, 2, 6])
NEW_TOKENS = 16
TEXTS = ("b", "a", "zz", "hello world", "pneumonia")


@dataclass(frozen=True)
class Exports:
    """Folders of one tiny decoder, and of one classifier.

    Attributes:
        baked: with the task french merged.
        portable: the same in standard operators.
        deployment: the base, french linked and german swappable.
        german: baked with the task german, for its answers.
        classifier: a BERT with an adapter merged.
        tolerance: how far its logits may be from the exact ones, the derived bound.
    """

    baked: Path
    portable: Path
    deployment: Path
    german: Path
    classifier: Path
    tolerance: float

    def graphs(self) -> dict[str, Path]:
        """The graphs that answer without further inputs, by names for messages."""
        return {
            "baked": self.baked / "model.onnx",
            "portable": self.portable / "model.onnx",
            "linked": self.deployment / "french.onnx",
            "base": self.deployment / "model.onnx",
            "swappable": self.deployment / "swappable.onnx",
        }


def make_exports(root: Path) -> Exports:
    base = _make_decoder(root / "base")
    french = make_adapter(root / "french", base, ("q_proj", "v_proj", "down_proj"))
    german = make_adapter(root / "german", base, ("o_proj", "v_proj"), seed=2)
    deployment = root / "deployment"
    export(base, deployment, french, form="linked", name="french")
    export(base, deployment, german, form="swappable", name="german")
    export(base, root / "baked", french)
    export(base, root / "portable", french, portable=True)
    export(base, root / "baked german", german)
    bert, classes = _make_classifier(root)
    export(bert, root / "classifier", classes)
    tolerance = verify(root / "classifier", bert, classes).tolerance
    assert tolerance is not None
    folders = (root / name for name in ("baked", "portable", "deployment", "baked german", "classifier"))
    return Exports(*folders, tolerance)


def _make_decoder(folder: Path) -> Path:
    """A Llama model with random weights whose every token is another letter, so that text tells tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, initializer_range=0.2))
    model.save_pretrained(folder)
    letters = [" ", "\n", *map(chr, range(33, 127))]
    code = 0xC0
    while len(letters) < SIZES["vocab_size"] - 8:
        if unicodedata.category(chr(code)) in ("Lu", "Ll") and unicodedata.is_normalized("NFKD", chr(code)):
            letters.append(chr(code))
        code += 1
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>", *(f"<{number}>" for number in range(6))])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _make_classifier(root: Path) -> tuple[Path, Path]:
    """A BERT with a head and random weights, large enough for classes to differ, and an adapter."""
    names = dict(enumerate(LABELS))
    numbers = {label: number for number, label in names.items()}
    model = tiny_bert(
        "BertForSequenceClassification", initializer_range=0.7, id2label=names, label2id=numbers
    )
    base = write_words_model(root / "bert", model)
    rng = np.random.default_rng(0)
    matrices = iter(rng.standard_normal((8, 32)).astype(np.float32))
    pairs = {
        f"bert.encoder.layer.{layer}.attention.self.{name}": LoraPair(
            next(matrices).reshape(2, 16), next(matrices).reshape(16, 2), 0.5
        )
        for layer in range(2)
        for name in ("query", "value")
    }
    adapter = root / "classes"
    adapter.mkdir()
    config = LoraConfig(r=2, lora_alpha=1, target_modules=("query", "value"))
    write_adapter(adapter, Adapter(config, pairs))
    return base, adapter


def our_tokens(
    graph: Path, prompts: Sequence[Sequence[int]] = PROMPTS, count: int = NEW_TOKENS
) -> list[list[int]]:
    """The greedy tokens after each prompt, one by one; an end token is not among them."""
    answers = []
    for prompt in prompts:
        session = open_decoder(graph, len(prompt) + count)
        answers.append([token for _, token in generate(session, [prompt], count)])
    return answers


def task_tokens(
    folder: Path, task: str, prompts: Sequence[Sequence[int]] = PROMPTS, count: int = NEW_TOKENS
) -> list[list[int]]:
    """The same of a deployment's swappable task."""
    deployment = Deployment(folder)
    answers = []
    for prompt in prompts:
        session = deployment.decoder(task, len(prompt) + count)
        answers.append([token for _, token in generate(session, [prompt], count)])
    return answers


def node() -> str:
    """The program; its packages must be there."""
    found = shutil.which("node")
    if found is None or not (NODE_FOLDER / "node_modules").is_dir():
        raise FileNotFoundError(
            f"node and {NODE_FOLDER}/node_modules: expected them, found not both; {INSTALL}"
        )
    return found


def peers_python() -> str:
    """A Python with Optimum."""
    if not PEERS_PYTHON.is_file():
        raise FileNotFoundError(f"{PEERS_PYTHON}: expected a Python with Optimum, found none; {INSTALL}")
    return str(PEERS_PYTHON)


def chromium() -> str:
    """The system's browser."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        raise FileNotFoundError(f"chromium: expected it on the path, found none; {INSTALL}")
    return found


def run_json(program: Sequence[str], script: Path, request: Any, timeout: float = 900) -> Any:
    """What a script prints as its last line when it is asked with a request; both are JSON."""
    done = subprocess.run(
        [*program, str(script), json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])
