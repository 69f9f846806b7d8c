"""Put the page, its runtime and two exported models into a folder that a static web server can serve.

    python examples/browser/assemble.py SITE

The classifier is all-MiniLM-L6-v2, fine-tuned here for half a minute to tell which library a docstring is
from, merged. SmolLM2-135M-Instruct is exported as it is. Both come from the package index, and so does the
runtime: the page asks no other server for anything.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loracle.demo import minilm, smollm2
from loracle.demo.docstrings import docstring_pairs
from loracle.demo.tasks import split
from loracle.export import export
from loracle.files import output_folder
from loracle.reference import LoracleError

HERE = Path(__file__).parent
PAGE = ("index.html", "style.css", "icon.svg", "app.js", "worker.js")
RUNTIME = {
    "transformers.js": "@huggingface/transformers/dist/transformers.min.js",
    "ort.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "ort.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
}
LIBRARIES = {"matplotlib": "matplotlib", "numpy": "numpy", "torch": "torch.nn"}
TRAINING = "--targets attention --lr 5e-3 --max-steps 30 --max-length 32"
CLASSIFIER = {
    "id": "classifier",
    "task": "text-classification",
    "title": "Classifier",
    "about": "all-MiniLM-L6-v2 with a merged adapter tells which Python library a docstring is from.",
    "prompt": "First line of a docstring",
    "action": "Classify",
    "examples": ["Pad an array.", "Draw a filled contour plot.", "Applies dropout during training."],
}
CHAT = {
    "id": "chat",
    "task": "text-generation",
    "title": "Chat",
    "about": "SmolLM2-135M-Instruct writes an answer, one token after the other.",
    "prompt": "Question",
    "action": "Answer",
    "examples": ["What is the capital of France?", "Name three colors."],
    "max_new_tokens": 64,
}


def run(command: list[str], folder: Path | None = None) -> None:
    """Run a program that says itself what goes wrong. Raises SystemExit with its code."""
    code = subprocess.run(command, cwd=folder, check=False).returncode
    if code:
        raise SystemExit(code)


def packages(folder: Path | None) -> Path:
    """The folder of npm's packages; they are installed beside this file where none is given."""
    if folder is None:
        # Nothing of them is compiled or run here, so no script of theirs is needed.
        run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], HERE)
        folder = HERE / "node_modules"
    for name in RUNTIME.values():
        if not (folder / name).is_file():
            raise SystemExit(f"{folder / name}: expected a file of the runtime, found none")
    return folder


def train_classifier(folder: Path) -> Path:
    """An adapter for MiniLM, with the head of a classifier, in `folder`."""
    rows = [
        {"text": summary, "label": label}
        for label, package in LIBRARIES.items()
        for _, summary in split(docstring_pairs([package]), heldout_percent=20)[0]
    ]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "loracle.cli", "finetune", "--task", "sequence-classification"]
    model, out = str(minilm.model_folder(progress=print)), folder / "adapter"
    run([*command, "--model", model, "--data", str(data), "--out", str(out), *TRAINING.split()])
    return out


def write_page(site: Path, runtime: Path) -> None:
    """Copy the page and its runtime into the folder."""
    for name in PAGE:
        shutil.copyfile(HERE / name, site / name)
    (site / "vendor").mkdir()
    for name, source in RUNTIME.items():
        shutil.copyfile(runtime / source, site / "vendor" / name)


def described(entry: dict[str, Any], folder: Path, graph: str = "model") -> dict[str, Any]:
    """The page's entry for an exported folder in `models`, or for one of its graphs."""
    data = sorted(path.name for path in folder.glob("*.onnx_data"))
    size = sum((folder / name).stat().st_size for name in data)
    return {**entry, "folder": folder.name, "graph": graph, "data": data, "bytes": size}


def write_list(site: Path, entries: list[dict[str, Any]]) -> None:
    """Write what the page offers, the first of them chosen."""
    (site / "models.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def assemble(site: Path, runtime: Path, *, chat: bool) -> None:
    """Write the folder, whole or not at all."""
    with output_folder(site) as folder:
        write_page(folder, runtime)
        models = folder / "models"
        models.mkdir()
        with tempfile.TemporaryDirectory() as scratch:
            adapter = train_classifier(Path(scratch))
            export(minilm.model_folder(), models / "classifier", adapter)
        entries = [described(CLASSIFIER, models / "classifier")]
        if chat:
            export(smollm2.model_folder(progress=print), models / "chat")
            entries.append(described(CHAT, models / "chat"))
        write_list(folder, entries)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the folder of the page.")
    parser.add_argument("site", type=Path, help="folder to make; must not exist, or be empty")
    parser.add_argument("--packages", type=Path, help="a node_modules with the runtime, instead of npm's own")
    parser.add_argument("--without-chat", action="store_true", help="the classifier alone: 90 MB, not 640")
    options = parser.parse_args()
    try:
        assemble(options.site, packages(options.packages), chat=not options.without_chat)
    except LoracleError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{options.site}: serve it with `python examples/browser/serve.py {options.site}`")


if __name__ == "__main__":
    main()
