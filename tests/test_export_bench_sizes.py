"""Numbers of parameters are the paper's, and so are the ranks that its settings come to."""

import pytest

from loracle.export.bench import paper
from loracle.export.bench.sizes import (
    adapter_h_parameters,
    adapter_l_parameters,
    nearest_rank,
    prefix_parameters,
    prompt_parameters,
)

LAYERS, HIDDEN = 24, 1024  # GPT-2 medium


@pytest.mark.parametrize(
    ("count", "rank", "millions"),
    [
        (adapter_l_parameters, 9, 0.52),
        (adapter_l_parameters, 224, 11.09),
        (adapter_h_parameters, 5, 0.54),
        (adapter_h_parameters, 112, 11.06),
    ],
)
def test_the_paper_s_sizes_of_gpt2_medium(count, rank, millions) -> None:
    assert round(count(LAYERS, HIDDEN, rank) / 1e6, 2) == millions


@pytest.mark.parametrize(("setting", "of_l", "of_h"), [((32, 512), 9, 5), ((16, 256), 224, 112)])
def test_the_paper_s_budgets_come_to_the_paper_s_ranks(setting, of_l, of_h) -> None:
    budget = paper.SETTINGS[setting]
    assert nearest_rank(lambda r: adapter_l_parameters(LAYERS, HIDDEN, r), budget) == of_l
    assert nearest_rank(lambda r: adapter_h_parameters(LAYERS, HIDDEN, r), budget) == of_h


def test_a_rank_is_at_least_one() -> None:
    assert nearest_rank(lambda r: 100 + 10 * r, 3) == 1


def test_positions_are_keys_and_values_of_each_layer_or_embeddings() -> None:
    assert prefix_parameters(LAYERS, 16 * 64, 10) == 24 * 2 * 1024 * 10
    assert prompt_parameters(HIDDEN, 20) == 20 * 1024


def test_ratios_are_those_of_table_1() -> None:
    """The table gives per cent, rounded: of AdapterL +2.2, +5.0, +20.7; of AdapterH +3.0, +8.4, +30.3.

    From the rounded milliseconds they come out within a tenth of a per cent.
    """
    told = {
        "adapter-l": {(32, 512): 2.2, (16, 256): 5.0, (1, 128): 20.7},
        "adapter-h": {(32, 512): 3.0, (16, 256): 8.4, (1, 128): 30.3},
    }
    for method, row in told.items():
        for (batch, length), percent in row.items():
            ratio = paper.paper_ratio(batch, length, method)
            assert ratio is not None
            assert abs(100 * (ratio - 1) - percent) < 0.11
    assert paper.paper_ratio(1, 128, "lora-merged") == 1.0
    assert paper.paper_ratio(1, 128, "prefix") is None
    assert paper.paper_ratio(2, 128, "adapter-h") is None
