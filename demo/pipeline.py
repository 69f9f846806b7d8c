"""One task of the demo, from its text to its report: fine-tune, merge, deploy, verify, answer, measure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loracle.export import DecoderSession, Deployment, export, verify
from loracle.export.names import DATA_FILE
from loracle.export.task_names import task_file
from loracle.export.unmerged import export_unmerged
from loracle.files import write_merged_checkpoint
from loracle.torch_impl import FinetuneOptions, finetune

from .answers import HeldOut, answer, read_heldout
from .report import TaskReport, first_examples
from .scores import Scores, chrf, paired_bootstrap, rouge_l
from .settings import Task
from .speed import measure_decode, switch_seconds
from .tasks import TaskFiles

#: Shows that a stage runs: `stage(title)` opens it and yields `advance(done, total)`.
Stage = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

_SCORES = {"chrF": chrf, "ROUGE-L": rouge_l}
_DECODED = 32


@dataclass(frozen=True)
class Folders:
    """Where a task's results go, below the demo's folder: `deployment` is every task's."""

    adapter: Path
    merged: Path
    unmerged: Path
    deployment: Path

    @staticmethod
    def of(root: Path, task: Task) -> Folders:
        home = root / task.name
        return Folders(home / "adapter", home / "merged", home / "unmerged", root / "deployment")


def run_task(task: Task, files: TaskFiles, model: Path, root: Path, stage: Stage) -> TaskReport:
    """Run `task`; the first brings the base into the deployment.

    Args:
        files: the task's training and held-out text.
        model: folder of the base checkpoint.
        root: the demo's folder; the task writes below `root/<name>`, and its merged tensors into
            `root/deployment`.

    Raises:
        LoracleError: a stage was given something wrong. A failed check is in the report.
    """
    folders = Folders.of(root, task)
    folders.adapter.parent.mkdir()
    options = task.training
    with stage(f"{task.name}: fine-tuning") as advance:
        tuned = finetune(
            FinetuneOptions(
                model=str(model),
                data=files.train,
                out=folders.adapter,
                rank=options.rank,
                alpha=options.alpha,
                targets=options.targets,
                max_steps=options.max_steps,
                lr=options.lr,
                batch_size=options.batch_size,
                max_length=options.max_length,
                seed=options.seed,
                save_steps=0,
            ),
            progress=lambda step, steps, _: advance(step, steps),
        )
    with stage(f"{task.name}: merging") as advance:
        write_merged_checkpoint(model, folders.adapter, folders.merged, progress=advance)
    with stage(f"{task.name}: deploying") as advance:
        export(model, folders.deployment, folders.adapter, form="swappable", name=task.name, progress=advance)
    with stage(f"{task.name}: verifying"):
        checks = [
            *verify(folders.deployment, model, folders.adapter, name=task.name).checks,
            *verify(folders.merged, model, folders.adapter).checks,
        ]
    heldout = read_heldout(files.heldout)
    with stage(f"{task.name}: answers of the base model") as advance:
        deployment = Deployment(folders.deployment)
        base_answers = answer(deployment, None, heldout, task.max_new_tokens, advance)
    with stage(f"{task.name}: answers of the tuned model") as advance:
        tuned_answers = answer(deployment, task.name, heldout, task.max_new_tokens, advance)
    before, after = (_score(task, given, heldout) for given in (base_answers, tuned_answers))
    with stage(f"{task.name}: decode speed") as advance:
        export_unmerged(model, folders.adapter, folders.unmerged)
        prompt = deployment.text.encode_prompt(heldout.prompts[0], system=heldout.system)
        switch = switch_seconds(deployment, task.name, len(prompt) + _DECODED)
        del deployment
        models = {
            "base": partial(_opened, folders.deployment, None),
            "merged": partial(_opened, folders.deployment, task.name),
            "unmerged": partial(DecoderSession, folders.unmerged),
        }
        speeds = measure_decode(models, prompt, prompt[:_DECODED], progress=advance)
        shutil.rmtree(folders.unmerged)  # made to be measured, not to be used
    return TaskReport(
        task=task,
        origin=files.origin,
        train_rows=files.train_rows,
        heldout_rows=files.heldout_rows,
        quality=paired_bootstrap(before, after),
        before=tuple(map(float, before.sentences)),
        after=tuple(map(float, after.sentences)),
        losses=tuned.losses,
        training_seconds=tuned.seconds,
        trainable_parameters=tuned.trainable,
        total_parameters=tuned.total,
        adapter_bytes=(folders.adapter / "adapter_model.safetensors").stat().st_size,
        model_bytes=(folders.deployment / DATA_FILE).stat().st_size,
        task_bytes=task_file(folders.deployment, task.name).stat().st_size,
        switch_seconds=switch,
        checks=tuple(checks),
        speeds=speeds,
        examples=first_examples(
            heldout.prompts,
            (base_answers, tuple(map(float, before.sentences))),
            (tuned_answers, tuple(map(float, after.sentences))),
            heldout.references,
        ),
    )


def _opened(folder: Path, name: str | None, capacity: int) -> DecoderSession:
    """A decoder of a task, or of the base, in a session of its own."""
    return Deployment(folder).decoder(name, capacity)


def _score(task: Task, answers: tuple[str, ...], heldout: HeldOut) -> Scores:
    return _SCORES[task.metric](answers, heldout.references)
