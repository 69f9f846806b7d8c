"""Fine-tune a model with LoRA: data in, an adapter folder in PEFT's format out."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loracle.files import output_folder
from loracle.files.atomic import check_output_folder
from loracle.reference import ConfigError

from .checkpoints import Checkpoints, State
from .chunked_loss import chunked_loss
from .data import Example, read_examples
from .distributed import World, joined
from .encoded import EncodedData, EncodingSettings
from .event_log import EventLog, check_tensorboard
from .inject import inject
from .labels import collect_labels
from .loading import LoadedModel, check_model_source, load_model, native_bf16, quiet_transformers
from .options import FinetuneOptions
from .results import FinetuneResult, write_results
from .tasks import Task, task_named
from .trainer import AdapterTrainer, Observers, Progress
from .training_set import held_out_batches, training_set


def finetune(options: FinetuneOptions, progress: Progress | None = None) -> FinetuneResult:
    """Train A and B of the targeted layers beside frozen weights and write them to ``options.out``.

    The loss is the cross-entropy of what the task labels; the optimizer AdamW, with LoRA+'s learning rates
    where asked. Written, all or nothing: ``adapter_config.json``, ``adapter_model.safetensors``,
    ``training.json`` (options, versions, result), ``loss.csv`` and ``loss.png``. The model's folder is only
    read. On the CPU the same options on the same machine give the same adapter, bit for bit, also when the
    run was interrupted, at whatever moment, and resumed (with ``torch_compile`` not when it was resumed).

    Checkpoints lie in ``<out>.checkpoints`` while the run lasts, and after an interruption.

    Started by ``torchrun`` or ``accelerate launch`` the processes train together, one a device; the first
    writes, every one returns the result. torch's global generators are left as they were.

    Args:
        options: see `FinetuneOptions`.
        progress: called on the first process with (steps done, steps in all, last loss or None).

    Raises:
        DataError: a line of the data is malformed.
        FileError: the model or the data is missing, ``out`` is not empty, or a write failed.
        TargetError: no layer matches the targets.
        ConfigError: ``resume`` finds a run with other options, or an option does not suit the model, the
            task, the processes or what is installed, such as a compiler.
        NonFiniteError: the loss diverged.
    """
    with joined() as world, _own_generators(world):
        return _run(options, world, progress)


@dataclass(frozen=True)
class _Inputs:
    task: Task
    examples: Sequence[Example]
    held_out: Sequence[Example] | None


@dataclass(frozen=True)
class _Learner:
    loaded: LoadedModel
    data: EncodedData
    held_out: EncodedData | None


def _run(options: FinetuneOptions, world: World, progress: Progress | None) -> FinetuneResult:
    checkpoints = Checkpoints(options.out)
    with world.together():
        inputs = _read(options)
        if world.main:
            check_output_folder(options.out)
            if options.tensorboard is not None:
                check_tensorboard()
    bf16 = native_bf16(world.device) if options.bf16 is None else options.bf16
    identity = _identity(options, bf16, world)
    with world.together():
        _check_same(world, world.gather(identity))
    state: State | None = None
    with world.together():
        if world.main:
            state = checkpoints.open(identity, resume=options.resume)
    state = world.from_main(state)
    success = False
    try:
        with world.together(), quiet_transformers():
            learner = _prepared(options, inputs, bf16)
        with _watched(options, world, progress, state) as observers, _chunked(options, learner):
            trainer = _trainer(options, world, inputs.task, learner, bf16, checkpoints, observers, state)
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
        result = _result(options, world, trainer, learner, bf16, seconds)
        adapter = trainer.adapter()
        with world.together():
            if world.main:
                with output_folder(options.out) as folder:
                    write_results(folder, adapter, options, result, trainer.curve)
        success = True
    finally:
        if world.main:
            checkpoints.close(success=success)
    return result


def _read(options: FinetuneOptions) -> _Inputs:
    task = task_named(options.task)
    examples = read_examples(options.data, task.forms)
    held_out = None if options.eval_data is None else read_examples(options.eval_data, task.forms)
    check_model_source(options.model)
    return _Inputs(task, examples, held_out)


def _prepared(options: FinetuneOptions, inputs: _Inputs, bf16: bool) -> _Learner:
    task = inputs.task
    labels = collect_labels(inputs.examples, str(options.data)) if task.classes else None
    loaded = load_model(options.model, bf16=bf16, task=task, labels=labels, seed=options.seed)

    def encoded(examples: Sequence[Example], source: Path) -> EncodedData:
        length = loaded.longest(options.max_length)
        settings = EncodingSettings(length, str(source), loaded.labels, loaded.token_types)
        return task.encode(loaded.tokenizer, examples, settings)

    data, held_out = encoded(inputs.examples, options.data), None
    if inputs.held_out is not None and options.eval_data is not None:
        held_out = encoded(inputs.held_out, options.eval_data)
    config = options.lora_config()
    if loaded.modules_to_save:
        config = replace(config, modules_to_save=loaded.modules_to_save)
    inject(loaded.model, config, generator=torch.Generator().manual_seed(options.seed))
    return _Learner(loaded, data, held_out)


def _trainer(
    options: FinetuneOptions,
    world: World,
    task: Task,
    learner: _Learner,
    bf16: bool,
    checkpoints: Checkpoints,
    observers: Observers,
    state: State | None,
) -> AdapterTrainer:
    model, tokenizer, held_out = learner.loaded.model, learner.loaded.tokenizer, learner.held_out
    # The chunks are inside the model's own loss.
    trained = replace(task, loss=_models_loss) if options.chunked_loss else task
    data = training_set(
        trained,
        learner.data,
        model,
        tokenizer,
        seed=options.seed,
        packing=options.packing,
        max_length=options.max_length,
        mask_probability=options.mask_probability,
    )
    measure: Callable[[nn.Module], dict[str, Any]] | None = None
    if held_out is not None:

        def measure(model: nn.Module) -> dict[str, Any]:
            batches = held_out_batches(
                task,
                held_out,
                tokenizer,
                options.batch_size,
                seed=options.seed,
                mask_probability=options.mask_probability,
            )
            return task.measure(model, batches, world.device)

    return AdapterTrainer(
        model,
        options,
        data,
        bf16=bf16,
        world=world,
        checkpoints=checkpoints,
        measure=measure,
        observers=observers,
        state=state,
    )


def _models_loss(model: nn.Module, inputs: Mapping[str, Tensor], items: Tensor | int | None) -> Tensor:
    divisor: dict[str, Any] = {} if items is None else {"num_items_in_batch": items}
    loss: Tensor = model(**inputs, **divisor).loss
    return loss


def _chunked(options: FinetuneOptions, learner: _Learner) -> Any:
    return chunked_loss(learner.loaded.model) if options.chunked_loss else nullcontext()


@contextmanager
def _watched(
    options: FinetuneOptions, world: World, progress: Progress | None, state: State | None
) -> Iterator[Observers]:
    if not world.main:
        yield Observers()
        return
    log = None
    if options.tensorboard is not None:
        log = EventLog(options.tensorboard, 0 if state is None else state.curve.done)
    try:
        yield Observers(progress, log)
    finally:
        if log is not None:
            log.close()


def _result(
    options: FinetuneOptions,
    world: World,
    trainer: AdapterTrainer,
    learner: _Learner,
    bf16: bool,
    seconds: float,
) -> FinetuneResult:
    curve, rows = trainer.curve, learner.data.examples
    first = curve.evaluations[0] if curve.evaluations else None
    kept = next((one for one in reversed(curve.evaluations) if one.step == trainer.kept), None)
    labels = learner.loaded.labels
    parameters = list(trainer.model.parameters())
    return FinetuneResult(
        adapter=options.out,
        task=options.task,
        labels=None if labels is None else labels.names,
        steps=curve.done,
        best_step=trainer.kept,
        seconds=seconds,
        losses=tuple(step.loss for step in curve.steps),
        evaluations=tuple(curve.evaluations),
        eval_before=None if first is None else first.loss,
        eval_after=None if kept is None else kept.loss,
        metrics={} if kept is None else dict(kept.metrics),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        examples=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        learned=sum(row.learned for row in rows),
        shortened=learner.data.shortened,
        left_out=learner.data.left_out,
        bf16=bf16,
        world_size=world.size,
    )


def _check_same(world: World, identities: Sequence[Mapping[str, Any]]) -> None:
    for rank, identity in enumerate(identities):
        for name, value in identity.items():
            if identities[0][name] != value:
                raise ConfigError(
                    f"{name}: expected {identities[0][name]!r} on every process, as on rank 0, "
                    f"got {value!r} on rank {rank}; start all with the same options and data"
                )


def _identity(options: FinetuneOptions, bf16: bool, world: World) -> dict[str, Any]:
    files = {"data_sha256": options.data, "eval_data_sha256": options.eval_data}
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path is not None
    }
    return {**options.identity(), **digests, "bf16": bf16, "world_size": world.size}


@contextmanager
def _own_generators(world: World) -> Iterator[None]:
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        yield
