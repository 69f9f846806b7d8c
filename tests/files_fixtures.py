"""Model and adapter folders for the tests of ``loracle.files``, from arrays or from transformers and PEFT."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loracle.files import Adapter, LoraConfig
from loracle.files.safetensors_writer import write_safetensors

Array = NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Q0, V0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def random_array(shape: tuple[int, ...], seed: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def small_tensors(dtype: Any = np.float32) -> dict[str, Array]:
    """A few tensors under the names of a Llama model, with an integer one among them."""
    return {
        "lm_head.weight": random_array((10, 6), 0, dtype),
        "model.embed_tokens.weight": random_array((10, 6), 1, dtype),
        f"{Q0}.weight": random_array((8, 6), 2, dtype),
        f"{V0}.weight": random_array((4, 6), 3, dtype),
        "model.norm.weight": random_array((6,), 4, dtype),
        "model.steps": np.arange(3, dtype=np.int64),
    }


def write_model(
    folder: Path,
    shards: Sequence[Mapping[str, Array]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder with one file, or with an index and several."""
    folder.mkdir()
    shards = [small_tensors()] if shards is None else shards
    settings = {"model_type": "llama", "tie_word_embeddings": False, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**settings, **(config or {})}))
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], {"format": "pt"})
        return folder
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    size = sum(array.nbytes for tensors in shards for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def small_adapter(dtype: Any = np.float32, **options: Any) -> Adapter:
    """An adapter of rank 2 for the query and value projections of ``small_tensors``."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ("q_proj", "v_proj"), **options})
    arrays = {
        Q0: (random_array((2, 6), 5, dtype), random_array((8, 2), 6, dtype)),
        V0: (random_array((2, 6), 7, dtype), random_array((4, 2), 8, dtype)),
    }
    return Adapter.from_arrays(config, arrays)


def tiny_llama(seed: int = 0, **options: Any) -> Any:
    """A Llama model of two layers in torch, random weights, ready for PEFT."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "max_position_embeddings": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()


def peft_adapter(model: Any, folder: Path, seed: int = 1, **options: Any) -> Any:
    """Give ``model`` a PEFT adapter with random B, save it to ``folder``, return the PEFT model."""
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    torch.manual_seed(seed)
    tuned = get_peft_model(model, PeftLoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.save_pretrained(str(folder))
    return tuned
