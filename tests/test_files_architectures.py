"""The tables of prefixes, classes and heads are transformers' own."""

import re

import pytest
import torch
import transformers as hf
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.models.auto import modeling_auto

from loracle.files.architectures import (
    ARCHITECTURES,
    CLASS_ENDS,
    IMAGE,
    OLD_NAMES,
    QUESTION,
    SEQUENCE,
    TOKEN,
    architecture_of,
)

MAPPINGS = {
    SEQUENCE: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    TOKEN: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    QUESTION: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    IMAGE: modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
CAUSAL = ("gpt2", "gpt_neox", "mixtral")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def small_config(kind: str) -> "hf.PretrainedConfig":
    config = hf.AutoConfig.for_model(kind)
    for name in LAYERS:
        if getattr(config, name, None) is not None:
            setattr(config, name, 1)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return config


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_class_has_the_name_the_body_and_the_head_of_the_table(kind: str) -> None:
    architecture = ARCHITECTURES[kind]
    config = small_config(kind)
    with torch.device("meta"):
        body = hf.AutoModel.from_config(config)
    own = {f"{architecture.prefix}.{name}" for name in body.state_dict()}
    assert body.base_model_prefix == architecture.prefix
    for end, headed in architecture.heads.items():
        assert MAPPINGS[end][kind] == headed.name
        assert headed.classifies == (end != QUESTION)
        with torch.device("meta"):
            model = getattr(hf, headed.name)(config)
        names = set(model.state_dict())
        head = {name for name in names if name.startswith(tuple(f"{module}." for module in headed.modules))}
        for module in headed.modules:
            assert any(name.startswith(f"{module}.") for name in head), module
        # Beside the head the class has the body: all of it, except for the pooler.
        assert names - head <= own
        missing = {name for name in own - names if not name.startswith(f"{architecture.prefix}.pooler.")}
        assert missing == set()
        # The last module's weight tells how many outputs there are.
        last = headed.modules[-1]
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        outputs = shapes.get(f"{last}.weight") or shapes[f"{last}.out_proj.weight"]
        assert outputs[0] == model.config.num_labels


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gpt_neox", "mixtral", "vit"])
def test_renames_are_those_that_transformers_loads_a_checkpoint_with(kind: str) -> None:
    with torch.device("meta"):
        model = (hf.AutoModelForCausalLM if kind in CAUSAL else hf.AutoModel).from_config(small_config(kind))
    theirs = [
        (pattern.replace("\\", ""), transform.target_patterns[0])
        for transform in get_model_conversion_mapping(model)
        if type(transform) is WeightRenaming
        for pattern in transform.source_patterns
    ]
    ours = [
        (pattern.replace("\\", ""), target) for pattern, target in (*ARCHITECTURES[kind].renames, *OLD_NAMES)
    ]
    assert [pair for pair in theirs if pair in ours] == ours


@pytest.mark.parametrize("kind", [kind for kind, own in ARCHITECTURES.items() if own.experts])
def test_experts_are_stacked_as_transformers_stacks_those_of_a_checkpoint(kind: str) -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(small_config(kind))
    theirs = {
        re.sub(r".*\.", "", transform.target_patterns[0]): tuple(
            re.sub(r".*\*\.(\w+)\.weight", r"\1", pattern.replace("\\", ""))
            for pattern in transform.source_patterns
        )
        for transform in get_model_conversion_mapping(model)
        if type(transform) is WeightConverter
    }
    assert theirs == ARCHITECTURES[kind].experts
    # PEFT wraps a module's parameters in their order.
    (module,) = {path for path, _ in model.named_modules() if path.endswith(".0.mlp.experts")}
    names = [name for name, _ in model.get_submodule(module).named_parameters()]
    assert names == list(ARCHITECTURES[kind].experts)


def test_pefts_tasks_are_those_of_peft() -> None:
    from peft import TaskType

    assert {TaskType(task) for task in CLASS_ENDS} == {
        TaskType.SEQ_CLS,
        TaskType.TOKEN_CLS,
        TaskType.QUESTION_ANS,
    }


def test_what_has_no_known_model_type_has_no_architecture() -> None:
    assert architecture_of({"model_type": "bert"}) is ARCHITECTURES["bert"]
    assert architecture_of({"model_type": "unheard of"}) is None
    assert architecture_of({"model_type": 3}) is None
    assert architecture_of({}) is None
