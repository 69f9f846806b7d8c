"""The same of a real model: SmolLM2-135M-Instruct."""

from __future__ import annotations

from functools import partial

from loracle.export.verification.verdict import Verdict

from . import graphs, merges, sabotage
from .case import Case
from .honest import CLOSE, ROUNDED, USE, at_once, checkpoint, exported
from .sabotage import UP0, V1
from .wrong import MERGE_AGAIN, ONCE, RESTORE, SCALE, root_of_rank, with_fault

REAL = "SmolLM2-135M"
_EXACT = (Verdict.EXACT,)

CASES = [
    Case("merged", "loracle merge", (REAL,), checkpoint(merges.by_loracle), _EXACT, True, USE),
    Case("merged and exported", "loracle export", (REAL,), at_once(graphs.by_loracle), _EXACT, True, USE),
    Case("merged", "PEFT, `merge_and_unload()`", (REAL,), checkpoint(merges.by_peft), ROUNDED, True, CLOSE),
    Case(
        "base loaded in bfloat16, merged",
        "PEFT, `merge_and_unload()`",
        (REAL,),
        checkpoint(partial(merges.by_peft, dtype="bfloat16")),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "exported by the genai builder",
        "PEFT",
        (REAL,),
        exported(merges.by_peft, graphs.by_genai),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "exported by Optimum",
        "PEFT",
        (REAL,),
        exported(merges.by_peft, graphs.by_optimum),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "delta missing in one layer",
        "by hand",
        (REAL,),
        with_fault(sabotage.missing_in_one_layer),
        _EXACT,
        False,
        MERGE_AGAIN,
        named={V1: (Verdict.MISSING,)},
    ),
    Case("delta twice", "by hand", (REAL,), sabotage.merged_twice, (Verdict.TWICE,), False, ONCE),
    Case(
        "scaling alpha / sqrt(r) for alpha / r",
        "by hand",
        (REAL,),
        with_fault(partial(sabotage.scaled, by=root_of_rank)),
        (Verdict.OTHER_SCALING,),
        False,
        SCALE,
    ),
    Case(
        "an untouched weight one ulp off in one entry",
        "by hand",
        (REAL,),
        with_fault(partial(sabotage.last_bit_flipped, name=UP0)),
        _EXACT,
        False,
        RESTORE,
        named={UP0: (Verdict.CHANGED,)},
    ),
]
