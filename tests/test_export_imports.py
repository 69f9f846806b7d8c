"""What an export must not import: with the graph in the cache, merging and writing need no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from export_fixtures import make_adapter, make_model

from loracle.export import export


def test_an_export_with_the_graph_cached_imports_no_torch(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    export(base, tmp_path / "first")
    script = (
        "import sys\n"
        "import loracle.cli.commands.export\n"
        "from loracle.export import export\n"
        f"export({str(base)!r}, {str(tmp_path / 'second')!r}, {str(adapter)!r})\n"
        "heavy = ('torch', 'transformers', 'onnxscript', 'loracle.torch_impl')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    graphs = [(tmp_path / name / "model.onnx").read_bytes() for name in ("first", "second")]
    assert graphs[0] == graphs[1]
