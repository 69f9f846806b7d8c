"""ONNX models that are wrong, each in one way: exports of wrong checkpoints, and wrong graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from loracle.export.unmerged import export_unmerged
from loracle.export.verification.verdict import Verdict

from . import graph_faults, graphs, merges, sabotage
from .case import Case, Maker
from .honest import OUTPUTS, PRODUCTS, at_once, exported, kept
from .sabotage import K0, NORM, Q0, Q1, UP0, V0, V1, Fault
from .subjects import Subject
from .wrong import EXACT, FLOAT32, MERGE_AGAIN, ONCE, RESTORE, SCALE, WHICH, root_of_rank


def of_fault(fault: Fault, export: graphs.Export) -> Maker:
    """What an exporter makes of a wrong checkpoint."""
    return lambda subject, out: export(
        sabotage.sabotaged(subject, out.with_name(f"{out.name} wrong"), fault), out
    )


def edited(make: Maker, edit: Callable[[Path], None]) -> Maker:
    """A candidate edited in place."""

    def made(subject: Subject, out: Path) -> Path:
        edit(make(subject, out))
        return out

    return made


def _left_beside_its_merge(subject: Subject, out: Path) -> Path:
    merged = merges.by_loracle(subject.base, subject.adapter, out.with_name(f"{out.name} merged"))
    return graphs.by_genai(merged, out, adapter=subject.adapter)


def _left_alone(subject: Subject, out: Path) -> Path:
    export_unmerged(subject.base, subject.adapter, out)
    return out


def _merged_and_left(subject: Subject, out: Path) -> Path:
    merged = merges.by_loracle(subject.base, subject.adapter, out.with_name(f"{out.name} merged"))
    export_unmerged(merged, subject.adapter, out)
    return out


EXPORTERS: dict[str, graphs.Export] = {
    "loracle export": graphs.by_loracle,
    "genai builder": graphs.by_genai,
    "torch.onnx.export": graphs.by_torch,
}
RIGHT: dict[str, Maker] = {
    "loracle export": kept("exported", at_once(graphs.by_loracle)),
    "genai builder": kept("built", exported(merges.by_loracle, graphs.by_genai)),
}


def graph_of(
    name: str,
    fault: Fault,
    merged: Verdict | None = None,
    *,
    named: dict[str, Verdict] | None = None,
    others: Verdict = Verdict.UNTOUCHED,
    passes: bool = False,
    failing: tuple[str, ...] = (OUTPUTS,),
    advice: str = MERGE_AGAIN,
    tools: tuple[str, ...] = ("loracle export", "genai builder"),
) -> list[Case]:
    """A case of each exporter given a wrong checkpoint."""
    return [
        Case(
            f"{name}, exported",
            tool,
            FLOAT32,
            of_fault(fault, EXPORTERS[tool]),
            EXACT if merged is None else (merged,),
            passes,
            advice,
            (others,),
            {weight: (verdict,) for weight, verdict in (named or {}).items()},
            failing,
        )
        for tool in tools
    ]


def _graph_fault(
    name: str, tool: str, edit: Callable[[Path], None], failing: tuple[str, ...], advice: str
) -> Case:
    return Case(name, tool, FLOAT32, edited(RIGHT[tool], edit), EXACT, False, advice, failing=failing)


NODES = "node for node"
"""A part of the name of the check of a graph of loracle's."""
REBUILD = "export again; the weights are right and the graph is not"

GRAPHS = [
    *graph_of(
        "delta missing in one layer",
        sabotage.missing_in_one_layer,
        named={V1: Verdict.MISSING},
        tools=tuple(EXPORTERS),
    ),
    *graph_of("the base", sabotage.missing_everywhere, Verdict.MISSING),
    *graph_of("delta twice", lambda parts: parts.times(2), Verdict.TWICE, advice=ONCE),
    *graph_of(
        "scaling alpha / sqrt(r)",
        partial(sabotage.scaled, by=root_of_rank),
        Verdict.OTHER_SCALING,
        advice=SCALE,
    ),
    *graph_of("another adapter", sabotage.another_adapter, Verdict.OTHER_ADAPTER, advice=WHICH),
    *graph_of(
        "delta transposed",
        sabotage.transposed,
        named=dict.fromkeys((Q0, Q1), Verdict.TRANSPOSED),
        tools=tuple(EXPORTERS),
    ),
    *graph_of(
        "two layers' weights exchanged",
        sabotage.layers_exchanged,
        named=dict.fromkeys((Q0, Q1), Verdict.UNEXPLAINED),
        tools=("loracle export",),
    ),
    *graph_of(
        "key and value exchanged",
        sabotage.key_and_value_exchanged,
        named={K0: Verdict.CHANGED, V0: Verdict.UNEXPLAINED},
        tools=("loracle export",),
    ),
    # In a graph of others weights are found by content, wherever they are.
    *graph_of(
        "two layers' weights exchanged",
        sabotage.layers_exchanged,
        failing=(PRODUCTS, OUTPUTS),
        tools=("genai builder",),
    ),
    *graph_of(
        "key and value exchanged",
        sabotage.key_and_value_exchanged,
        failing=(PRODUCTS, OUTPUTS),
        tools=("genai builder",),
    ),
    *graph_of(
        "an untouched weight cast through bfloat16",
        sabotage.untouched_through_bfloat16,
        named={UP0: Verdict.ROUNDED_TWICE},
        advice=RESTORE,
    ),
    *graph_of("a norm replaced", sabotage.norm_of_ones, named={NORM: Verdict.CHANGED}, advice=RESTORE),
    Case(
        "last bit of one entry flipped in a merged weight",
        "loracle export",
        FLOAT32,
        edited(
            RIGHT["loracle export"],
            partial(graph_faults.last_bit_flipped, part="layers.1.self_attn.q_proj"),
        ),
        EXACT,
        False,
        "copy the file again: `loracle export` rounds correctly",
        named={V1: (Verdict.WITHIN_ULPS,)},
    ),
    Case(
        "last bit of one entry flipped in a merged weight",
        "genai builder",
        FLOAT32,
        edited(
            RIGHT["genai builder"],
            partial(graph_faults.last_bit_flipped, part="layers.1.attn.qkv_proj"),
        ),
        EXACT,
        True,
        "`--exact` rejects it",
        named={V1: (Verdict.WITHIN_ULPS,)},
    ),
    Case(
        "NaN in a merged weight",
        "genai builder",
        FLOAT32,
        edited(
            RIGHT["genai builder"],
            partial(graph_faults.not_a_number, part="layers.1.attn.qkv_proj"),
        ),
        EXACT,
        False,
        MERGE_AGAIN,
        named={V1: (Verdict.NOT_FINITE,)},
        failing=(OUTPUTS,),
    ),
    _graph_fault(
        "a wrong epsilon in one norm", "loracle export", graph_faults.other_epsilon, (NODES, OUTPUTS), REBUILD
    ),
    _graph_fault(
        "a wrong epsilon in one norm", "genai builder", graph_faults.other_epsilon, (OUTPUTS,), REBUILD
    ),
    _graph_fault(
        "a residual dropped", "loracle export", graph_faults.residual_dropped, (NODES, OUTPUTS), REBUILD
    ),
    _graph_fault("a residual dropped", "genai builder", graph_faults.residual_dropped, (OUTPUTS,), REBUILD),
    _graph_fault(
        "one product in float16",
        "loracle export",
        graph_faults.one_product_in_float16,
        (NODES, OUTPUTS),
        REBUILD,
    ),
    _graph_fault(
        "one product in float16", "genai builder", graph_faults.one_product_in_float16, (OUTPUTS,), REBUILD
    ),
    Case(
        "the adapter left in the graph, not merged",
        "loracle",
        FLOAT32,
        _left_alone,
        (Verdict.MISSING,),
        False,
        "merge, and export the merge",
        failing=(NODES,),
    ),
    Case(
        "the adapter merged, and left in the graph too",
        "loracle",
        FLOAT32,
        _merged_and_left,
        EXACT,
        False,
        "export the merged checkpoint without the adapter",
        failing=(NODES, OUTPUTS),
    ),
    Case(
        "the adapter merged, and left in the graph too",
        "genai builder, `adapter_path`",
        FLOAT32,
        _left_beside_its_merge,
        EXACT,
        False,
        "build from the merged checkpoint without `adapter_path`",
        failing=(PRODUCTS, OUTPUTS),
    ),
]
