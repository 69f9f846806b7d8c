"""What result files come to beside the claims, and which are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evidence_fixtures import (
    RATIOS,
    SCORES,
    bench,
    certificate,
    everything,
    extract,
    intrinsic,
    sweep,
    write,
)

from loracle.export.bench.methods import ADAPTER_L, CONTROL, MERGED
from loracle.export.evidence.claims import claims
from loracle.export.evidence.finding import Finding, Verdict, combined
from loracle.export.evidence.folder import read_results
from loracle.reference import FileError

LATENCY, NUMBERS, RANK, FILES, DIMENSION, MERGE = range(6)
WIDE = {CONTROL: (0.7, 1.4), MERGED: (0.9, 1.1), ADAPTER_L: (0.9, 1.3)}


def found(tmp_path: Path, claim: int, document: dict[str, Any]) -> Finding:
    results = read_results(write(tmp_path, {"one.json": document}))
    (finding,) = claims(results)[claim].findings
    return finding


def test_every_command_s_document_is_found_here_and_one_level_below(tmp_path: Path) -> None:
    write(tmp_path, {**everything(), "a/b/too-deep.json": bench(), "other.json": {"kind": "loracle else"}})
    (tmp_path / "notes.json").write_text("[1, 2")
    results = read_results(tmp_path)
    assert results.files == (
        "bench/bench.json",
        "certificate.json",
        "extract.json",
        "intrinsic.json",
        "sweep/rank.json",
    )
    assert results.others == ("notes.json", "other.json")
    assert [claim.verdict for claim in claims(results)] == [Verdict.AGREES] * 6


def test_a_claim_without_a_document_is_not_measured(tmp_path: Path) -> None:
    made = claims(read_results(write(tmp_path, {"c.json": certificate()})))
    assert [claim.verdict is Verdict.MISSING for claim in made] == [True, True, True, False, True, False]
    assert all(command.startswith("loracle ") for claim in made for command in claim.statement.commands)


BETTER_TOGETHER = {**SCORES, ("qv", 1): 0.7, ("qv", 4): 0.8}
"""Query and value need rank 4, and are better than query at both ranks."""


@pytest.mark.parametrize(
    ("ratios", "verdict", "said"),
    [
        (
            RATIOS,
            Verdict.AGREES,
            "in 1 of 1 measurements; what stays unmerged, and adapters",
        ),
        ({**RATIOS, ADAPTER_L: (0.9, 1.1)}, Verdict.PARTLY, "took measurably longer in 1 of 2."),
        ({**RATIOS, MERGED: (1.2, 1.3)}, Verdict.DISAGREES, "in 0 of 1 measurements"),
        (WIDE, Verdict.DISAGREES, "so small costs could not be seen"),
        ({CONTROL: (0.9, 1.1), MERGED: (1.0, 1.0)}, Verdict.UNDECIDED, "compares both"),
        ({CONTROL: (0.9, 1.1)}, Verdict.UNDECIDED, "Neither"),
    ],
)
def test_latency(tmp_path: Path, ratios: dict[str, Any], verdict: Verdict, said: str) -> None:
    own = found(tmp_path, LATENCY, bench(ratios))
    assert own.verdict is verdict
    assert said in own.sentence
    settings = "--model gpt2-medium --settings 1x128 --provider cpu --dtype fp32 --rounds 8 --threads 2"
    assert own.command == f"loracle bench {settings}"


def test_the_command_of_a_latency_table_has_the_blocks_that_it_was_measured_with(tmp_path: Path) -> None:
    document = bench()
    document["effort"]["blocks"] = 12
    assert found(tmp_path, LATENCY, document).command.endswith(
        "--blocks 12 --provider cpu --dtype fp32 --rounds 8 --threads 2"
    )


def test_latency_stands_beside_the_paper_s(tmp_path: Path) -> None:
    own = found(tmp_path, LATENCY, bench())
    assert "LoRA, merged 1.008 [0.995, 1.020]; AdapterL 1.205 [1.190, 1.220]" in own.figure
    row = next(row for row in own.tables[0].rows if row[0] == "AdapterL")
    assert row[1:4] == ("prefill, 1 × 128", "1.205 [1.190, 1.220]", "1.207")
    assert "AdapterL 1.205 [1.190, 1.220], the paper’s 1.207" in own.charts[0].drawn
    assert own.charts[0].drawn.count('class="beside"') == 3


@pytest.mark.parametrize(
    ("scores", "verdict", "said"),
    [
        (SCORES, Verdict.AGREES, "gains at rank 1, query alone at rank 4, as in the paper."),
        ({**SCORES, ("q", 1): 0.8}, Verdict.PARTLY, "but for query alone as well"),
        ({**SCORES, ("qv", 1): 0.5}, Verdict.DISAGREES, "and they were not better than query alone at every"),
        (
            BETTER_TOGETHER,
            Verdict.PARTLY,
            "was not enough for both together, but at every rank both together were better than query alone.",
        ),
        ({("q", 4): 0.8, ("qv", 4): 0.8}, Verdict.UNDECIDED, "were not all measured"),
        ({("qv", 1): 0.8}, Verdict.UNDECIDED, "were not all measured"),
    ],
)
def test_ranks(tmp_path: Path, scores: dict[Any, float], verdict: Verdict, said: str) -> None:
    own = found(tmp_path, RANK, sweep(scores))
    assert own.verdict is verdict
    assert said in own.sentence
    assert ("one seed" in own.sentence) == (verdict is not Verdict.UNDECIDED)


def test_which_score_is_better_is_the_metric_s_and_one_that_diverged_is_worse(tmp_path: Path) -> None:
    document = sweep(BETTER_TOGETHER)
    document["lower_is_better"] = True
    assert found(tmp_path, RANK, document).verdict is Verdict.DISAGREES
    for entry in document["table"]:
        if entry["targets"] == "q":
            entry["score"] = None
    assert found(tmp_path, RANK, document).verdict is Verdict.PARTLY
    document["table"][-1]["score"] = None
    assert found(tmp_path, RANK, document).verdict is Verdict.DISAGREES


def test_ranks_stand_beside_the_paper_s(tmp_path: Path) -> None:
    own = found(tmp_path, RANK, sweep())
    assert (
        own.figure
        == "q 0.6 at rank 1, at best 0.79 at rank 4; qv 0.8 at rank 1, at best 0.8 at rank 1; untrained 0.2"
    )
    assert [chart.drawn.count('class="cell') for chart in own.charts] == [4, 15, 15]
    assert own.charts[0].drawn.count("chosen") == 2
    assert "qv at rank 1: 73.4" in own.charts[1].drawn
    assert "--ranks 1,4 --targets 'q;qv'" in own.command


def test_the_best_cell_is_the_strongest_whichever_way_is_better(tmp_path: Path) -> None:
    from loracle.export.evidence.charts import heat_map

    def opacity(lower: bool) -> list[str]:
        drawn = heat_map((1, 2), [("q", (1.0, 3.0))], lower_is_better=lower, title="x")
        return [part.split('"')[0] for part in drawn.split('fill-opacity="')[1:]]

    assert opacity(lower=False) == ["0.040", "0.500"]
    assert opacity(lower=True) == ["0.500", "0.040"]


@pytest.mark.parametrize(
    ("document", "verdict", "figure"),
    [
        (sweep(), Verdict.AGREES, "2,000 numbers (qv, rank 1), 0.2% of the model’s 1,008,000"),
        (sweep({("q", 8): 0.7, ("q", 64): 0.9}), Verdict.PARTLY, "64,000 numbers (q, rank 64), 6.0%"),
        (sweep({("q", 1): 0.2}), Verdict.DISAGREES, "no adapter of the sweep was enough"),
        (bench(), Verdict.UNDECIDED, "LoRA, merged, 11,000,000 numbers, 44 MB"),
    ],
)
def test_numbers(tmp_path: Path, document: dict[str, Any], verdict: Verdict, figure: str) -> None:
    own = found(tmp_path, NUMBERS, document)
    assert own.verdict is verdict
    assert figure in own.figure


@pytest.mark.parametrize(
    ("document", "verdict", "figure"),
    [
        (certificate(), Verdict.AGREES, "1 kB for a task in the place of 1 MB, 1,000 times less"),
        (certificate(adapter_bytes=10**6), Verdict.PARTLY, "1 times less"),
        (certificate(passed=False), Verdict.DISAGREES, "1,000 times less"),
        (extract(), Verdict.AGREES, "1.5 kB; 256 numbers for 4,096"),
        (extract(0.25, 7), Verdict.UNDECIDED, "1.5 kB; 256 numbers for 4,096"),
    ],
)
def test_files(tmp_path: Path, document: dict[str, Any], verdict: Verdict, figure: str) -> None:
    own = found(tmp_path, FILES, document)
    assert own.verdict is verdict
    assert figure in own.figure
    assert ("up to 25.0% of a weight’s change" in own.sentence) == (verdict is Verdict.UNDECIDED)


@pytest.mark.parametrize(
    ("document", "verdict", "said"),
    [
        (intrinsic(), Verdict.AGREES, "1.0% of the parameters, projected at random, reach 90%"),
        (intrinsic({100: 0.73}), Verdict.PARTLY, "took more than was measured"),
        (intrinsic({100: 0.5}), Verdict.DISAGREES, "No subspace"),
        (intrinsic({10**5: 0.8}), Verdict.DISAGREES, "10.0% of the parameters are needed"),
        (intrinsic(majority=0.75), Verdict.UNDECIDED, "or a guess"),
    ],
)
def test_dimension(tmp_path: Path, document: dict[str, Any], verdict: Verdict, said: str) -> None:
    own = found(tmp_path, DIMENSION, document)
    assert own.verdict is verdict
    assert said in own.sentence


def test_the_merge(tmp_path: Path) -> None:
    own = found(tmp_path, MERGE, certificate())
    assert own.verdict is Verdict.AGREES
    assert own.figure == "2 weights, 1 of them merged; 200 of 200 entries are the correctly rounded merge"
    own = found(tmp_path, MERGE, certificate(passed=False))
    assert own.verdict is Verdict.DISAGREES
    assert "191 of 200" in own.figure


def test_several_files_are_told_together() -> None:
    agrees, partly, disagrees = Verdict.AGREES, Verdict.PARTLY, Verdict.DISAGREES
    undecided = Verdict.UNDECIDED
    assert combined([]) is Verdict.MISSING
    assert combined([undecided]) is undecided
    assert combined([undecided, agrees, agrees]) is agrees
    assert combined([agrees, disagrees]) is partly
    assert combined([disagrees, disagrees, undecided]) is disagrees
    assert combined([partly, agrees]) is partly


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document.update({name: value})


@pytest.mark.parametrize(
    ("document", "change", "message"),
    [
        (bench(), _set("version", 2), "one.json: version: expected 1 of a 'loracle bench' document, got '2'"),
        (bench(), _set("version", True), "version: expected 1"),
        (certificate(), _set("version", 9), "'loracle-certificate' document, got '9'"),
        (bench(), lambda own: own.pop("rows"), "one.json: rows: expected a list, found none; make it again"),
        (bench(), _set("rows", []), "rows: expected at least one object, got none"),
        (bench(), _set("rows", [3]), "rows[0]: expected an object, got '3'"),
        (bench(), lambda own: own["rows"][1].update(ratio="1"), "rows[1]: ratio: expected a number above"),
        (bench(), lambda own: own["rows"][1].update(ratio=1e300), "rows[1]: ratio: expected a number above"),
        (
            bench(),
            lambda own: own["rows"][1].update(interval=[2, 1]),
            "interval: expected two numbers above 0",
        ),
        (bench(), lambda own: own["rows"][0].update(batch=0), "batch: expected an integer of at least 1"),
        (bench(), lambda own: own["rows"][0].update(parameters=10**400), "parameters: expected an integer"),
        (bench(), lambda own: own["machine"].pop("versions"), "machine: versions: expected an object"),
        (sweep(), lambda own: own["table"][0].update(score="<b>"), "table[0]: score: expected a number"),
        (sweep(), lambda own: own["cells"][0].update(seed=None), "cells[0]: seed: expected an integer"),
        (
            intrinsic(),
            lambda own: own["points"][0].update(d=0),
            "points[0]: d: expected an integer of at least 1",
        ),
        (extract(), lambda own: own.update(exact=1), "exact: expected true or false"),
        (certificate(), lambda own: own["inputs"].pop("base"), "inputs: base: expected an object"),
    ],
)
def test_malformed_documents_are_refused_by_name(
    tmp_path: Path, document: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    own = json.loads(json.dumps(document))
    change(own)
    with pytest.raises(FileError) as error:
        read_results(write(tmp_path, {"one.json": own}))
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_broken_json_of_a_command_is_refused_and_nothing_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="expected results of loracle bench"):
        read_results(tmp_path)
    with pytest.raises(FileError, match="expected a folder with result files"):
        read_results(tmp_path / "missing")
    (tmp_path / "bench.json").write_text(json.dumps(bench())[:-9])
    with pytest.raises(FileError, match=r"bench\.json: not valid JSON"):
        read_results(tmp_path)
