import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

HERE = Path(__file__).parent


def run_pytest(folder, *, cuda, gpu_test):
    """Run pytest on a small test folder with this conftest and a stand-in for torch; return its output."""
    (folder / "conftest.py").write_text((HERE / "conftest.py").read_text())
    if cuda is None:
        (folder / "torch.py").write_text("raise ImportError('not installed')")
    else:
        (folder / "torch.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {cuda})\n")
    mark = "@pytest.mark.gpu\n" if gpu_test else ""
    (folder / "test_it.py").write_text(
        f"import sys, pytest\n{mark}def test_marked(): pass\n"
        "def test_plain(): print('torch was', 'imported' if 'torch' in sys.modules else 'left alone')\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "/dev/null",
        "-rs",
        "-s",
        "-p",
        "no:cacheprovider",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("cuda", "outcome"), [(True, "2 passed"), (False, "1 passed, 1 skipped"), (None, "1 skipped")]
)
def test_gpu_tests_run_only_where_there_is_a_gpu(tmp_path, cuda, outcome):
    output = run_pytest(tmp_path, cuda=cuda, gpu_test=True)
    assert outcome in output
    assert ("needs a CUDA device" in output) == (not cuda)


def test_torch_is_not_imported_for_tests_that_need_no_gpu(tmp_path):
    output = run_pytest(tmp_path, cuda=True, gpu_test=False)
    assert "2 passed" in output
    assert "torch was left alone" in output


def test_hypothesis_is_deterministic():
    assert settings().derandomize
    assert settings().deadline is None
    assert settings().database is None
