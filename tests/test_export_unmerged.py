"""What cannot be left in a graph as two products and a sum is refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loracle.export.unmerged import add_adapter
from loracle.files import Adapter, LoraConfig, LoraPair
from loracle.reference import TargetError

A, B = np.ones((2, 3), np.float32), np.ones((4, 2), np.float32)
MORE: dict[str, tuple[dict[str, Any], LoraPair, dict[str, Any], str]] = {
    "a bias of lora_B": ({"lora_bias": True}, LoraPair(A, B, 4.0, bias=np.ones(4, np.float32)), {}, "q_proj"),
    "a magnitude": ({"use_dora": True}, LoraPair(A, B, 4.0, magnitude=np.ones(4, np.float32)), {}, "q_proj"),
    "a whole tensor": (
        {"modules_to_save": ("norm",)},
        LoraPair(A, B, 4.0),
        {"norm.weight": np.ones(4, np.float32)},
        "norm.weight",
    ),
}


@pytest.mark.parametrize("name", MORE)
def test_more_than_two_matrices_is_not_left_in_a_graph(name: str) -> None:
    options, pair, tensors, named = MORE[name]
    adapter = Adapter(LoraConfig(r=2, target_modules=("q_proj",), **options), {"q_proj": pair}, tensors)
    template: Any = SimpleNamespace(model=SimpleNamespace(graph=None))
    with pytest.raises(TargetError, match=rf"^{named}: expected lora_A and lora_B of linear layers alone"):
        add_adapter(template, adapter)
