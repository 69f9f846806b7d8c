"""Loading a model: its dtype, the head that a task adds, and folders that are not what they should be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from refusal import refused
from safetensors.torch import load_file, save_file
from task_fixtures import tiny_bart, tiny_bert, tiny_causal, tiny_t5, write_words_model
from torch_fixtures import byte_tokenizer, same_bits, tiny_llama, write_model
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaModel,
)

from loracle.reference import ConfigError, FileError
from loracle.torch_impl.labels import Labels
from loracle.torch_impl.loading import LoadedModel, check_model_source, load_model, native_bf16
from loracle.torch_impl.tasks import task_named

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize(
    ("stored", "bf16", "loaded"),
    [
        (torch.float32, True, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
    ],
)
def test_weights_are_wide_enough_and_no_wider(
    tmp_path: Path, stored: torch.dtype, bf16: bool, loaded: torch.dtype
) -> None:
    folder = write_model(tmp_path / "model")
    tiny_llama().to(stored).save_pretrained(folder)
    found = load_model(str(folder), bf16=bf16)
    assert {parameter.dtype for parameter in found.model.parameters()} == {loaded}
    assert same_bits(found.model.lm_head.weight, tiny_llama().lm_head.weight.to(stored).to(loaded))
    assert found.tokenizer.eos_token == "<eos>"
    assert (found.labels, found.modules_to_save, found.token_types) == (None, (), False)


def test_a_missing_weight_is_not_made_up(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(FileError, match=r"expected the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(folder), bf16=False)


@pytest.mark.parametrize("damage", ["cut", "absent", "shape", "tokenizer", "config"])
def test_a_damaged_folder_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    folder = write_model(tmp_path / "model")
    path = folder / WEIGHTS
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "absent":
        path.unlink()
    elif damage == "shape":
        tiny_llama(hidden_size=8).save_pretrained(tmp_path / "other")
        (tmp_path / "other" / WEIGHTS).rename(path)
    elif damage == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(FileError, match="expected a model folder, got") as caught:
        load_model(str(folder), bf16=False)
    assert "\n" not in str(caught.value)


NAMES = Labels(("no", "perhaps", "yes"))


def classifier(folder: Path, labels: Labels = NAMES, *, tokens: bool = False, **options: Any) -> LoadedModel:
    task = task_named("token-classification" if tokens else "sequence-classification")
    return load_model(str(folder), **{"bf16": False, **options}, task=task, labels=labels)


def test_a_new_head_is_drawn_from_the_seed_alone(tmp_path: Path) -> None:
    folder = write_words_model(tmp_path / "m", tiny_bert())
    before = torch.random.get_rng_state()
    torch.manual_seed(3)
    one = classifier(folder, seed=1)
    torch.manual_seed(4)
    same, other = classifier(folder, seed=1), classifier(folder, seed=2)
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    classifier(folder, seed=1)
    assert torch.equal(torch.rand(1), expected)  # nothing was drawn from the global generator
    torch.random.set_rng_state(before)
    assert one.modules_to_save == ("classifier", "bert.pooler")  # a masked model's checkpoint has no pooler
    for path in one.modules_to_save:
        weights = [found.model.get_submodule(path).state_dict() for found in (one, same, other)]
        name = "weight" if path == "classifier" else "dense.weight"
        assert same_bits(weights[0][name], weights[1][name])
        assert not torch.equal(weights[0][name], weights[2][name])
    for name, parameter in tiny_bert().bert.named_parameters():
        assert same_bits(one.model.bert.get_parameter(name), parameter)
    assert one.model.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
    assert one.model.config.label2id == {"no": 0, "perhaps": 1, "yes": 2}
    assert one.model.num_labels == 3
    assert one.model.config.problem_type == "single_label_classification"
    assert one.token_types
    assert one.labels == NAMES


def distilbert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 80, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
    return DistilBertForMaskedLM(DistilBertConfig(**sizes))


@pytest.mark.parametrize(
    ("make", "tokens", "modules"),
    [
        (lambda: tiny_bert("BertModel"), False, ("classifier",)),
        (lambda: tiny_bert("BertModel"), True, ("classifier",)),
        (tiny_causal, False, ("score",)),
        (tiny_causal, True, ("score",)),
        (lambda: tiny_bart("BartModel"), False, ("classification_head",)),
        (distilbert, False, ("pre_classifier", "classifier")),
        (distilbert, True, ("classifier",)),
    ],
)
def test_what_is_trained_in_full_is_the_head(
    tmp_path: Path, make: Any, tokens: bool, modules: tuple[str, ...]
) -> None:
    found = classifier(write_words_model(tmp_path / "m", make()), tokens=tokens)
    assert found.modules_to_save == modules


def test_a_head_that_fits_is_kept_with_its_numbers(tmp_path: Path) -> None:
    model = tiny_bert("BertForSequenceClassification", num_labels=3)
    model.config.id2label = {0: "yes", 1: "no", 2: "perhaps"}
    model.config.label2id = {"yes": 0, "no": 1, "perhaps": 2}
    folder = write_words_model(tmp_path / "m", model)
    kept = classifier(folder)
    assert same_bits(kept.model.classifier.weight, model.classifier.weight)
    assert kept.labels == Labels(("yes", "no", "perhaps"))
    assert kept.model.config.id2label == {0: "yes", 1: "no", 2: "perhaps"}
    fewer = classifier(folder, Labels(("no", "yes")))
    assert fewer.model.classifier.weight.shape == (2, 16)
    assert fewer.model.config.id2label == {0: "no", 1: "yes"}
    assert fewer.modules_to_save == ("classifier",)
    again = classifier(folder, Labels(("no", "yes")))
    assert same_bits(fewer.model.classifier.weight, again.model.classifier.weight)


def test_a_head_beside_bfloat16_weights_is_float32(tmp_path: Path) -> None:
    folder = write_words_model(tmp_path / "m", tiny_bert().to(torch.bfloat16))
    model = classifier(folder, bf16=True).model
    assert {parameter.dtype for parameter in model.bert.encoder.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.classifier.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.bert.pooler.parameters()} == {torch.float32}


def test_the_body_of_a_classifier_must_be_whole(tmp_path: Path) -> None:
    folder = write_words_model(tmp_path / "m", tiny_bert())
    tensors = load_file(folder / WEIGHTS)
    kept = dict(tensors)
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    message = (
        f"{folder}: expected the weight bert.encoder.layer.1.output.dense.bias, got a checkpoint without it "
        "or with another shape; was the copy complete?"
    )
    refused(lambda: classifier(folder), FileError, message)
    kept["bert.encoder.layer.1.output.dense.bias"] = torch.zeros(3)
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    refused(lambda: classifier(folder), FileError, message)


def test_a_masked_models_head_is_not_made_up(tmp_path: Path) -> None:
    folder = write_words_model(tmp_path / "m", tiny_bert("BertModel"))
    with pytest.raises(FileError, match=r"expected the weight cls\.predictions\."):
        load_model(str(folder), bf16=False, task=task_named("masked-lm"))


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=264, n_embd=16, n_layer=1, n_head=2, eos_token_id=260, bos_token_id=260)
    )


@pytest.mark.parametrize("given", ["nothing", "config", "tokenizer", "both", "no token"])
def test_a_classifier_without_padding_pads_with_the_end(tmp_path: Path, given: str) -> None:
    model, tokenizer = gpt2(), byte_tokenizer()
    expected = 260
    if given in ("config", "both"):
        model.config.pad_token_id = expected = 257
    if given in ("tokenizer", "both", "no token"):
        tokenizer.pad_token = "<user>"
        expected = 257 if given == "both" else tokenizer.pad_token_id
    if given == "no token":
        model.config.pad_token_id = -1  # as some checkpoints say
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    found = classifier(tmp_path / "m").model, classifier(tmp_path / "m").tokenizer
    assert found[0].config.pad_token_id == found[1].pad_token_id == expected
    ids = torch.tensor([[5, 6, 7], [5, 6, expected]])
    with torch.no_grad():
        logits = found[0](input_ids=ids, attention_mask=(ids != expected).long()).logits
        alone = found[0](input_ids=ids[1:, :2]).logits
    # The last token that is not padding speaks for the text.
    assert f"{logits[1, 0]:.4f}" == f"{alone[0, 0]:.4f}"


def test_a_classifier_with_nothing_to_pad_with_is_refused(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "m")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "m")
    refused(
        lambda: classifier(tmp_path / "m"),
        ConfigError,
        "task: expected a tokenizer with a padding or an end-of-sequence token for sequence-classification, "
        "got one without; give it one",
    )
    assert classifier(tmp_path / "m", tokens=True).tokenizer.pad_token is None


def roberta() -> Any:
    config = RobertaConfig(
        vocab_size=80,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    return RobertaModel(config)


@pytest.mark.parametrize(
    ("make", "positions"),
    [(tiny_bert, 64), (roberta, 10), (lambda: tiny_bart("BartModel"), 64), (gpt2, 1024), (tiny_t5, None)],
)
def test_no_example_is_longer_than_the_positions(make: Any, positions: int | None) -> None:
    model = make().eval()
    loaded = LoadedModel(model, None, None, ())
    assert loaded.longest(7) == 7
    assert loaded.longest(100_000) == positions or (positions is None and loaded.longest(10**5) == 10**5)
    if positions is not None and positions < 100:
        fits = {"input_ids": torch.full((1, positions), 5)}
        with torch.no_grad():
            model(**fits)
        with pytest.raises((IndexError, RuntimeError), match=r"out of|must match"):
            model(input_ids=torch.full((1, positions + 1), 5))


def test_a_task_that_the_architecture_does_not_have(tmp_path: Path) -> None:
    folder = write_words_model(tmp_path / "m", tiny_t5())
    refused(
        lambda: load_model(str(folder), bf16=False),
        ConfigError,
        "task: expected a model that transformers knows for causal-lm, got one of type t5; "
        "choose another task or model",
    )


def test_sources_that_cannot_be_models(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (str(tmp_path / "absent"), "got nothing there"),
        ("absent", "got nothing there"),
        ("", "without config"),
        ("a b/c", "got nothing there"),
        (str(tmp_path / "file"), "got a file"),
        (str(tmp_path / "empty"), r"without config\.json"),
    ):
        with pytest.raises(FileError, match=message):
            check_model_source(source)
    check_model_source("owner/name-1.5_x")


def test_only_hardware_bfloat16_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, native in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"bf16": True}, True),
        ({"avx512_bf16": False, "avx2": True}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert native_bf16(torch.device("cpu")) is native
    assert not native_bf16(torch.device("meta"))
