"""A merged checkpoint: the base's layout, the merge's numbers, in little memory, whole or not at all."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import (
    BFLOAT16,
    Q0,
    V0,
    peft_adapter,
    random_array,
    small_adapter,
    small_tensors,
    tiny_llama,
    write_model,
)
from refusal import refused

from loracle.files import (
    Adapter,
    Checkpoint,
    LoraConfig,
    MergedWeights,
    merged_checkpoint,
    write_adapter,
    write_merged_checkpoint,
)
from loracle.files.safetensors_file import SafetensorsFile
from loracle.reference import DTypeError, FileError, LoracleError, NonFiniteError, TargetError, merge_exact

INDEX = "model.safetensors.index.json"


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter", small_adapter())
    return tmp_path / "adapter"


def _halves() -> list[dict[str, Any]]:
    items = list(small_tensors().items())
    return [dict(items[:3]), dict(items[3:])]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("block", [1, 60, 2**25])
def test_numbers_are_the_merges_and_the_layout_is_the_bases(
    tmp_path: Path, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch, shards: int, block: int
) -> None:
    monkeypatch.setattr(merged_checkpoint, "BLOCK_BYTES", block)
    base = write_model(tmp_path / "m", _halves() if shards == 2 else None)
    (base / "tokenizer.json").write_text("{}")
    steps: list[tuple[int, int]] = []
    result = write_merged_checkpoint(
        base, adapter_dir, tmp_path / "out", progress=lambda done, total: steps.append((done, total))
    )
    assert sorted(path.name for path in base.iterdir()) == sorted(
        path.name for path in (tmp_path / "out").iterdir()
    )
    for name in result.files:
        ours, theirs = SafetensorsFile(tmp_path / "out" / name), SafetensorsFile(base / name)
        assert ours.entries == theirs.entries
        assert ours.metadata == theirs.metadata == {"format": "pt"}
        assert (tmp_path / "out" / name).stat().st_size == (base / name).stat().st_size
    assert len(result.files) == shards
    if shards == 2:
        assert json.loads((tmp_path / "out" / INDEX).read_text()) == json.loads((base / INDEX).read_text())
    tensors, adapter = small_tensors(), small_adapter()
    with Checkpoint(tmp_path / "out") as checkpoint:
        for name, W0 in tensors.items():
            pair = adapter.pairs.get(name.removesuffix(".weight"))
            expected = W0 if pair is None else merge_exact(W0, pair.A, pair.B, pair.scaling, W0.dtype)
            assert checkpoint.tensor(name).tobytes() == expected.tobytes()
        assert result.total_bytes == checkpoint.total_bytes
    assert result.merged_names == (f"{Q0}.weight", f"{V0}.weight")
    assert result.tensors == len(tensors)
    assert result.dir == tmp_path / "out"
    assert steps[-1] == (result.total_bytes, result.total_bytes)
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert (base / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


@pytest.mark.parametrize("wanted", [np.float16, BFLOAT16, np.float64])
def test_another_dtype_is_rounded_once_and_named_in_the_configuration(
    tmp_path: Path, adapter_dir: Path, wanted: Any
) -> None:
    tensors = {"odd": np.zeros(3, np.uint8), **small_tensors()}
    base = write_model(tmp_path / "m", [tensors, {"last": np.zeros(3, np.uint8)}], {"torch_dtype": "float32"})
    result = write_merged_checkpoint(base, adapter_dir, tmp_path / "out", dtype=wanted)
    config = json.loads((base / "config.json").read_text())
    renamed = {"dtype": np.dtype(wanted).name, "torch_dtype": np.dtype(wanted).name}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, **renamed}
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == result.total_bytes
    with Checkpoint(base) as before, Checkpoint(tmp_path / "out") as after:
        merged = MergedWeights(before, small_adapter())
        assert result.total_bytes == after.total_bytes
        for name in before.names:
            kept = before.dtype(name).kind in "iu"
            expected = merged.tensor(name, None if kept else wanted)
            assert after.tensor(name).dtype == expected.dtype
            assert after.tensor(name).tobytes() == expected.tobytes()
            assert after.tensor(name).flags.aligned


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_loads_it_and_each_layer_answers_as_pefts_unmerged_one(
    tmp_path: Path, tie: bool
) -> None:
    """The exact tier: small integers and a scaling of 2, where every implementation gives the same bits."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = tiny_llama(tie_word_embeddings=tie)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
    model.save_pretrained(tmp_path / "m")
    tuned = get_integer_adapter(model, tmp_path / "adapter")
    result = write_merged_checkpoint(tmp_path / "m", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings is tie
    layers = {path: layer for path, layer in tuned.named_modules() if hasattr(layer, "lora_A")}
    assert len(layers) == len(result.merged_names) == 4
    for path, layer in layers.items():
        x = torch.randint(-4, 5, (5, layer.in_features)).float()
        plain = merged.get_submodule(path.removeprefix("base_model.model."))
        with torch.no_grad():
            assert torch.equal(plain(x), layer(x))
            assert not torch.equal(plain(x), layer.base_layer(x))
    before = model.state_dict()
    for name, tensor in merged.state_dict().items():
        if name not in result.merged_names:
            assert torch.equal(tensor, before[name])


def get_integer_adapter(model: Any, folder: Path) -> Any:
    """Give ``model`` a PEFT adapter of small integers with scaling 2, saved to ``folder``."""
    import torch

    tuned = peft_adapter(model, folder, r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randint(-4, 5, parameter.shape))
    tuned.save_pretrained(str(folder))
    return tuned


def test_without_an_adapter_the_base_is_copied(tmp_path: Path) -> None:
    base = write_model(tmp_path / "m")
    assert write_merged_checkpoint(base, None, tmp_path / "out").merged_names == ()
    with Checkpoint(tmp_path / "out") as checkpoint:
        for name, array in small_tensors().items():
            assert checkpoint.tensor(name).tobytes() == array.tobytes()


def test_equal_input_gives_equal_bytes(tmp_path: Path, adapter_dir: Path) -> None:
    base = write_model(tmp_path / "m", _halves())
    write_merged_checkpoint(base, adapter_dir, tmp_path / "one", threads=1)
    write_merged_checkpoint(base, adapter_dir, tmp_path / "two", threads=2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def _other_adapter(folder: Path) -> Path:
    config = LoraConfig(r=2, target_modules=("q_proj",))
    arrays = {Q0: (random_array((2, 7), 0), random_array((8, 2), 0))}
    write_adapter(folder, Adapter.from_arrays(config, arrays))
    return folder


def test_wrong_input_leaves_nothing_behind(tmp_path: Path, adapter_dir: Path) -> None:
    base = write_model(tmp_path / "m")
    huge = write_model(tmp_path / "huge", [{**small_tensors(), "x": np.array([1e30])}])
    other = _other_adapter(tmp_path / "other")
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[type[LoracleError], str, tuple[Any, ...], dict[str, Any]]] = [
        (TargetError, r"q_proj\.weight.*\(8, 6\).*\(8, 7\)", (base, other, "out"), {}),
        (FileError, "no such model folder", (tmp_path / "absent", adapter_dir, "out"), {}),
        (FileError, "no such adapter folder", (base, tmp_path / "absent", "out"), {}),
        (FileError, "exists and is not empty", (base, adapter_dir, "m"), {}),
        (DTypeError, "dtype: expected one of", (base, adapter_dir, "out"), {"dtype": np.int8}),
        (
            NonFiniteError,
            r"^x: 1e\+30 at \(0,\) overflows",
            (huge, adapter_dir, "out"),
            {"dtype": np.float16},
        ),
    ]
    for error, message, (model, adapter, out), options in cases:
        with pytest.raises(error, match=message):
            write_merged_checkpoint(model, adapter, tmp_path / out, **options)
        assert sorted(tmp_path.rglob("*")) == before


class _Faulty:
    """A file that fails at its nth write since the test began."""

    def __init__(self, file: Any, count: list[int], error: BaseException) -> None:
        self._file, self._count, self._error = file, count, error

    def write(self, data: Any) -> Any:
        self._count[0] -= 1
        if self._count[0] == 0:
            self._file.write(bytes(data)[: len(data) // 2])  # half of it reaches the disk
            raise self._error
        return self._file.write(data)

    def __enter__(self) -> "_Faulty":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_write_leaves_nothing_behind(
    tmp_path: Path, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    base = write_model(tmp_path / "m", _halves())
    (base / "tokenizer.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    real = Path.open
    count = [0]

    def faulty(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = real(self, mode, *arguments, **options)
        return _Faulty(file, count, error) if mode.startswith("x") else file

    monkeypatch.setattr(Path, "open", faulty)
    failures, messages = 0, set()
    for nth in range(1, 100):
        count[0] = nth
        try:
            write_merged_checkpoint(base, adapter_dir, tmp_path / "out")
        except (FileError, KeyboardInterrupt) as caught:
            messages.add(str(caught))
            failures += 1
            assert sorted(tmp_path.rglob("*")) == before
        else:
            break
    # two headers, six tensors, two copied files and an index
    assert failures == 11
    assert (tmp_path / "out" / INDEX).exists()
    expected = (
        f"{tmp_path / 'out'}: disk full (No space left on device); free some space, nothing was written"
    )
    assert messages == ({""} if isinstance(error, KeyboardInterrupt) else {expected})


def test_a_disk_without_room_is_refused(
    tmp_path: Path, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_model(tmp_path / "m", _halves())
    write_merged_checkpoint(base, adapter_dir, tmp_path / "whole")
    with Checkpoint(tmp_path / "whole") as whole:
        needed = whole.total_bytes + (base / "config.json").stat().st_size
    before = sorted(tmp_path.rglob("*"))
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 0, needed - 1))
    message = (
        f"{tmp_path}: expected {needed} bytes free, got {needed - 1}; "
        "free some space or choose another --out; nothing was written"
    )
    refused(lambda: write_merged_checkpoint(base, adapter_dir, tmp_path / "out"), FileError, message)
    assert sorted(tmp_path.rglob("*")) == before


MEASURED = """
import sys
from loracle.files import write_merged_checkpoint

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

peaks = []
write_merged_checkpoint(sys.argv[1], sys.argv[2], sys.argv[1] + ".warm", threads=2)
before, mapped = status("RssAnon"), status("VmHWM")
write_merged_checkpoint(
    sys.argv[3], sys.argv[4], sys.argv[5], threads=2,
    progress=lambda done, total: peaks.append(status("RssAnon") - before),
)
print(max(peaks), status("VmHWM") - mapped)
"""


def test_memory_stays_far_below_the_size_of_one_tensor(tmp_path: Path, adapter_dir: Path) -> None:
    path, shape = "model.layers.0.self_attn.q_proj", (50_000, 1024)
    total = shape[0] * shape[1] * 4
    big = write_model(tmp_path / "big", [{f"{path}.weight": np.full(shape, 0.5, np.float32)}])
    arrays = {path: (random_array((4, shape[1]), 0), random_array((shape[0], 4), 1))}
    write_adapter(tmp_path / "bigger", Adapter.from_arrays(LoraConfig(r=4), arrays))
    small = write_model(tmp_path / "m")
    arguments = [MEASURED, small, adapter_dir, big, tmp_path / "bigger", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    anonymous, resident = map(int, done.stdout.split())
    # the merged block of 32 MiB, merge's own limit of 64 MiB, and 4 MiB for the adapter and the allocator
    allowed = (32 + 64 + 4) * 2**20
    assert anonymous < allowed < total / 1.9
    # the same plus the mapped block that is merged, and as much again that the system reads ahead
    assert resident < allowed + 2 * 32 * 2**20 < total, "pages are let go when they are written"
