"""`loracle verify` as a user meets it: what it prints, what it writes, how it exits."""

from __future__ import annotations

import importlib.resources
import json
import re
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from certificate_fixtures import CONTROLS, MARKUP, harmful, report, weight
from export_fixtures import make_adapter, make_model
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.cli.new_file import check_new_file
from loracle.cli.verify_text import print_report
from loracle.export.verification.printable import printable
from loracle.export.verification.report import Check
from loracle.export.verification.verdict import Verdict
from loracle.files import write_merged_checkpoint
from loracle.reference import ConfigError

RUNNER = CliRunner()
Q = "model.layers.0.self_attn.q_proj.weight"
V = "model.layers.0.self_attn.v_proj.weight"


def call(*arguments: object) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter, merged; rounded, with a weight a little off; wrong, with another that is the base's."""
    root = tmp_path_factory.mktemp("verify")
    make_model(root / "base")
    make_adapter(root / "adapter", root / "base")
    write_merged_checkpoint(root / "base", root / "adapter", root / "merged")
    base = load_file(root / "base" / "model.safetensors")
    merged = load_file(root / "merged" / "model.safetensors")
    few = np.random.default_rng(0).random(merged[Q].shape) < 0.1
    up = np.where(few, np.nextafter(merged[Q], np.float32(9)), merged[Q])
    for name, tensors in (("rounded", {Q: up}), ("wrong", {Q: up, V: base[V]})):
        shutil.copytree(root / "merged", root / name)
        save_file({**merged, **tensors}, root / name / "model.safetensors", {"format": "pt"})
    return root


def _verify(root: Path, candidate: str, *options: object) -> tuple[int, str, str]:
    return call("verify", root / candidate, "--model", root / "base", "--adapter", root / "adapter", *options)


def test_a_right_candidate_exits_with_0_and_says_how_exactly(made: Path) -> None:
    code, out, err = _verify(made, "merged")
    assert (code, err) == (0, "")
    assert "weights: 4 correctly rounded, 16 untouched" in out
    assert out.rstrip().endswith("all 20 weights are correctly rounded, bit for bit.")
    assert "FAIL" not in out


def test_what_is_rounded_otherwise_passes_and_is_named(made: Path) -> None:
    code, out, _ = _verify(made, "rounded")
    assert code == 0
    assert f"note {Q}: within k ulp; " in out
    code, out, _ = _verify(made, "rounded", "--exact")
    assert code == 1
    assert f"FAIL weights are the correctly rounded merge: {Q}: " in out


def test_a_wrong_candidate_exits_with_1_and_each_weight_is_named_once(made: Path) -> None:
    code, out, _ = _verify(made, "wrong")
    assert code == 1
    assert re.search(rf"^FAIL weights [^\n]*: {re.escape(V)}: delta missing; ", out, re.M)
    assert (out.count(V), out.count(Q)) == (1, 0)
    assert "1 delta missing" in out
    assert out.rstrip().endswith("1 of 20 weights is “delta missing”.")


@pytest.mark.parametrize(("candidate", "code"), [("merged", 0), ("wrong", 1)])
def test_json_file_and_page_are_one_certificate(
    made: Path, tmp_path: Path, candidate: str, code: int
) -> None:
    files = ("--certificate", tmp_path / "c.json", "--html", tmp_path / "c.html")
    found, out, _ = _verify(made, candidate, "--json", "--exact", *files)
    assert found == code
    assert out == (tmp_path / "c.json").read_text()
    content = json.loads(out)
    path = importlib.resources.files("loracle.export") / "schemas" / "certificate.schema.json"
    jsonschema.Draft202012Validator(json.loads(path.read_text("utf-8"))).validate(content)
    assert (content["options"]["exact"], content["options"]["prompts"]) == (True, None)
    assert content["inputs"]["base"]["path"] == str(made / "base")
    page = (tmp_path / "c.html").read_text("utf-8")
    assert content["statement"] in page
    assert content["inputs"]["candidate"]["sha256"] in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.html", "c.json"]


def test_a_file_is_written_beside_the_table(made: Path, tmp_path: Path) -> None:
    code, out, _ = _verify(made, "merged", "--certificate", tmp_path / "c.json")
    assert code == 0
    assert "16 untouched" in out
    assert json.loads((tmp_path / "c.json").read_text())["passed"] is True


def test_without_a_certificate_no_file_is_digested(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loracle.export.verification import digests

    def refuse(*_: object) -> None:
        raise AssertionError("a file is digested")

    monkeypatch.setattr(digests, "_digest", refuse)
    assert _verify(made, "merged")[0] == 0


@pytest.mark.parametrize("option", ["--certificate", "--html"])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("base/model.safetensors", "lies in, the input"),
        ("adapter/adapter_config.json", "lies in, the input"),
        ("wrong/config.json", "lies in, the input"),
        ("prompts.txt", "is, or lies in, the input"),
        ("none/c", "does not exist"),
        ("outside", "got the folder"),
    ],
)
def test_no_input_is_overwritten(made: Path, option: str, path: str, words: str) -> None:
    (made / "outside").mkdir(exist_ok=True)
    (made / "prompts.txt").write_text("hello\n")
    before = {file: file.read_bytes() for file in made.rglob("*") if file.is_file()}
    code, out, err = _verify(made, "wrong", option, made / path, "--prompts", made / "prompts.txt")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {option}: ")
    assert words in err
    assert err.count("\n") == 1
    assert {file: file.read_bytes() for file in made.rglob("*") if file.is_file()} == before


def test_a_link_to_an_input_is_seen(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("x")
    (tmp_path / "link").symlink_to("model/weights")
    (tmp_path / "folder").symlink_to("model")
    (tmp_path / "old").write_text("old")
    for path in ("link", "folder/weights", "model/../model/weights"):
        with pytest.raises(ConfigError, match="input"):
            check_new_file("--html", tmp_path / path, [tmp_path / "folder"])
    for path in ("old", "new", "model/new"):
        check_new_file("--html", tmp_path / path, [tmp_path / "model", tmp_path / "none"])


@pytest.mark.parametrize("text", [MARKUP, CONTROLS], ids=["markup", "controls"])
def test_names_reach_the_terminal_as_text(capsys: pytest.CaptureFixture[str], text: str) -> None:
    print_report(harmful(text).report)
    out = capsys.readouterr().out
    assert not set(out) - {"\n"} & set("\x1b\r\x07\u202e\udc80")
    assert f"FAIL {printable(text)}: {printable(text)}\n" in out
    assert printable(text)[-4:] in out.partition("weights: ")[0]


def test_of_many_that_are_rounded_otherwise_eight_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    rounded = [weight(Verdict.WITHIN_ULPS, f"w{i}", unequal=i + 1) for i in range(11)]
    print_report(report(*rounded, checks=[Check("answers", True, "no memory", asked=False)]))
    out = capsys.readouterr().out
    assert re.findall(r"^note (\w+)", out, re.M) == [*(f"w{i}" for i in range(10, 2, -1)), "and"]
    assert "note and 3 more weights" in out
    assert re.search(r"answers +│ skip", out)
    print_report(report(*rounded, weight(Verdict.TWICE, "t", passed=False, unequal=1)))
    out = capsys.readouterr().out
    assert "note" not in out
    assert "FAIL" in out
