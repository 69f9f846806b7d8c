"""The training loop: adapters learn beside a frozen model, on one device or on several."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loracle.files import Adapter
from loracle.reference import NonFiniteError

from .adapter_io import adapter_of, fill
from .attention import AttentionChoice
from .batches import Row
from .checkpoints import Checkpoints, State
from .compiled import compile_body, compiler_errors, uncompiled
from .curve import Curve, Evaluation, Step
from .distributed import World, defer_sums, shard
from .event_log import EventLog
from .optimizer import AdapterOptimizer, clip
from .options import FinetuneOptions
from .schedule import rate_factor, warmup_steps
from .training_set import TrainingSet

Progress = Callable[[int, int, float | None], None]
"""Called with (steps done, steps in all, the last step's loss, which is None before the first)."""

Measure = Callable[[nn.Module], dict[str, Any]]
"""The model's held-out metrics by name, ``"loss"`` among them."""


@dataclass(frozen=True)
class Observers:
    """Who is told of a run, on its main process.

    Attributes:
        progress: told of every step.
        log: of every step and every evaluation.
    """

    progress: Progress | None = None
    log: EventLog | None = None


class AdapterTrainer:
    """Trains what `inject` has put into a model.

    A step draws ``batch_size * gradient_accumulation`` rows for each process. Its loss is the sum over all
    their labels, on all processes, divided by the number of those labels; so neither accumulation nor the
    number of processes changes what is learned, but for roundings and dropout's masks. Everything random is
    a function of ``options.seed`` and the step: a run that goes on from a `State` repeats, on the CPU and
    uncompiled bit for bit, what it would have done.

    Args:
        model: with adapters injected; it is moved to the device of ``world``.
        options: of the run.
        data: to learn from.
        bf16: autocast to bfloat16.
        checkpoints: where states go; None for none.
        measure: of the held-out data; None where there is none.
        world: the processes that train together.
        observers: told of what happens.
        state: to go on from.
    """

    def __init__(
        self,
        model: nn.Module,
        options: FinetuneOptions,
        data: TrainingSet,
        *,
        bf16: bool,
        world: World,
        checkpoints: Checkpoints | None = None,
        measure: Measure | None = None,
        observers: Observers | None = None,
        state: State | None = None,
    ) -> None:
        self.model = model
        self.options = options
        self.curve = Curve() if state is None else state.curve
        self._data = data
        self._bf16 = bf16
        self._world = world
        self._checkpoints = checkpoints
        self._measure = measure
        self._observers = observers or Observers()
        if state is not None:
            fill(model, state.adapter)
        _prepare(model, options, world)
        self._attention = AttentionChoice(model, bf16=bf16)
        self.optimizer = AdapterOptimizer(model, options.adamw(), options.loraplus())
        self._best: Adapter | None = None
        if state is not None:
            self.optimizer.load_state(state.optimizer)
            if self._keeps_best and self.curve.best is not None:
                self._best = state.adapter if state.best is None else state.best
        self._width = options.batch_size * world.size
        self._examples = self._width * options.gradient_accumulation
        self._sampler: Any = data.sampler(self._examples, options.seed)
        self._order: tuple[int, list[Any]] = (-1, [])
        self.steps_per_epoch = math.ceil(len(data.lengths) / self._examples)
        self.steps = options.max_steps or math.ceil(options.epochs * self.steps_per_epoch)

    def train(self) -> None:
        """Train to the end, or until held-out loss has stopped falling; `curve` has what was measured.

        Raises:
            NonFiniteError: a loss or a gradient was not finite; the step is not taken.
            FileError: a checkpoint cannot be written.
        """
        if self.curve.done == 0 and not self.curve.evaluations:
            self._evaluate()
        if self._observers.progress is not None:
            self._observers.progress(self.curve.done, self.steps, None)
        self.model.train()
        # Compiled, layers share no input.
        if not self.finished and not self.options.torch_compile:
            self._settle()
        while not self.finished:
            with compiler_errors(compiled=self.options.torch_compile):
                step = self._step()
            self.curve.steps.append(step)
            if self._observers.log is not None:
                self._observers.log.step(step)
            if self._observers.progress is not None:
                self._observers.progress(step.step, self.steps, step.loss)
            if self._evaluation_due:
                self._evaluate()
            if self._checkpoint_due:
                self._save()

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the last evaluations have not lowered the loss."""
        patience = self.options.early_stopping_patience
        return self.curve.done >= self.steps or (patience is not None and self.curve.stale() >= patience)

    def adapter(self) -> Adapter:
        """Return what was learned: the adapter of the lowest held-out loss where early stopping is on, else
        the last. Where parameters are sharded this is a collective operation.
        """
        return adapter_of(self.model) if self._best is None else self._best

    @property
    def kept(self) -> int:
        """The steps after which `adapter` was what it is."""
        best = self.curve.best
        return best.step if self._keeps_best and best is not None else self.curve.done

    @property
    def _keeps_best(self) -> bool:
        return self.options.early_stopping_patience is not None

    def _step(self) -> Step:
        number = self.curve.done
        epoch, at = divmod(number, self.steps_per_epoch)
        passes = [self._drawn(draws) for draws in self._draws(epoch, at)]
        counts = [sum(row.learned for row in rows) if mine else 0 for rows, mine in passes]
        (labels,) = self._world.sum(sum(counts))
        # Added up where the losses are: to read one waits for its pass.
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        for index, (rows, mine) in enumerate(passes):
            defer_sums(self.model, index < len(passes) - 1)
            torch.manual_seed(_seed(self.options.seed, number, index, self._world.rank))
            loss = self._loss(rows, max(1, int(labels)))
            # Where a batch has no row for this process it runs another's, for the others' sake, for nothing.
            (loss if mine else loss * 0.0).backward()  # type: ignore[no-untyped-call]
            if mine:
                total += loss.detach().double()
        self._world.sum_gradients(self.optimizer.parameters)
        (mean,) = self._world.sum(float(total))
        norm = clip(self.optimizer.parameters, self.options.max_grad_norm)
        for name, value in (("loss", mean), ("grad_norm", norm)):
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{name}: expected a finite number, got {value} at step {number + 1}; "
                    "lower the learning rate"
                )
        warmup = warmup_steps(self.options.warmup, self.steps)
        factor = rate_factor(self.options.schedule, number, self.steps, warmup)
        self.optimizer.step(factor)
        return Step(number + 1, (number + 1) / self.steps_per_epoch, mean, self.options.lr * factor, norm)

    def _settle(self) -> None:
        """Let layers find out which of them read one input, in two passes of a row that nothing comes of.

        They then compute together, with other roundings: a run that goes on must not do it for its first
        steps as the run before did for its own.
        """
        epoch, at = divmod(self.curve.done, self.steps_per_epoch)
        rows, _ = self._drawn(next(self._draws(epoch, at)))
        for _ in range(2):
            torch.manual_seed(self.options.seed)
            self._loss(rows[:1], 1)

    def _draws(self, epoch: int, step: int) -> Iterator[Sequence[Any]]:
        """Yield, for each pass of the step, what all processes draw together.

        The examples of a step are the same however they are divided into passes and over processes.
        """
        if self._order[0] != epoch:
            self._sampler.set_epoch(epoch)
            self._order = (epoch, list(self._sampler))
        draws = self._order[1][step * self._examples : (step + 1) * self._examples]
        for at in range(0, len(draws), self._width):
            yield draws[at : at + self._width]

    def _drawn(self, draws: Sequence[Any]) -> tuple[list[Row], bool]:
        """Return this process's rows of a batch, and whether there are any; if not, another's row.

        Neighbours in a batch are of similar length, so that every second one makes two like halves.
        """
        mine = draws[self._world.rank :: self._world.size]
        return [self._data.rows[draw] for draw in mine or draws[:1]], bool(mine)

    def _loss(self, rows: Sequence[Row], labels: int) -> Tensor:
        device = self._world.device
        batch = {name: tensor.to(device) for name, tensor in self._data.collate(rows).items()}
        self._attention.choose(batch["input_ids"].shape[1])
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16):
            return self._data.loss(self.model, batch, labels)

    @property
    def _evaluation_due(self) -> bool:
        every = self.options.eval_steps or self.steps_per_epoch
        return self.curve.done % every == 0 or self.curve.done == self.steps

    @property
    def _checkpoint_due(self) -> bool:
        every = self.options.save_steps
        return every > 0 and (self.curve.done % every == 0 or self.finished)

    def _evaluate(self) -> None:
        if self._measure is None:
            return
        device = self._world.device
        self._attention.fuse()
        with (
            uncompiled(compiled=self.options.torch_compile),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16),
        ):
            # Every process evaluates all: a sharded model needs them all. One answer decides for all.
            metrics = self._world.from_main(self._measure(self.model))
        assert metrics is not None
        loss = float(metrics["loss"])
        rest = {name: value for name, value in metrics.items() if name != "loss"}
        evaluation = Evaluation(self.curve.done, loss, rest)
        self.curve.evaluations.append(evaluation)
        if self._observers.log is not None:
            self._observers.log.evaluation(evaluation)
        if self._keeps_best and self.curve.best is evaluation:
            self._best = adapter_of(self.model)

    def _save(self) -> None:
        adapter, optimizer = adapter_of(self.model), self.optimizer.state()
        with self._world.together():
            if self._checkpoints is not None and self._world.main:
                kept = self._best if self.kept != self.curve.done else None
                self._checkpoints.save(State(self.curve, adapter, kept, optimizer))


def _prepare(model: Any, options: FinetuneOptions, world: World) -> None:
    # A cache of keys and values is for generation.
    if getattr(model, "config", None) is not None:
        model.config.use_cache = False
    if options.gradient_checkpointing:
        # The name before and since transformers 5.20.
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.fsdp and world.size > 1:
        shard(model, world)
    else:
        model.to(world.device)
    if options.torch_compile:
        compile_body(model)


def _seed(*key: int) -> int:
    """Return a seed for torch that is a function of ``key`` alone."""
    (drawn,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(drawn >> np.uint64(1))
