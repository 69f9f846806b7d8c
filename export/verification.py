"""`verify`: is this ONNX folder, or this checkpoint, exactly that base model with that adapter merged?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from loracle.files import Checkpoint, MergedWeights, read_adapter
from loracle.reference import FileError

from .architecture import check_supported
from .candidate import Candidate, open_candidate
from .exporter import graph_template
from .graph_diff import first_difference
from .matching import names_in_checkpoint
from .names import GRAPH_FILE
from .outputs_check import check_outputs
from .report import Check, VerifyReport
from .template import GraphTemplate
from .text import TextModel
from .weight_check import TensorDifference, compare_tensors
from .write import Progress

PROMPTS = (
    "The capital of France is",
    "Translate the word 'house' into German:",
    "def mean(values):\n    ",
)
_NAMED = 8


def verify(
    candidate_dir: str | Path,
    model_dir: str | Path,
    adapter_dir: str | Path | None = None,
    *,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 16,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a candidate against the base model and adapter it is said to be.

    For an ONNX folder: (a) the graph is node for node the base model's; (b) every initializer is bit for bit
    the correctly rounded merge; (c) onnxruntime's logits, at the prompt and at every generated token, lie
    inside the sampled bound around the unmerged model in float64; (d) its greedy tokens are that model's, or
    the first difference is smaller than the bound explains. For a checkpoint folder: (b) alone.

    Raises:
        LoracleError: an input is missing or malformed. A failed check is in the report, not an error.
    """
    candidate_dir = Path(candidate_dir)
    with Checkpoint(model_dir) as checkpoint:
        adapter = None if adapter_dir is None else read_adapter(adapter_dir)
        weights = MergedWeights(checkpoint, adapter)
        error: float | None = None
        tolerance: float | None = None
        if (candidate_dir / GRAPH_FILE).is_file():
            task = check_supported(checkpoint.config, str(Path(model_dir) / "config.json"))
            candidate = open_candidate(candidate_dir)
            template = graph_template(checkpoint, task, candidate.dtype)
            checks = [
                _check_graph(candidate, template),
                _check_initializers(candidate, template, weights, progress),
            ]
            outputs = check_outputs(
                candidate, model_dir, adapter, _encoded(candidate_dir, prompts), new_tokens=new_tokens
            )
            checks += outputs.checks
            error, tolerance = outputs.error, outputs.tolerance
        elif any(candidate_dir.glob("*.safetensors")):
            checks = _check_checkpoint(candidate_dir, weights, progress)
        else:
            raise FileError(
                f"{candidate_dir}: expected {GRAPH_FILE} or a checkpoint in safetensors, found neither"
            )
    return VerifyReport(
        str(candidate_dir),
        str(model_dir),
        None if adapter_dir is None else str(adapter_dir),
        tuple(checks),
        error,
        tolerance,
    )


def _encoded(folder: Path, prompts: Sequence[str]) -> list[list[int]]:
    text = TextModel(folder)
    return [text.encode(prompt) for prompt in prompts]


def _check_graph(candidate: Candidate, template: GraphTemplate) -> Check:
    difference = first_difference(candidate.model, template.model, frozenset(template.aliases))
    nodes = len(list(candidate.model.graph))
    return Check(
        "graph is the base model's, node for node",
        difference is None,
        f"{nodes} nodes",
        () if difference is None else (difference,),
    )


def _check_initializers(
    candidate: Candidate,
    template: GraphTemplate,
    weights: MergedWeights,
    progress: Progress | None,
) -> Check:
    found = names_in_checkpoint(template, weights)
    held = candidate.model.graph.initializers
    absent = [name for name in found if name not in held or held[name].const_value is None]
    shaped = {
        name: source
        for name, source in found.items()
        if name not in absent
        and candidate.tensor(name).shape == tuple(weights.shape(source))
        and candidate.tensor(name).dtype == candidate.dtype
    }
    failures = [f"{name}: expected among the initializers, found none" for name in absent]
    failures += [
        f"{name}: expected shape {weights.shape(found[name])} in {candidate.dtype}, "
        f"got {candidate.tensor(name).shape} in {candidate.tensor(name).dtype}"
        for name in found
        if name not in shaped and name not in absent
    ]
    differences = compare_tensors(
        candidate.tensor,
        shaped.items(),
        weights,
        frozenset(weights.merged_names),
        candidate.dtype,
        weights.base_tensor,
        progress,
    )
    return _bits_check(
        "initializers are the correctly rounded merge", found.keys(), weights, failures, differences
    )


def _check_checkpoint(folder: Path, weights: MergedWeights, progress: Progress | None) -> list[Check]:
    with Checkpoint(folder) as candidate:
        want, got = set(weights.names), set(candidate.names)
        failures = [f"{name}: expected in the checkpoint, found none" for name in sorted(want - got)]
        failures += [f"{name}: not in the merged model" for name in sorted(got - want)]
        common = []
        for name in sorted(want & got):
            if candidate.shape(name) != weights.shape(name) or candidate.dtype(name) != weights.dtype(name):
                failures.append(
                    f"{name}: expected {weights.shape(name)} {weights.dtype(name)}, "
                    f"got {candidate.shape(name)} {candidate.dtype(name)}"
                )
            else:
                common.append((name, name))
        differences = compare_tensors(
            candidate.tensor,
            common,
            weights,
            frozenset(weights.merged_names),
            None,
            weights.base_tensor,
            progress,
        )
        return [
            _bits_check(
                "checkpoint's tensors are the correctly rounded merge", want, weights, failures, differences
            )
        ]


def _bits_check(
    name: str,
    tensors: Collection[str],
    weights: MergedWeights,
    failures: list[str],
    differences: Sequence[TensorDifference],
) -> Check:
    lines = failures + [str(difference) for difference in differences]
    if len(lines) > _NAMED:
        lines = [*lines[:_NAMED], f"and {len(lines) - _NAMED} more tensors"]
    return Check(
        name,
        not lines,
        f"{len(tensors)} tensors, {len(weights.merged_names)} merged, bit for bit",
        tuple(lines),
    )
