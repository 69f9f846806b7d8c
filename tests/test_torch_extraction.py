"""Adapters from checkpoints: merged back bit for bit, named as PEFT names them, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_fixtures import make_adapter, make_model
from files_fixtures import Q0, V0, random_array, small_adapter, small_tensors, tiny_llama, write_model
from numpy.typing import NDArray
from peft import PeftModel

from loracle.files import (
    Adapter,
    Checkpoint,
    LoraConfig,
    read_adapter,
    write_adapter,
    write_merged_checkpoint,
)
from loracle.reference import (
    ConfigError,
    DTypeError,
    FileError,
    NonFiniteError,
    ShapeError,
    TargetError,
    delta_singular_values,
    merge,
)
from loracle.torch_impl.extraction import ExtractionSummary, ExtractOptions, extract
from loracle.torch_impl.extraction.options import parse_bytes

Array = NDArray[Any]


def merged(tmp_path: Path, adapter: str, out: str, base: str = "base") -> dict[str, Array]:
    write_merged_checkpoint(tmp_path / base, tmp_path / adapter, tmp_path / out)
    return tensors_of(tmp_path / out)


def tensors_of(folder: Path) -> dict[str, Array]:
    with Checkpoint(folder) as checkpoint:
        return {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names}


def assert_same(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.tobytes() == other[name].tobytes(), name


def run(tmp_path: Path, **options: Any) -> ExtractionSummary:
    return extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", ExtractOptions(**options))


def small(tmp_path: Path, changes: dict[str, Array], **options: Any) -> None:
    """A base of a few tensors, and one with others in the place of some."""
    write_model(tmp_path / "base", **options)
    write_model(tmp_path / "tuned", [{**small_tensors(), **changes}], **options)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_merged_checkpoint_is_found_again_bit_for_bit(tmp_path: Path, kind: str) -> None:
    make_model(tmp_path / "base", kind)
    make_adapter(tmp_path / "given", tmp_path / "base", ("q_proj", "v_proj", "down_proj"))
    tuned = merged(tmp_path, "given", "tuned")
    seen: list[tuple[int, int]] = []
    summary = extract(
        tmp_path / "base",
        tmp_path / "tuned",
        tmp_path / "out",
        ExtractOptions(rank=4),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert_same(merged(tmp_path, "out", "again"), tuned)
    assert summary.exact
    assert summary.complete
    assert len(summary.tensors) == 6
    assert summary.same + 6 == len(tuned)
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})
    assert config["task_type"] == "CAUSAL_LM"
    files = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert summary.nbytes == files
    assert summary.parameters == read_adapter(tmp_path / "out").parameters


def test_peft_and_transformers_load_it(tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path / "base")
    tuned = tiny_llama(0)
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.self_attn.k_proj.weight += 0.1 * torch.randn_like(layer.self_attn.k_proj.weight)
        tuned.model.norm.weight += 0.5
        tuned.model.embed_tokens.weight += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    summary = run(tmp_path, rank=8, rest=True)  # all of k_proj's (8, 16)
    assert summary.complete
    loaded = PeftModel.from_pretrained(tiny_llama(0), str(tmp_path / "out")).eval()
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        expected, got = tuned(tokens).logits, loaded(tokens).logits
        assert (expected - tiny_llama(0)(tokens).logits).abs().max() > 0.1
    assert (expected - got).abs().max() < 1e-4


def test_ranks_by_energy_and_their_patterns(tmp_path: Path) -> None:
    W0 = small_tensors()[f"{Q0}.weight"]
    small(
        tmp_path,
        {
            f"{Q0}.weight": merge(W0, random_array((1, 6), 40), random_array((8, 1), 41), 1.0),
            f"{V0}.weight": small_tensors()[f"{V0}.weight"] + random_array((4, 6), 42),
        },
    )
    summary = run(tmp_path, energy=0.9999, scaling=0.5)
    by_name = {tensor.name: tensor for tensor in summary.tensors}
    assert {name: tensor.r for name, tensor in by_name.items()} == {f"{Q0}.weight": 1, f"{V0}.weight": 4}
    assert all(tensor.relative_residual**2 <= 1 - 0.9999 for tensor in summary.tensors)
    config = read_adapter(tmp_path / "out").config
    assert {config.rank_of(Q0), config.rank_of(V0)} == {1, 4}
    assert config.scaling_of(Q0) == config.scaling_of(V0) == 0.5
    again = merged(tmp_path, "out", "again")
    assert again[f"{Q0}.weight"].tobytes() == tensors_of(tmp_path / "tuned")[f"{Q0}.weight"].tobytes()


@pytest.mark.parametrize("nbytes", [1500, 1900, 4000])
def test_a_budget_of_bytes_is_kept_and_spent_on_the_largest(tmp_path: Path, nbytes: int) -> None:
    base = small_tensors()
    small(
        tmp_path,
        {
            f"{Q0}.weight": base[f"{Q0}.weight"] + 10 * random_array((8, 6), 40),
            f"{V0}.weight": base[f"{V0}.weight"] + random_array((4, 6), 42),
        },
    )
    summary = run(tmp_path, nbytes=nbytes)
    assert summary.nbytes <= nbytes
    ranks = {tensor.name: tensor.r for tensor in summary.tensors}
    if nbytes == 4000:
        assert ranks == {f"{Q0}.weight": 6, f"{V0}.weight": 4}
    else:
        assert ranks[f"{Q0}.weight"] > ranks[f"{V0}.weight"]
        assert nbytes - summary.nbytes < 4 * 14 + 250  # a rank, or another weight's names
    for tensor in summary.tensors:
        if tensor.r == 0:
            assert tensor.relative_residual == 1
            assert V0 not in read_adapter(tmp_path / "out").pairs


def test_a_budget_that_is_too_small(tmp_path: Path) -> None:
    small(tmp_path, {f"{Q0}.weight": random_array((8, 6), 40)})
    with pytest.raises(
        ConfigError, match=r"^bytes: expected enough for a rank of one weight, 56 beside .* got 60"
    ):
        run(tmp_path, nbytes=60)
    with pytest.raises(ConfigError, match=r"got 700; give more"):
        run(tmp_path, nbytes=700)
    assert not (tmp_path / "out").exists()


def test_what_has_no_update_is_named_and_saved_on_request(tmp_path: Path) -> None:
    changes = {
        f"{Q0}.weight": random_array((8, 6), 40),
        "model.norm.weight": random_array((6,), 41),
        "model.embed_tokens.weight": random_array((10, 6), 42),
        "model.steps": np.arange(1, 4),
    }
    small(tmp_path, changes)
    summary = run(tmp_path, rank=6)
    assert [(other.name, other.saved) for other in summary.others] == [
        ("model.embed_tokens.weight", False),
        ("model.norm.weight", False),
        ("model.steps", False),
    ]
    assert not summary.complete
    assert summary.others[1].why == "1 axes; --rest saves it"
    norm = small_tensors()["model.norm.weight"]
    assert summary.others[1].frobenius == pytest.approx(
        np.linalg.norm(changes["model.norm.weight"] - norm), rel=1e-6
    )
    (tmp_path / "out").rename(tmp_path / "without")
    summary = run(tmp_path, rank=6, rest=True)
    saved = {other.name: other.saved for other in summary.others}
    assert saved == {"model.embed_tokens.weight": True, "model.norm.weight": True, "model.steps": False}
    config = read_adapter(tmp_path / "out").config
    assert config.modules_to_save == ("model.embed_tokens", "model.norm")
    again = merged(tmp_path, "out", "again")
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert again[name].tobytes() == changes[name].tobytes()


def test_biases_are_trained_biases(tmp_path: Path) -> None:
    base = {
        "layer.0.query.weight": random_array((4, 6), 1),
        "layer.0.query.bias": random_array((4,), 2),
        "layer.0.key.weight": random_array((4, 6), 3),
        "layer.0.key.bias": random_array((4,), 4),
    }
    tuned = {
        **base,
        "layer.0.query.weight": random_array((4, 6), 5),
        "layer.0.query.bias": random_array((4,), 6),
    }
    write_model(tmp_path / "base", [base])
    write_model(tmp_path / "tuned", [tuned])
    assert run(tmp_path, rank=4, rest=True).complete
    adapter = read_adapter(tmp_path / "out")
    assert (adapter.config.bias, adapter.config.modules_to_save) == ("lora_only", None)
    assert (
        merged(tmp_path, "out", "again")["layer.0.query.bias"].tobytes()
        == tuned["layer.0.query.bias"].tobytes()
    )
    write_model(tmp_path / "tuned2", [{**tuned, "layer.0.key.bias": random_array((4,), 7)}])
    extract(tmp_path / "base", tmp_path / "tuned2", tmp_path / "out2", ExtractOptions(rank=4, rest=True))
    assert read_adapter(tmp_path / "out2").config.bias == "all"


def test_tied_embeddings(tmp_path: Path) -> None:
    make_model(tmp_path / "base", tied=True)
    tuned = tensors_of(tmp_path / "base")
    assert "lm_head.weight" not in tuned
    tuned["model.embed_tokens.weight"] = tuned["model.embed_tokens.weight"] + np.float32(1)
    name = "model.layers.1.self_attn.q_proj.weight"
    tuned[name] = random_array(tuned[name].shape, 1)
    config = json.loads((tmp_path / "base/config.json").read_text())
    write_model(tmp_path / "tuned", [tuned], config)
    assert run(tmp_path, rank=48, rest=True).complete
    adapter = read_adapter(tmp_path / "out")
    assert adapter.config.ensure_weight_tying
    assert adapter.config.target_modules == ("model.layers.1.self_attn.q_proj",)
    again = merged(tmp_path, "out", "again")
    assert again["model.embed_tokens.weight"].tobytes() == tuned["model.embed_tokens.weight"].tobytes()
    # a copy of the embedding under the output layer's name is no tensor of its own
    write_model(
        tmp_path / "copied", [{**tuned, "lm_head.weight": tuned["model.embed_tokens.weight"]}], config
    )
    extract(tmp_path / "base", tmp_path / "copied", tmp_path / "out2", ExtractOptions(rank=48, rest=True))
    assert (tmp_path / "out2/adapter_model.safetensors").read_bytes() == (
        tmp_path / "out/adapter_model.safetensors"
    ).read_bytes()


def test_copies_of_tied_embeddings(tmp_path: Path) -> None:
    """A file may hold both; of the tuned one another output layer is another model's."""
    base = small_tensors()
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    tuned = {**base, f"{Q0}.weight": random_array((8, 6), 40)}
    tied = {"tie_word_embeddings": True}
    write_model(tmp_path / "base", [base], tied)
    one = {name: array for name, array in tuned.items() if name != "lm_head.weight"}
    write_model(tmp_path / "tuned", [one], tied)
    assert run(tmp_path, rank=6).complete
    write_model(tmp_path / "single", [{n: a for n, a in base.items() if n != "lm_head.weight"}], tied)
    write_model(tmp_path / "untied", [{**tuned, "lm_head.weight": random_array((10, 6), 41)}], tied)
    with pytest.raises(TargetError, match=r"untied: has a tensor lm_head\.weight, which .*single has not"):
        extract(tmp_path / "single", tmp_path / "untied", tmp_path / "out2", ExtractOptions(rank=1))


def test_shards_and_prefixes_differ(tmp_path: Path) -> None:
    tuned = {**small_tensors(), f"{Q0}.weight": random_array((8, 6), 40)}
    del tuned["lm_head.weight"]
    base = {name: array for name, array in small_tensors().items() if name != "lm_head.weight"}
    write_model(tmp_path / "base", [base])
    short = [{name.removeprefix("model."): array} for name, array in tuned.items()]
    write_model(tmp_path / "tuned", short)
    summary = run(tmp_path, rank=6)
    assert [tensor.name for tensor in summary.tensors] == [f"{Q0}.weight"]
    assert list(read_adapter(tmp_path / "out").pairs) == [Q0]
    nearest = merged(tmp_path, "out", "again")[f"{Q0}.weight"]
    assert np.abs(nearest - tuned[f"{Q0}.weight"]).max() < 1e-5


def test_weights_stored_in_out(tmp_path: Path) -> None:
    base = {
        "transformer.h.0.attn.c_attn.weight": random_array((6, 18), 1),
        "transformer.h.0.attn.c_proj.weight": random_array((6, 6), 2),
        "transformer.wte.weight": random_array((9, 6), 3),
    }
    tuned = dict(base)
    for seed, name in enumerate(list(base)[:2]):
        rows, columns = base[name].shape
        tuned[name] = merge(
            base[name], random_array((1, columns), 10 + seed), random_array((rows, 1), 20 + seed), 1.0
        )
    config = {"model_type": "gpt2", "tie_word_embeddings": True}
    write_model(tmp_path / "base", [base], config)
    write_model(tmp_path / "tuned", [tuned], config)
    summary = run(tmp_path, rank=1)
    adapter = read_adapter(tmp_path / "out")
    assert adapter.config.fan_in_fan_out
    assert adapter.pairs["transformer.h.0.attn.c_attn"].A.shape == (1, 6)
    assert summary.exact
    assert_same(merged(tmp_path, "out", "again"), tuned)


def test_the_rank_is_kept_where_weights_have_less(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    write_adapter(tmp_path / "given", small_adapter())
    tuned = merged(tmp_path, "given", "tuned")
    run(tmp_path, rank=3)
    adapter = read_adapter(tmp_path / "out")
    assert {pair.r for pair in adapter.pairs.values()} == {3}
    pair = adapter.pairs[Q0]
    assert delta_singular_values(pair.A, pair.B)[2] == 0
    assert_same(merged(tmp_path, "out", "again"), tuned)


def test_large_weights_are_decomposed_at_random_but_always_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loracle.torch_impl.extraction.decomposition.FULL_SIDE", 8)
    rng = np.random.default_rng(0)
    base = {"q.weight": rng.standard_normal((90, 80)).astype(np.float32)}
    D = rng.standard_normal((90, 3)) @ rng.standard_normal((3, 80)) + 0.01 * rng.standard_normal((90, 80))
    write_model(tmp_path / "base", [base])
    write_model(tmp_path / "tuned", [{"q.weight": base["q.weight"] + D.astype(np.float32)}])
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    summary = run(tmp_path, rank=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    best = np.linalg.norm(np.linalg.svd(tensors_of(tmp_path / "tuned")["q.weight"] - base["q.weight"])[1][3:])
    assert summary.tensors[0].frobenius_residual == pytest.approx(best, rel=1e-3)
    first = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    torch.manual_seed(2)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "again", ExtractOptions(rank=3))
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == first
    write_model(tmp_path / "noise", [{"q.weight": base["q.weight"] + random_array((90, 80), 3)}])
    for number in (1, 2):  # of a flat spectrum another projection would give other vectors
        torch.manual_seed(number)
        extract(tmp_path / "base", tmp_path / "noise", tmp_path / str(number), ExtractOptions(rank=3))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("1", "2")]
    assert files[0] == files[1]
    energy = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "e", ExtractOptions(energy=0.9))
    assert energy.tensors[0].r == 3


def refused(tmp_path: Path, error: type[Exception], message: str, **options: Any) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path, **{"rank": 2, **options})
    assert not (tmp_path / "out").exists()


def test_nothing_differs(tmp_path: Path) -> None:
    small(tmp_path, {})
    refused(
        tmp_path,
        TargetError,
        r"tuned: expected a linear layer's weight that differs .* got the same in all tensors",
    )


def test_only_others_differ(tmp_path: Path) -> None:
    small(tmp_path, {"model.norm.weight": random_array((6,), 41)})
    refused(tmp_path, TargetError, r"got only model\.norm\.weight; is it the fine-tuned model")


def test_other_shapes(tmp_path: Path) -> None:
    small(tmp_path, {f"{Q0}.weight": random_array((8, 7), 40)})
    message = rf"^{re.escape(Q0)}\.weight: expected \(8, 6\) as the base's .* has, got \(8, 7\) in .*tuned"
    refused(tmp_path, ShapeError, message)


def test_missing_and_additional_tensors(tmp_path: Path) -> None:
    tuned = small_tensors()
    del tuned[f"{Q0}.weight"]
    write_model(tmp_path / "base")
    write_model(tmp_path / "tuned", [tuned])
    refused(tmp_path, TargetError, rf"tuned: has no tensor {re.escape(Q0)}\.weight, which .*base has")
    with pytest.raises(
        TargetError, match=rf"base: has a tensor {re.escape(Q0)}\.weight, which .*tuned has not"
    ):
        extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", ExtractOptions(rank=1))


def test_a_rank_above_a_dimension(tmp_path: Path) -> None:
    small(tmp_path, {f"{V0}.weight": random_array((4, 6), 40)})
    message = rf"^{re.escape(V0)}\.weight: expected a rank from 1 to 4, the smaller side of \(4, 6\), got 5"
    refused(tmp_path, ConfigError, message, rank=5)


def test_not_finite(tmp_path: Path) -> None:
    small(tmp_path, {f"{V0}.weight": np.full((4, 6), np.nan, np.float32)})
    refused(tmp_path, NonFiniteError, rf"^tuned {re.escape(V0)}\.weight: expected finite numbers")


def test_other_kinds_of_numbers(tmp_path: Path) -> None:
    small(tmp_path, {f"{V0}.weight": np.zeros((4, 6), np.int8)})
    refused(tmp_path, DTypeError, rf"^{re.escape(V0)}\.weight: expected float32 as the base's .* got int8")


def test_an_output_that_exists(tmp_path: Path) -> None:
    small(tmp_path, {f"{V0}.weight": random_array((4, 6), 40)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(FileError, match=r"out: exists and is not empty"):
        run(tmp_path, rank=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of rank, energy and bytes"),
        ({"rank": 1, "energy": 0.5}, "expected one of rank, energy and bytes"),
        ({"rank": 0}, "rank: expected an integer of at least 1, got 0"),
        ({"energy": 1.5}, "energy: expected a number above 0 and at most 1"),
        ({"nbytes": 0}, "bytes: expected an integer of at least 1, got 0"),
        ({"rank": 1, "scaling": 0.0}, "scaling: expected a finite number other than 0"),
        ({"rank": 1, "scaling": float("nan")}, "scaling: expected a finite number other than 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        ExtractOptions(**options)


def test_sizes() -> None:
    sizes = {"10MB": 10**7, "4096": 4096, "1.5 KiB": 1536, "2gb": 2 * 10**9, " 7 b ": 7}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for wrong in ("", "MB", "-1", "10 TB", "1e6", "0.5", "0"):
        with pytest.raises(ConfigError, match=r"^bytes: expected a size such as 10MB"):
            parse_bytes(wrong)


def test_a_target_s_name_stands_for_no_other_module(tmp_path: Path) -> None:
    """An adapter for one layer's query names it whole, as merging would miss the other layers' otherwise."""
    base = {
        f"model.layers.{number}.self_attn.q_proj.weight": random_array((8, 6), number) for number in (0, 1)
    }
    write_model(tmp_path / "base", [base])
    write_model(tmp_path / "tuned", [{**base, f"{Q0}.weight": random_array((8, 6), 9)}])
    run(tmp_path, rank=2)
    adapter: Adapter = read_adapter(tmp_path / "out")
    assert adapter.config.target_modules == (Q0,)
    merged(tmp_path, "out", "again")
    assert isinstance(adapter.config, LoraConfig)
