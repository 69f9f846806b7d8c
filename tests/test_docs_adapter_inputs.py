"""docs/adapter-inputs.md does what it says: its boxes run in order, and answer as the merged models."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_fixtures import make_adapter, make_model
from test_docs import blocks_of

from loracle.export import DecoderSession, export, greedy

PAGE = Path(__file__).parent.parent / "docs/adapter-inputs.md"
TOKENS = [5, 77, 30, 12]
COUNT = 8


def test_the_page_s_programs_answer_as_the_merged_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # the shell's `loracle` is this interpreter's
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    make_model(Path("base"))
    make_adapter(Path("french"), Path("base"))
    make_adapter(Path("german"), Path("base"), ("v_proj", "gate_proj"), r=2, seed=2)
    page: dict[str, Any] = {}
    for block in blocks_of(PAGE.read_text()):
        if block.language == "sh":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True)
        else:
            exec(compile(block.text, str(PAGE), "exec"), page)
    for name in ("french", "german", None):
        export("base", f"baked {name}", name)
        expected = [token for token, _ in greedy(DecoderSession(f"baked {name}", 40), TOKENS, COUNT)]
        assert [int(token) for token in page["generate"](TOKENS, COUNT, name)] == expected
        feeds = {
            entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
            for entry in page["session"].get_inputs()
            if entry.name.startswith("past_key_values")
        }
        feeds |= {"input_ids": np.array([TOKENS]), "attention_mask": np.ones((1, len(TOKENS)), np.int64)}
        assert int(page["logits"](feeds, name)[0, -1].argmax()) == expected[0]
