"""docs/finetuning.md does what it says: its boxes run in order, and what they write is checked from outside.

Needs PyPI, or a cache with the models and Django's wheel. About a minute on two cores.
"""

import ast
import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loracle.torch_impl import read_examples

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/finetuning.md"


@dataclass(frozen=True)
class Block:
    """A fenced block: the words behind its fence, its text, and the number of the line that it begins on."""

    info: str
    text: str
    line: int

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks in order.

    Raises:
        ValueError: a fence is not closed, or has no language: it would be left out unseen.
    """
    blocks: list[Block] = []
    opened: Block | None = None
    for number, line in enumerate(page.splitlines(), start=1):
        if opened is None and line.startswith("```"):
            opened = Block(line.removeprefix("```").strip(), "", number + 1)
            if not opened.info:
                raise ValueError(f"line {number}: a fence without a language")
        elif opened is not None and line == "```":
            blocks.append(opened)
            opened = None
        elif opened is not None:
            opened = Block(opened.info, f"{opened.text}{line}\n", opened.line)
    if opened is not None:
        raise ValueError(f"line {opened.line - 1}: a fence that is not closed")
    return blocks


def script_of(blocks: list[Block], name: str) -> str:
    """Return a Python script that runs the blocks in order, Python's in one namespace, the shell's by bash.

    What raises is shown at its line of the page ``name``.
    """
    lines = ["import subprocess", "page = {'__name__': '__main__'}"]
    for block in blocks:
        if block.info == "python":
            code = "\n" * (block.line - 1) + block.text
            lines.append(f"exec(compile({code!r}, {name!r}, 'exec'), page)")
        elif block.info == "sh":
            lines.append(f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {block.text!r}], check=True)")
    return "\n".join(lines) + "\n"


def run(blocks: list[Block], folder: Path, environment: dict[str, str]) -> str:
    """Run the blocks in ``folder`` and return what they said on stdout."""
    (folder / "page.py").write_text(script_of(blocks, PAGE.name))
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_blocks_run_in_order_and_share_one_namespace(tmp_path: Path) -> None:
    page = "\n".join(
        [
            "```python",
            "from pathlib import Path",
            "said = Path('said').read_text",
            "```",
            "text",
            "```sh",
            "echo one > said",
            "```",
            "```sh no-run",
            "echo two > said",
            "```",
            "```json",
            "{}",
            "```",
            "```python",
            "print(said())",
            "```",
        ]
    )
    assert run(blocks_of(page), tmp_path, dict(os.environ)) == "one\n\n"


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("\n```python\nassert 1 == 2, 'unequal'\n```", 'finetuning.md", line 3'),
        ("```sh\nfalse | true\necho on\n```", "CalledProcessError"),
        ("```sh\necho $unset\n```", "unbound variable"),
    ],
)
def test_a_failing_block_is_seen(tmp_path: Path, page: str, said: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(said)):
        run(blocks_of(page), tmp_path, dict(os.environ))


@pytest.mark.parametrize("page", ["```python\npass\n", "```\npass\n```\n"])
def test_a_fence_that_would_hide_a_block_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="line 1: a fence"):
        blocks_of(page)


def test_the_page_has_nothing_that_is_not_run() -> None:
    infos = Counter(block.info for block in blocks_of(PAGE.read_text("utf-8")))
    assert set(infos) == {"python", "sh", "json"}
    assert infos["sh"] == 3
    assert infos["python"] >= 5


def test_the_data_on_the_page_is_read(tmp_path: Path) -> None:
    classified, generated = [
        block for block in blocks_of(PAGE.read_text("utf-8")) if block.language == "json"
    ]
    for block, forms in ((classified, ("labelled",)), (generated, ("completion",))):
        (tmp_path / "data.jsonl").write_text(block.text)
        assert len(read_examples(tmp_path / "data.jsonl", forms)) == 1


# One test, not one for each claim: under pytest-xdist each worker would run the page anew.
@pytest.mark.model
@pytest.mark.slow
def test_the_page_runs_and_does_what_it_says(users_cache: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "LORACLE_CACHE": str(users_cache),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    page = PAGE.read_text("utf-8")
    said = run(blocks_of(page), tmp_path, environment)
    check_files(tmp_path, page)
    check_held_out_loss(tmp_path, said)
    check_classifiers(tmp_path)
    check_merged_generator(tmp_path)
    check_answers(said)


def check_files(made: Path, page: str) -> None:
    """The files that the page lists are those that are there, and they agree with each other."""
    listed = re.findall(r"^\| (`.*`) \|", page.partition("## What comes out")[2].partition("\n## ")[0], re.M)
    names = set(re.findall(r"`([^`]+)`", ", ".join(listed)))
    assert {path.name for path in (made / "library").iterdir()} == names
    folder = made / "french"
    assert {path.name for path in folder.iterdir()} == names - {"head.json"}
    with (folder / "loss.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    result = result_of(folder)
    assert [float(row["loss"]) for row in rows if row["loss"]] == result["losses"]
    assert [float(row["eval_loss"]) for row in rows if row["eval_loss"]][-1] == result["eval_after"]


def check_held_out_loss(made: Path, said: str) -> None:
    """It falls, by the command line and by transformers' trainer."""
    for adapter in ("library", "french"):
        result = result_of(made / adapter)
        assert result["eval_after"] < 0.9 * result["eval_before"], adapter
    found = re.search(r"held-out loss ([\d.]+) to ([\d.]+)", said)
    assert found is not None
    before, after = map(float, found.groups())
    assert after < 0.9 * before


def check_classifiers(made: Path) -> None:
    """With PEFT both adapters do far better than naming the largest class; the merged model does the same."""
    rows = [json.loads(line) for line in (made / "library.heldout.jsonl").read_text("utf-8").splitlines()]
    labels = result_of(made / "library")["labels"]
    numbers = torch.tensor([labels.index(row["label"]) for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(made / "minilm")
    inputs = tokenizer(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    base = AutoModelForSequenceClassification.from_pretrained(made / "minilm", num_labels=3)
    theirs = PeftModel.from_pretrained(base, made / "library", adapter_name="library")
    theirs.load_adapter(made / "library-python", adapter_name="library-python")
    majority = numbers.bincount().max().item() / len(numbers)
    accuracy = {}
    classes = {}
    for adapter in ("library", "library-python"):
        theirs.set_adapter(adapter)
        classes[adapter] = logits(theirs, inputs).argmax(-1)
        accuracy[adapter] = (classes[adapter] == numbers).double().mean().item()
        # Half of what the largest class gets wrong.
        assert accuracy[adapter] > (1 + majority) / 2, adapter
    result = result_of(made / "library")
    theirs.set_adapter("library")
    exact = logits(theirs, inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=result["bf16"]):
        error = (logits(theirs, inputs).float() - exact).abs().max()
    best = exact.topk(2).values
    # Ours may be in bfloat16: a text counts either way where its two best classes are closer than the errors.
    doubtful = (best[:, 0] - best[:, 1] <= 4 * error).double().mean().item()
    assert doubtful < 0.1
    assert abs(accuracy["library"] - result["metrics"]["accuracy"]) <= doubtful
    for adapter in classes:
        merged, report = AutoModelForSequenceClassification.from_pretrained(
            made / f"{adapter}-merged", output_loading_info=True
        )
        assert not any(report.values()), report
        assert merged.config.id2label == dict(enumerate(labels))
        assert logits(merged, inputs).argmax(-1).equal(classes[adapter])


def check_merged_generator(made: Path) -> None:
    """The merged checkpoint answers as PEFT does with the adapter."""
    inputs = {"input_ids": torch.arange(1000, 1024)[None]}
    base = AutoModelForCausalLM.from_pretrained(made / "smollm2")
    plain = logits(base, inputs)
    merged = logits(AutoModelForCausalLM.from_pretrained(made / "french-merged"), inputs)
    theirs = logits(PeftModel.from_pretrained(base, made / "french"), inputs)
    assert merged.argmax(-1).equal(theirs.argmax(-1))
    # What rounding in another order leaves, beside what the adapter changes.
    assert (merged - theirs).abs().max() < 1e-4 * (plain - theirs).abs().max()


def check_answers(said: str) -> None:
    """A merge changes no answer; the base alone answers something else than with either adapter."""
    base, unmerged, merged, other = ast.literal_eval(said.splitlines()[-1])
    assert unmerged == merged
    assert base not in (unmerged, other)


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "training.json").read_text("utf-8"))["result"]
    return result


def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    return found
