"""A model's own forward with the chunked loss: the same loss and gradients, and what is refused."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from refusal import refused
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch_fixtures import same_bits, tiny_llama
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from loracle.files import LoraConfig
from loracle.reference import ConfigError, Precision, TargetError
from loracle.reference.balls import Ball
from loracle.reference.softmax_bounds import EXP_ULPS, softmax_ball
from loracle.torch_impl import chunked_cross_entropy as operator
from loracle.torch_impl import inject
from loracle.torch_impl.chunked_loss import chunked_loss
from loracle.torch_impl.distributed import World, shard
from loracle.torch_impl.encoding import IGNORED

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}


def _gpt2() -> Any:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, **tokens))


def _opt() -> Any:
    sizes = {"ffn_dim": 24, "word_embed_proj_dim": 8, "dropout": 0.0, "init_std": 0.2}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**{**SIZES, **sizes}))


def _of(name: str, **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config)


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: _of("Llama"),
    "Llama, tied": lambda: _of("Llama", tie_word_embeddings=True),
    "GPT-2, tied": _gpt2,
    "Qwen2": lambda: _of("Qwen2"),
    "OPT, projected": _opt,
    "GPT-NeoX": lambda: _of("GPTNeoX", rotary_pct=0.5),
    "Phi, bias": lambda: _of("Phi"),
}


def model_of(name: str, seed: int = 0) -> Any:
    """A model in float64 that trains all but its head."""
    torch.manual_seed(seed)
    model = MODELS[name]().double().train()
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return frozen(model)


def frozen(model: Any) -> Any:
    """The model, its head frozen."""
    model.get_output_embeddings().requires_grad_(False)
    return model


def batch_of(seed: int = 0, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Random tokens, padded to different lengths; prompts of different lengths are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(rows):
        labels[row, : row + 2] = IGNORED
        for tensor, filler in ((ids, 0), (labels, IGNORED), (mask, 0)):
            tensor[row, length - row :] = filler
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of all parameters that train."""
    model.zero_grad()
    loss = model(**inputs, **options).loss
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), gradients


def with_noise(model: Any, inputs: dict[str, Tensor], generator: torch.Generator, **options: Any) -> Any:
    """`step` with the loss that the model has, its logits' gradient off by all that float32 can do to it."""
    own = model.loss_function

    def noisy(logits: Tensor, labels: Tensor, vocab_size: int, **others: Any) -> Tensor:
        exact = Ball.of(logits.detach().flatten(0, 1).numpy(), Precision(np.float32), 2.0**-126)
        radius = softmax_ball(exact, np.full(exact.shape, True), EXP_ULPS).radius
        count = float(others["num_items_in_batch"])
        signs = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
        noise = signs * torch.from_numpy(radius).view(logits.shape) / count
        logits.register_hook(lambda gradient: gradient + noise * (gradient.abs().sum(-1, keepdim=True) > 0))
        return own(logits=logits, labels=labels, vocab_size=vocab_size, **others)

    model.loss_function = noisy
    try:
        return step(model, inputs, **options)
    finally:
        del model._loss_function


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name: str) -> None:
    """In float64, where the model's own loss is the one that rounds: its logits, to float32.

    The tolerance is sampled, as clause 7 of docs/numerics.md has it: the bound of softmax in float32 as noise
    on the gradient of the logits, four times; twice what that does to any entry of any gradient at most.
    """
    model, inputs = model_of(name), batch_of()
    count = torch.tensor(int((inputs["labels"][:, 1:] != IGNORED).sum()) + 5)
    own_loss, own = step(model, inputs, num_items_in_batch=count)
    generator = torch.Generator().manual_seed(0)
    samples = [with_noise(model, inputs, generator, num_items_in_batch=count)[1] for _ in range(4)]
    with chunked_loss(model, chunk_bytes=4 * 8 * VOCABULARY):
        loss, gradients = step(model, inputs, num_items_in_batch=count)
        _, other = step(model, inputs, num_items_in_batch=count + 1)
    logits = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits.detach()
    assert abs(float(loss) - float(own_loss)) <= loss_tolerance(logits)
    assert gradients.keys() == own.keys()
    assert set(own) == {key for key, value in model.named_parameters() if value.requires_grad}
    tolerance = 2 * max(deviation(sample, own) for sample in samples)
    assert deviation(gradients, own) <= tolerance
    assert deviation(other, own) > 100 * tolerance


def deviation(gradients: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest of all parameters."""
    return max(float((gradients[name] - other).abs().max()) for name, other in others.items())


def loss_tolerance(logits: Tensor) -> float:
    """Of logits that are rounded to float32, exponentials, their sum, its logarithm, a difference, a mean."""
    size = float(logits.abs().max()) + math.log(VOCABULARY)
    roundings = VOCABULARY + 4 * int(EXP_ULPS) + 3 + logits[..., 0].numel()
    return 2 * 2 * size * roundings * 2.0**-24


def test_the_mean_shifted_labels_and_another_ignored_label_are_the_models() -> None:
    model, inputs = model_of("Llama"), batch_of()
    labels = inputs.pop("labels")
    shifted = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
    other = labels.masked_fill(labels == IGNORED, 7).masked_fill(labels == 7, 8)
    variants: list[dict[str, Any]] = [
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": 37},
        {"labels": torch.zeros_like(labels), "shift_labels": shifted},
        {"labels": other, "ignore_index": 7},
    ]
    logits = model(**inputs).logits.detach()
    for options in variants:
        own = float(model(**inputs, **options).loss.detach())
        with chunked_loss(model):
            got = float(model(**inputs, **options).loss.detach())
        assert abs(got - own) <= loss_tolerance(logits)


class Largest(TorchDispatchMode):
    """Records the most elements that any result of an operation has, those inside the operator too."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; the operator as the Python that it is made of."""
        if func is torch.ops.loracle.chunked_cross_entropy.default:
            with self:
                return operator._loss_and_gradient(*args, **(kwargs or {}))
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
        return results


def test_no_tensor_is_ever_as_large_as_the_logits() -> None:
    model, inputs = frozen(tiny_llama(vocab_size=2000)).train(), batch_of(rows=4, length=40)
    # Not the gradient of the embedding, (V, d).
    model.get_input_embeddings().requires_grad_(False)
    positions = inputs["labels"].numel()
    with Largest() as own:
        step(model, inputs)
    assert own.elements == positions * 2000
    with chunked_loss(model, chunk_bytes=8 * 2000 * 4), Largest() as chunked:
        step(model, inputs)
    # The weight itself, seen as its transpose; chunks are of 8 rows at most.
    assert 7 * 2000 <= chunked.elements <= 16 * 2000


def test_calls_that_need_logits_have_them() -> None:
    model, inputs = model_of("Llama"), batch_of()
    labels = inputs["labels"]
    plain = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    own, own_evaluation = model(**plain), model.eval()(**inputs)
    model.train()
    with chunked_loss(model):
        assert model(**inputs).logits is None
        assert list(model(**inputs)) == ["loss", "past_key_values"]
        # Labels where they are given by position.
        assert model(inputs["input_ids"], inputs["attention_mask"], None, None, None, labels).logits is None
        assert same_bits(model(**plain).logits, own.logits)

        model.eval()
        evaluated = model(**inputs)
        assert same_bits(evaluated.logits, own_evaluation.logits)
        assert same_bits(evaluated.loss, own_evaluation.loss)
    with chunked_loss(model, evaluation=True), torch.no_grad():
        evaluated = model(**inputs)
        assert evaluated.logits is None
        assert abs(float(evaluated.loss) - float(own_evaluation.loss.detach())) <= loss_tolerance(
            own.logits.detach()
        )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Check that nothing about the model or torch's random numbers is other than it was."""

    def state() -> Any:
        return [
            (path, set(vars(module)), module.training, module.forward)
            for path, module in model.named_modules()
        ], model.loss_function

    before, random = state(), torch.get_rng_state()
    yield
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)


def test_the_model_is_as_it_was_also_after_an_error() -> None:
    model, inputs = model_of("Llama"), batch_of()
    model.model.layers[1].mlp.eval()
    wrong = {**inputs, "labels": inputs["labels"].clone().fill_(VOCABULARY)}
    own = model(**inputs)
    with unchanged(model), chunked_loss(model):
        assert not model.model.layers[1].mlp.training
    with unchanged(model), pytest.raises(KeyError), chunked_loss(model):
        raise KeyError
    with unchanged(model), chunked_loss(model):
        with pytest.raises(Exception, match="targets: expected tokens below the vocabulary"):
            model(**wrong)
        # Not only after the context: the head is the head as soon as the call is over.
        assert model.lm_head(torch.ones(1, 16).double()).shape == (1, VOCABULARY)
    after = model(**inputs)
    assert same_bits(after.loss, own.loss)
    assert same_bits(after.logits, own.logits)


def test_callers_see_the_signature_and_a_kept_forward_stands_in_for_nothing_afterwards() -> None:
    model, inputs = model_of("Llama"), batch_of()
    signature = inspect.signature(model.forward)
    with chunked_loss(model):
        assert inspect.signature(model.forward) == signature
        kept = model.forward
    assert same_bits(kept(**inputs).logits, model(**inputs).logits)


def test_what_another_has_put_there_is_put_back() -> None:
    model, inputs = model_of("Llama"), batch_of()
    own_forward = model.forward
    model.loss_function = ForCausalLMLoss
    model.forward = partial(own_forward)
    with unchanged(model), chunked_loss(model):
        assert model(**inputs).logits is None


def test_looking_at_the_model_draws_no_random_numbers_and_trains_nothing() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=4, n_positions=64)
    model = frozen(transformers.GPT2LMHeadModel(config)).train()
    seen: list[bool] = []

    def look(*_: Any) -> None:
        torch.rand(1)
        seen.append(torch.is_grad_enabled() or any(module.training for module in model.modules()))

    model.register_forward_hook(look)
    with unchanged(model), chunked_loss(model):
        pass
    assert seen == [False]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, inputs = model_of("Llama"), batch_of()
    with chunked_loss(model):
        expected = step(model, inputs)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss, gradients = step(model, inputs)
    assert same_bits(loss, expected[0])
    for name, gradient in gradients.items():
        assert same_bits(gradient, expected[1][name]), name


def test_compiled_the_whole_model_is_one_graph() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = frozen(_of("Llama", num_hidden_layers=1)).train(), batch_of()
    with chunked_loss(model):
        expected = step(model, inputs)
        output = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs, use_cache=False)
        assert output.logits is None
        model.zero_grad()
        output.loss.backward()
    assert same_bits(output.loss.detach(), expected[0])
    for name, gradient in expected[1].items():
        assert same_bits(model.get_parameter(name).grad, gradient), name


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def adapted_llama() -> Any:
    """Llama with adapters."""
    model = frozen(tiny_llama(vocab_size=VOCABULARY))
    inject(model, LoraConfig(), generator=torch.Generator().manual_seed(0))
    return model.train()


@pytest.mark.usefixtures("one_process")
def test_adapters_train_under_ddp_as_without() -> None:
    expected, model, inputs = None, adapted_llama(), batch_of()
    with chunked_loss(model):
        # Twice: layers learn to share their inputs, with other roundings.
        for _ in range(2):
            expected = step(model, inputs)
        loss, gradients = step(nn.parallel.DistributedDataParallel(model), inputs)
    assert expected is not None
    assert expected[1]
    assert same_bits(loss, expected[0])
    for name, gradient in expected[1].items():
        assert same_bits(gradients[f"module.{name}"], gradient), name


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("first", ["shard", "chunked_loss"])
def test_adapters_train_when_sharded_as_without(first: str) -> None:
    plain, sharded, inputs = adapted_llama(), adapted_llama(), batch_of()
    world = World(0, 1, torch.device("cpu"))
    if first == "shard":
        shard(sharded, world)
    with chunked_loss(plain), chunked_loss(sharded):
        if first != "shard":
            shard(sharded, world)
        for _ in range(2):
            expected, got = (step(model, inputs) for model in (plain, sharded))
            assert expected[1].keys() == got[1].keys()
            assert same_bits(got[0], expected[0])
            for name, gradient in expected[1].items():
                whole = got[1][name]
                assert isinstance(whole, DTensor)
                assert same_bits(whole.full_tensor(), gradient), name


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_head_that_is_sharded_by_itself_is_refused() -> None:
    model, inputs = adapted_llama(), batch_of()
    with chunked_loss(model):
        fully_shard(model.lm_head)
        fully_shard(model)
        refused(
            lambda: model(**inputs),
            TargetError,
            "output head's weight: expected to be whole while the model runs, got a DTensor; shard the head "
            "with the model around it, not by itself, or turn chunked_loss off",
        )
    refused(
        chunked_loss(model).__enter__,
        TargetError,
        "output head: expected no hooks, got some; remove them, or turn chunked_loss off",
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma2", {"head_dim": 4}),
        ("Granite", {"logits_scaling": 2.0}),
        ("Cohere", {}),
    ],
)
def test_a_model_that_transforms_its_logits_is_refused(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = frozen(_of(name, **options)).train()
    with unchanged(model):
        refused(
            chunked_loss(model).__enter__,
            ConfigError,
            f"{name}ForCausalLM: expected logits that are its head's output, got others: this model "
            "transforms its logits; turn chunked_loss off",
        )


class Masked(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Changes what its head has returned."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Llama's, but for a token that is never predicted."""
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        logits[..., 7] = -100.0
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_model_that_changes_its_logits_in_place_is_refused() -> None:
    model = frozen(Masked(tiny_llama().config))
    with unchanged(model):
        refused(
            chunked_loss(model).__enter__,
            ConfigError,
            "Masked: expected logits that are its head's output, got others: this model "
            "transforms its logits; turn chunked_loss off",
        )


def test_a_model_that_scales_by_one_is_not() -> None:
    torch.manual_seed(0)
    with chunked_loss(frozen(_of("Granite", logits_scaling=1.0))):
        pass


class Penalised(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Adds to the loss."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Llama's, and a constant."""
        output = super().forward(*args, labels=labels, **kwargs)
        output.loss = output.loss + 1
        return output


class Unlabelled(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Names no labels."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Llama's."""
        return super().forward(input_ids, **kwargs)


def test_another_loss_is_refused() -> None:
    model = model_of("Llama")
    model.loss_function = lambda logits, labels, vocab_size, **others: logits.sum()
    with unchanged(model):
        refused(
            chunked_loss(model).__enter__,
            ConfigError,
            "loss_function: expected transformers' ForCausalLMLoss, got <lambda>; turn chunked_loss off",
        )
    penalised = frozen(Penalised(tiny_llama().config))
    with unchanged(penalised):
        refused(
            chunked_loss(penalised).__enter__,
            ConfigError,
            "Penalised: expected a loss that is the cross-entropy of its logits, got another; "
            "turn chunked_loss off",
        )
    unlabelled = frozen(Unlabelled(tiny_llama().config))
    refused(
        chunked_loss(unlabelled).__enter__,
        ConfigError,
        "Unlabelled: expected a forward that takes labels, got none; turn chunked_loss off",
    )
    mixture = model_of("Llama")
    mixture.config.output_router_logits = True
    refused(
        chunked_loss(mixture).__enter__,
        ConfigError,
        "output_router_logits: expected False, got True, which adds a term to the loss; set it to False, "
        "or turn chunked_loss off",
    )


def test_another_head_is_refused() -> None:
    model = model_of("Llama")
    wrapper = nn.Sequential(model)
    refused(
        chunked_loss(wrapper).__enter__,
        TargetError,
        "model: expected a transformers model, got Sequential; enter chunked_loss with the model itself, "
        "before it is wrapped",
    )
    trained = model_of("Llama")
    trained.lm_head.requires_grad_(True)
    tail = "expected a frozen parameter, got requires_grad=True; freeze it (a tied embedding too), "
    refused(
        chunked_loss(trained).__enter__,
        TargetError,
        f"output head's weight: {tail}or turn chunked_loss off",
    )
    hooked = model_of("Llama")
    hooked.lm_head.register_forward_hook(lambda *_: None)
    refused(
        chunked_loss(hooked).__enter__,
        TargetError,
        "output head: expected no hooks, got some; remove them, or turn chunked_loss off",
    )
    with chunked_loss(model):
        refused(
            chunked_loss(model).__enter__,
            TargetError,
            "output head: expected no hooks, got some; remove them, or turn chunked_loss off",
        )
    adapted = tiny_llama()
    inject(adapted, LoraConfig(target_modules=("lm_head",)))
    kind = type(adapted.lm_head).__name__
    refused(
        chunked_loss(adapted).__enter__,
        TargetError,
        f"output head: expected a torch.nn.Linear, got {kind}; leave it out of the adapter's targets, "
        "or turn chunked_loss off",
    )
    parametrised = model_of("Llama")
    nn.utils.parametrizations.weight_norm(parametrised.lm_head)
    parametrised.lm_head.requires_grad_(False)
    refused(
        chunked_loss(parametrised).__enter__,
        TargetError,
        "output head's weight: expected a plain parameter, got Tensor; leave the head unquantised, "
        "or turn chunked_loss off",
    )
    refused(
        chunked_loss(model, chunk_bytes=0).__enter__,
        ConfigError,
        "chunk_bytes: expected an integer of at least 1, got 0; give the bytes",
    )


def test_an_output_without_names_is_refused() -> None:
    model, inputs = model_of("Llama"), batch_of()
    with chunked_loss(model):
        refused(
            lambda: model(**inputs, return_dict=False),
            ConfigError,
            "return_dict: expected True, got False; ask for an output by name, or turn chunked_loss off",
        )
