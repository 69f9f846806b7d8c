"""Reports and certificates of made-up verifications, with names that mean harm."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from loracle.export.verification.adapter_left import AdapterLeft
from loracle.export.verification.adapter_summary import AdapterSummary
from loracle.export.verification.certificate import Certificate, certificate_of
from loracle.export.verification.digests import FileDigest, InputDigest
from loracle.export.verification.graph_summary import GraphSummary
from loracle.export.verification.quality import Quality
from loracle.export.verification.report import Check, VerifyReport
from loracle.export.verification.verdict import Verdict, WeightVerdict, Witness

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>&amp;\"'{{ 7*7 }}</style>[red]"
CONTROLS = "\x1b[2J\u202egnp.exe\r\n\x07\udc80"
"""Clears a terminal's screen, turns the direction of writing, begins a line, and is half a character."""

LORA = AdapterSummary((4,), 8, (2.0,), False, False, False, ("linear",), ("q_proj", "v_proj"), 4, 1536)
WEIGHTS_CHECK = "weights are the merge, within rounding"


def weight(
    verdict: Verdict, name: str = "w", *, passed: bool = True, unequal: int = 0, entries: int = 100
) -> WeightVerdict:
    """A verdict on a weight that the adapter changes, off by 3 ulp in so many entries."""
    said = WeightVerdict(name, verdict, passed, merged=True, entries=entries)
    if not unequal:
        return said
    ulps = ((0, entries - unequal), (4, unequal)) if unequal < entries else ((4, unequal),)
    return replace(said, unequal=unequal, ulps=ulps, witness=Witness((1, 2), 0.5, float("nan")), detail="why")


def report(*weights: WeightVerdict, checks: Sequence[Check] = (), **changes: object) -> VerifyReport:
    """What is found of some weights; without `checks` that of the weights alone."""
    wrong = tuple(str(own) for own in weights if not own.passed)
    own = (Check(WEIGHTS_CHECK, not wrong, f"{len(weights)} weights", wrong), *checks)
    made = VerifyReport("out/candidate", "base", "adapter", own, weights=weights, lora=LORA, inputs=digests())
    return replace(made, **changes)  # type: ignore[arg-type]


def digests(name: str = "model.safetensors") -> tuple[InputDigest, ...]:
    """Of a file each."""
    roles = {"base": "checkpoint", "adapter": "adapter", "candidate": "checkpoint"}
    return tuple(
        InputDigest(
            role, kind, f"some/{role}", (FileDigest(name, 12, hashlib.sha256(role.encode()).hexdigest()),)
        )
        for role, kind in roles.items()
    )


def harmful(text: str) -> Certificate:
    """A certificate that has a text wherever it may come from an input."""
    verdicts = [weight(verdict, text, passed=False, unequal=3) for verdict in Verdict]
    verdicts = [replace(own, place=text, detail=text) for own in verdicts]
    graph = GraphSummary(
        7,
        text,
        (text,) * 9,
        {text: 1},
        {text: 2},
        AdapterLeft(1, 2, (text,), {text: 2}),
        (text,),
        (text,),
        {text: 3},
    )
    found = report(
        *verdicts,
        checks=[Check(text, False, text, (text,) * 5)],
        candidate=text,
        model=text,
        adapter=text,
        graph=graph,
        lora=replace(LORA, target_modules=(text,)),
        inputs=tuple(replace(own, path=text) for own in digests(text)),
        quality=Quality(1, 0.5, 0.5, None, None),
        error=0.5,
        tolerance=0.25,
    )
    return certificate_of(found, {text: text})
