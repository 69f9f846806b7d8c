"""A model's body under torch.compile: all of it but the head and the loss."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from loracle.reference import ConfigError


def compile_body(
    model: Any, *, backend: str | Callable[..., Any] = "inductor", mode: str | None = None
) -> None:
    """Let torch compile what stands before the head when it is first called, in place.

    The head and the loss are left out: they see the labelled tokens alone, another number of them in every
    batch, and so would be compiled for ever. Lengths may change: after the second the code is for any.

    Args:
        model: of transformers.
        backend, mode: of ``torch.compile``. In the mode ``"reduce-overhead"`` a gradient may lie in memory
            that the next pass overwrites: a step is one pass then.
    """
    getattr(model, "base_model", model).compile(backend=backend, mode=mode)


def uncompiled(*, compiled: bool) -> AbstractContextManager[Any]:
    """Within the block compiled modules, where there are any, run as they are: for a few batches compiling
    takes longer."""
    # To ask for it loads the compiler.
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def compiler_errors(*, compiled: bool) -> Iterator[None]:
    """Raise ConfigError for what torch cannot compile, where it is to."""
    if not compiled:
        yield
        return
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        raise ConfigError(
            "torch_compile: expected a model and a compiler that torch.compile can use, got "
            f"{type(cause).__name__}: {reason}; install a C++ compiler and, for a GPU, triton, "
            "or leave torch_compile out"
        ) from error
