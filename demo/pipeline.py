"""One task of the demo, from its text to its report: fine-tune, merge, export, verify, answer, measure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from loracle.export import TextModel, export, verify
from loracle.export.names import DATA_FILE
from loracle.export.unmerged import export_unmerged
from loracle.files import write_merged_checkpoint
from loracle.torch_impl import FinetuneOptions, finetune

from .answers import HeldOut, answer, read_heldout
from .report import TaskReport, first_examples
from .scores import Scores, chrf, paired_bootstrap, rouge_l
from .settings import Task
from .speed import measure_decode
from .tasks import TaskFiles

#: Shows that a stage runs: `stage(title)` opens it and yields `advance(done, total)`.
Stage = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

_SCORES = {"chrF": chrf, "ROUGE-L": rouge_l}
_DECODED = 32


@dataclass(frozen=True)
class Folders:
    """Where one task's results go, below the demo's folder."""

    adapter: Path
    merged: Path
    onnx: Path
    unmerged: Path

    @staticmethod
    def of(root: Path, task: Task) -> Folders:
        home = root / task.name
        return Folders(home / "adapter", home / "merged", home / "onnx", home / "unmerged")


def run_task(task: Task, files: TaskFiles, model: Path, base: Path, root: Path, stage: Stage) -> TaskReport:
    """Run `task` on the shared base.

    Args:
        files: the task's training and held-out text.
        model: folder of the base checkpoint; `base`: the base model exported.
        root: the demo's folder; the task writes below `root/<name>`.

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
    with stage(f"{task.name}: exporting") as advance:
        export(model, folders.onnx, folders.adapter, progress=advance)
    with stage(f"{task.name}: verifying"):
        checks = [
            check
            for candidate in (folders.onnx, folders.merged)
            for check in verify(candidate, model, folders.adapter).checks
        ]
    heldout = read_heldout(files.heldout)
    with stage(f"{task.name}: answers of the base model") as advance:
        base_answers = answer(base, heldout, task.max_new_tokens, advance)
    with stage(f"{task.name}: answers of the tuned model") as advance:
        tuned_answers = answer(folders.onnx, heldout, task.max_new_tokens, advance)
    before, after = (_score(task, given, heldout) for given in (base_answers, tuned_answers))
    with stage(f"{task.name}: decode speed") as advance:
        export_unmerged(model, folders.adapter, folders.unmerged)
        graphs = {"base": base, "merged": folders.onnx, "unmerged": folders.unmerged}
        prompt = TextModel(base).encode_prompt(heldout.prompts[0], system=heldout.system)
        speeds = measure_decode(graphs, prompt, prompt[:_DECODED], progress=advance)
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
        model_bytes=(folders.onnx / DATA_FILE).stat().st_size,
        checks=tuple(checks),
        speeds=speeds,
        examples=first_examples(
            heldout.prompts,
            (base_answers, tuple(map(float, before.sentences))),
            (tuned_answers, tuple(map(float, after.sentences))),
            heldout.references,
        ),
    )


def _score(task: Task, answers: tuple[str, ...], heldout: HeldOut) -> Scores:
    return _SCORES[task.metric](answers, heldout.references)
