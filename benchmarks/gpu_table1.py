"""The paper's Table 1 in torch: a forward pass of GPT-2 medium, adapted in each way, over full fine-tuning's.

Random weights, float16, no cache, the logits of every token, as `benchmarks.evidence_bench --provider cuda`
has it in onnxruntime. AdapterH and AdapterL follow the formulas of
arXiv 2106.09685, section 5.1, with its numbers of parameters; LoRA is on the weight that holds query, key and
value, with as many.

First parity: with updates of zero every way must be as near to the model in float64 as full fine-tuning is.
Then time, by the device's own clock: F X X F Y Y F ..., of which every second round goes backwards; the
figure is the median of (X + X) / (F + F) with full fine-tuning's passes beside it. The control is a second
full fine-tuning.

    python -m benchmarks.gpu_table1 [--quick] [--device cuda] [--rounds 50]
        [--out benchmarks/results/gpu-table1.json]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from loracle.export.bench.methods import ADAPTER_H, ADAPTER_L, CONTROL, FULL, LABELS, MERGED, UNMERGED
from loracle.export.bench.models import GPT2
from loracle.export.bench.paper import MODEL, paper_ratio
from loracle.export.bench.settings import Setting, parse_settings
from loracle.export.bench.sizes import adapter_h_parameters, adapter_l_parameters, nearest_rank
from loracle.torch_impl import LoraConfig, inject, merge

from .gpu_interleaved import in_turn
from .gpu_machine import describe_device, require_cuda, write_result
from .gpu_options import parsed, parser_of
from .intervals import median_interval, ratio_text
from .tables import plain_table
from .train_step_parity import FACTOR
from .train_step_subjects import shared_copy

PEFT_UNMERGED = "lora-unmerged-peft"
WAYS = (CONTROL, MERGED, UNMERGED, PEFT_UNMERGED, ADAPTER_H, ADAPTER_L)
NAMES = {**LABELS, PEFT_UNMERGED: "LoRA, unmerged, PEFT"}
QUERY_KEY_VALUE = "c_attn"
WARM_PASSES = 3
QUICK_SETTINGS = "1x16,2x8"


class Bottleneck(nn.Module):
    """``h + W_up f(W_down n(h) + b) + b'``: f the GELU and n nothing (AdapterH), or the ReLU and a layer norm
    (AdapterL)."""

    def __init__(self, hidden: int, rank: int, *, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden) if normed else nn.Identity()
        self.down = nn.Linear(hidden, rank)
        self.f = nn.ReLU() if normed else nn.GELU()
        self.up = nn.Linear(rank, hidden)

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., hidden) to (..., hidden)."""
        result: Tensor = h + self.up(self.f(self.down(self.norm(h))))
        return result


def add_bottlenecks(model: Any, rank: int, *, normed: bool) -> Any:
    """Put adapters before the residual additions: AdapterL after the MLP, AdapterH after the attention too.

    Between those layers and the addition there is a dropout, which a model that does not train has not.
    """
    like = model.transformer.wte.weight
    for block in model.transformer.h:
        for part in (block.mlp,) if normed else (block.attn, block.mlp):
            own = Bottleneck(model.config.n_embd, rank, normed=normed).to(like.device, like.dtype)
            part.c_proj = nn.Sequential(part.c_proj, own)
    return model


@dataclass(frozen=True)
class Way:
    """A model adapted in some way.

    Attributes:
        forward: from token ids (batch, length) to logits (batch, length, vocabulary).
        parameters: that the way adds and trains; None where it trains the model's own.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    parameters: int | None


def lora_rank(config: Any, budget: float) -> int:
    """The rank whose A and B of all layers have as many numbers."""
    hidden = config.n_embd
    return nearest_rank(lambda rank: config.n_layer * rank * (hidden + 3 * hidden), budget)


def way_of(name: str, base: Any, budget: float, *, zero: bool) -> Way:
    """Adapt new modules around the base's weights.

    Args:
        name: of `WAYS`, or `FULL`.
        base: in evaluation mode; it is not changed.
        budget: parameters that the way has, as nearly as its rank allows.
        zero: whether the updates are zero; random otherwise.
    """
    model = shared_copy(base)
    config = base.config
    before = {id(parameter) for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(0)
        if name == ADAPTER_H:
            rank = nearest_rank(partial(adapter_h_parameters, config.n_layer, config.n_embd), budget)
            model = add_bottlenecks(model, rank, normed=False)
        elif name == ADAPTER_L:
            rank = nearest_rank(partial(adapter_l_parameters, config.n_layer, config.n_embd), budget)
            model = add_bottlenecks(model, rank, normed=True)
        elif name in (MERGED, UNMERGED):
            rank = lora_rank(config, budget)
            own = LoraConfig(r=rank, lora_alpha=rank, target_modules=(QUERY_KEY_VALUE,), fan_in_fan_out=True)
            inject(model, own)
        elif name == PEFT_UNMERGED:
            rank = lora_rank(config, budget)
            theirs = peft.LoraConfig(
                r=rank, lora_alpha=rank, target_modules=[QUERY_KEY_VALUE], fan_in_fan_out=True
            )
            model = peft.get_peft_model(model, theirs)
    model.eval().requires_grad_(False)
    added = [(path, own) for path, own in model.named_parameters() if id(own) not in before]
    _fill([own for path, own in added if "lora_B" in path or ".up." in path], zero=zero)
    if name == MERGED:
        merge(model)
    parameters = None if name in (FULL, CONTROL, MERGED) else sum(own.numel() for _, own in added)

    def forward(tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits

    return Way(name, forward, parameters)


def _fill(parameters: Sequence[Tensor], *, zero: bool) -> None:
    for parameter in parameters:
        generator = torch.Generator(parameter.device).manual_seed(1)
        parameter.data.normal_(0.0, 0.0 if zero else 0.02, generator=generator)


def check_parity(base: Any, budget: float, tokens: Tensor) -> dict[str, float]:
    """The relative error of each way whose update is zero, against the model in float64.

    Raises SystemExit where one is more than `FACTOR` times that of full fine-tuning.
    """
    double = copy.deepcopy(base).double()
    truth = way_of(FULL, double, budget, zero=True).forward(tokens)
    errors = {}
    for name in (FULL, *WAYS):
        own = way_of(name, base, budget, zero=True).forward(tokens).double()
        errors[name] = float((own - truth).norm() / truth.norm())
        limit = FACTOR * max(errors[FULL], torch.finfo(base.dtype).eps / 2)
        if not errors[name] <= limit:
            raise SystemExit(
                f"{NAMES[name]}: expected the model's logits with an update of zero, within {limit:.1e}, "
                f"got an error of {errors[name]:.1e}"
            )
    return errors


def measure(base: Any, setting: Setting, rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each way, full fine-tuning first."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.length)
    tokens = torch.randint(base.config.vocab_size, shape, generator=generator).to(device)
    check_parity(base, setting.parameters, tokens[:1])
    ways = {name: way_of(name, base, setting.parameters, zero=False) for name in (FULL, *WAYS)}
    for way in ways.values():
        for _ in range(WARM_PASSES):
            way.forward(tokens)
    calls = {name: partial(way.forward, tokens) for name, way in ways.items()}
    seconds, ratios = in_turn(calls, rounds, device)
    return [
        {
            "batch": setting.batch,
            "length": setting.length,
            "way": name,
            "parameters": way.parameters,
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(ratios[name]) if name in ratios else None,
            "interval": median_interval(ratios[name]) if name in ratios else None,
            "ratios": ratios.get(name),
            "paper": paper_ratio(setting.batch, setting.length, name),
        }
        for name, way in ways.items()
    ]


def model_of(device: str, *, quick: bool) -> Any:
    """GPT-2 medium with seeded weights, float16; a quick one of two layers, and float32 on the CPU."""
    shape: Mapping[str, int] = {"n_embd": 64, "n_layer": 2, "n_head": 4} if quick else GPT2[MODEL]
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT2LMHeadModel(GPT2Config(**shape))
    return model.to(dtype).eval().requires_grad_(False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, quick="two layers, two rounds: does it run?", rounds=50)
    arguments = parsed(parser, argv, "gpu-table1.json")
    if arguments.quick:
        arguments.rounds = 2
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    require_cuda(arguments.device)
    base = model_of(arguments.device, quick=arguments.quick)
    settings = parse_settings(QUICK_SETTINGS if arguments.quick else "paper", base.num_parameters())
    result: dict[str, Any] = {
        "machine": describe_device(arguments.device),
        "model": "a small GPT-2" if arguments.quick else MODEL,
        "layers": base.config.n_layer,
        "dtype": str(base.dtype).removeprefix("torch."),
        "rounds": arguments.rounds,
        "rows": [],
    }
    say = Console(stderr=True).print
    for setting in settings:
        say(setting.name)
        result["rows"] += measure(base, setting, arguments.rounds, arguments.device)
    write_result(arguments.out, result)
    Console(width=120).print(table_of(result))


def table_of(result: Mapping[str, Any]) -> Any:
    """The result for a person."""
    table = plain_table(
        f"a forward pass of {result['model']}, {result['layers']} layers, {result['dtype']}, in torch",
        ("batch x length", "way", "parameters", "ms", "over full fine-tune", "paper"),
    )
    rows = result["rows"]
    for at, row in enumerate(rows):
        place = row["batch"], row["length"]
        table.add_row(
            f"{row['batch']} x {row['length']}",
            NAMES[row["way"]],
            "" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f}M",
            f"{1e3 * row['seconds']:.2f}",
            ratio_text(row["ratio"], row["interval"]),
            "" if row["paper"] is None else f"{row['paper']:.3f}",
            end_section=at + 1 == len(rows) or place != (rows[at + 1]["batch"], rows[at + 1]["length"]),
        )
    return table


if __name__ == "__main__":
    main()
