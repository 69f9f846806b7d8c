"""Two processes learn what one learns from the batches of both, end together, and write once.

The bound: gradients that are summed in another order differ by rounding noise, which AdamW can make larger
where a gradient is near zero. How much is sampled, as for logits in clause 7 of the numeric contract: one
process trains from the same batches row by row with noise of the a-priori size of the rounding errors added
to every gradient, with several seeds; the tolerance is twice the largest deviation that this makes.
"""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_runs import LEARNING, ROWS, launch, outcome
from torch import Tensor, nn
from torch_fixtures import tiny_llama, upper_pairs, write_lines, write_model

from loracle.files import read_adapter
from loracle.reference import ConfigError, product_noise, unit_roundoff
from loracle.torch_impl import FinetuneOptions, finetune
from loracle.torch_impl.distributed import blocks_of, joined
from loracle.torch_impl.optimizer import AdapterOptimizer, trained_parameters

SEEDS = range(4)
EXACT = ("replicated", "sharded", "accumulated", "accumulated and sharded", "checkpointed and sharded")
WRONG = ("wrong divisor", "same data")
OTHERS = ("bfloat16", "bfloat16 sharded", "one missing", "one other", "diverging")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data of unequal lengths and unequal labels, and what two processes made of every scenario."""
    made = tmp_path_factory.mktemp("distributed")
    write_model(made / "model")
    half = tiny_llama().to(torch.bfloat16)
    write_model(made / "half")
    half.save_pretrained(made / "half")
    write_lines(made / "data.jsonl", upper_pairs(23))
    write_lines(made / "other.jsonl", upper_pairs(22))
    assert launch(made, *EXACT, *WRONG, *OTHERS) == [0, 0]
    return made


def trained(folder: Path) -> dict[str, np.ndarray]:
    """The matrices of an adapter by name."""
    pairs = read_adapter(folder).pairs
    return {f"{path}.{part}": getattr(pair, part) for path, pair in pairs.items() for part in "AB"}


def deviation(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert set(one) == set(other)
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def alone(folder: Path, out: Path, **changes: Any) -> dict[str, np.ndarray]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = {"model": str(folder / "model"), "data": folder / "data.jsonl", "out": out}
        finetune(FinetuneOptions(**{**settings, **LEARNING, "batch_size": ROWS, **changes}))
    finally:
        torch.set_num_threads(threads)
    return trained(out)


def noisy(folder: Path, out: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Train from the same batches a row at a time, with rounding noise on each gradient.

    A gradient is a sum over the rows' tokens of products along a path of layers: k is the tokens and the
    lengths of all products on the path, the energy that of the rows' gradients.
    """
    energy: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    config = tiny_llama().config
    layer = 2 * (2 * config.hidden_size + config.intermediate_size + 2 * config.num_attention_heads)
    k = ROWS * 32 + config.num_hidden_layers * layer + config.vocab_size
    u = unit_roundoff("float32")
    start, step = AdapterOptimizer.__init__, AdapterOptimizer.step

    def count(total: Tensor, gradient: Tensor) -> None:
        total += gradient**2

    def watched(self: AdapterOptimizer, model: nn.Module, *arguments: Any) -> None:
        start(self, model, *arguments)
        for name, parameter in trained_parameters(model).items():
            energy[name] = torch.zeros_like(parameter)
            parameter.register_hook(partial(count, energy[name]))

    def disturbed(self: AdapterOptimizer, factor: float) -> None:
        for name, parameter in self._names.items():
            assert parameter.grad is not None
            size = product_noise(k, u, energy[name].sqrt().numpy())
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad += (noise * torch.from_numpy(np.asarray(size))).float()
            energy[name].zero_()
        step(self, factor)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterOptimizer, "__init__", watched)
        patch.setattr(AdapterOptimizer, "step", disturbed)
        return alone(folder, out, batch_size=1, gradient_accumulation=ROWS)


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, np.ndarray]:
    return alone(folder, folder / "alone")


@pytest.fixture(scope="module")
def tolerance(folder: Path, single: dict[str, np.ndarray]) -> float:
    with pytest.MonkeyPatch.context() as patch:
        runs = [noisy(folder, folder / f"noisy {seed}", seed, patch) for seed in SEEDS]
    return 2 * max(deviation(single, run) for run in runs)


@pytest.mark.parametrize("name", EXACT)
def test_two_learn_what_one_does(
    folder: Path, single: dict[str, np.ndarray], tolerance: float, name: str
) -> None:
    moved = deviation(single, trained(folder / name))
    print(f"{name}: deviation over tolerance {moved / tolerance:.3f}")
    assert moved <= tolerance
    (losses, others) = (one["losses"] for one in outcome(folder, name))
    assert losses == others
    assert len(losses) == 20


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mean_and_one_half_twice_are_far_outside(
    folder: Path, single: dict[str, np.ndarray], tolerance: float, name: str
) -> None:
    assert deviation(single, trained(folder / name)) > 10 * tolerance


def test_sharding_changes_no_bit_beside_a_bfloat16_base(folder: Path) -> None:
    """A block gathers bfloat16 weights and float32 adapters; a policy that casts adapters would show."""
    whole, parts = trained(folder / "bfloat16"), trained(folder / "bfloat16 sharded")
    assert {array.dtype for array in parts.values()} == {np.dtype(np.float32)}
    assert any(array.any() for name, array in whole.items() if name.endswith(".B"))
    assert deviation(whole, parts) <= 2e-2 * max(float(np.abs(array).max()) for array in whole.values())


def test_the_first_writes_and_reports_and_no_other(folder: Path) -> None:
    first, second = outcome(folder, "replicated")
    assert (first["world_size"], first["seen"], second["seen"]) == (2, 21, 0)
    assert not [path for path in folder.iterdir() if path.name.endswith((".partial", ".checkpoints"))]
    files = sorted(path.name for path in (folder / "sharded").iterdir())
    assert files == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.csv",
        "loss.png",
        "training.json",
    ]


@pytest.mark.parametrize(
    ("name", "kind", "messages"),
    [
        ("one missing", "FileError", ("rank 1: ", "")),
        ("one other", "ConfigError", ("data: ", "data: ")),
        ("diverging", "NonFiniteError", ("loss: ", "loss: ")),
    ],
)
def test_an_error_of_one_is_an_error_of_all(
    folder: Path, name: str, kind: str, messages: tuple[str, str]
) -> None:
    for left, start in zip(outcome(folder, name), messages, strict=True):
        assert left["error"] == kind
        assert left["message"].startswith(start)
    assert not (folder / name).exists()


@pytest.mark.slow
def test_killed_and_resumed_it_ends_in_the_same_bytes(folder: Path) -> None:
    assert launch(folder, "resumed", kill_at=5) == [-signal.SIGKILL, -signal.SIGKILL]
    assert [path.name for path in (folder / "resumed.checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    assert launch(folder, "resumed", "resumed whole") == [0, 0]
    for name in ("adapter_model.safetensors", "loss.csv"):
        assert (folder / "resumed" / name).read_bytes() == (folder / "resumed whole" / name).read_bytes()


def test_a_crash_of_one_ends_all_under_torchrun(tmp_path: Path) -> None:
    """The launcher ends the others; here rank 1 dies between two steps, where rank 0 waits for it."""
    write_model(tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", upper_pairs(5))
    script = tmp_path / "run.py"
    script.write_text(
        "import os\n"
        "from loracle.torch_impl import trainer\n"
        "step = trainer.AdapterTrainer._step\n"
        "def failing(self):\n"
        "    if self.curve.done == 2 and os.environ['RANK'] == '1':\n"
        "        os._exit(3)\n"
        "    return step(self)\n"
        "trainer.AdapterTrainer._step = failing\n"
        "from loracle.cli import main\n"
        "main()\n"
    )
    start = time.monotonic()
    arguments = ["--model", tmp_path / "model", "--data", data, "--out", tmp_path / "out", "--no-bf16"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script),
            *("finetune", *map(str, arguments), "--batch-size", "1"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode != 0
    assert time.monotonic() - start < 90
    assert "exitcode  : 3" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_world_of_one_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as world:
        assert (world.rank, world.size, world.main) == (0, 1, True)
        assert world.gather("x") == ["x"]
        assert world.from_main("x") == "x"
        assert world.sum(2, 0.5) == (2, 0.5)
        parameter = nn.Parameter(torch.ones(2))
        world.sum_gradients([parameter])
        assert parameter.grad is None
        with pytest.raises(ConfigError, match=r"^mine$"), world.together():
            raise ConfigError("mine")


def test_a_launcher_that_shards_by_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="expected a launch without --use_fsdp; say --fsdp"), joined():
        pass


def test_the_blocks_are_what_is_not_to_be_split() -> None:
    model = tiny_llama()
    assert blocks_of(model) == list(model.model.layers)
    plain = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    assert blocks_of(plain) == list(plain[1])
