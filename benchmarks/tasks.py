"""Many tasks of one base: what they take on disk and in memory, what a switch takes, and how fast they are.

The model is SmolLM2-135M in float32, or `--model`; the tasks are seeded adapters of query and value (r=8).

- baked: a folder and a session for each task, each with all weights. It is the yardstick
- A/A control (speeds alone): the same, opened once more
- linked: a folder that has the base's data once, and a session for each task
- linked, not prepacked: the same with `session.disable_prepacking`, so that sessions share the base's pages
- swappable: `loracle.export.Deployment`, one session for all tasks
- adapter inputs: the same with A and B beside the base's weights, unmerged
- genai adapters: onnxruntime-genai with its `Adapters`, on the same folder
- PEFT set_adapter: PEFT's model in torch, with transformers' `generate`

Each way is in a process of its own, with `--threads` threads, and nothing ends an answer early. First a
fresh process for each way and number of tasks, alone on the machine, which opens the base, loads the tasks,
answers once with each, and then switches from task to task:

- disk: bytes of all files that the way needs
- memory: by how much the proportional set size has grown since the packages were imported, once each task has
  answered. The floor of both is one base and the tensors that the tasks change
- load: a task's first time, its files in the page cache
- switch: from the last token of a task's answer until the next one's can be computed, cache and all, with
  every task in memory; with one task, from an answer to the next

Every way must choose baked's tokens, or rounding explain the first other one (`decode_parity`).

Then speed, in rounds, which open every model anew: a way and baked side by side answer in turns, O X X O,
with a short answer that is not timed before each. That was the same task's ("one task"), or another's ("in
turn"); a prefill begins with getting ready for its task. A ratio is baked's seconds over the way's; the
figure is the median over the rounds, with an interval from order statistics. The bound: all weights are read
once a token, as fast as the same number of threads reads an array in the same round.

Needs 13 GB of disk for 16 tasks, and 16 GB of memory.

    python -m benchmarks.tasks [--rounds 6] [--quick] [--ways ...] [--model DIR] [--counts 1 2 4 8 16]
        [--speeds 1 8] [--prompt 128] [--tokens 64] [--threads 2] [--scratch DIR]
        [--out benchmarks/results/tasks.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from loracle.demo.smollm2 import model_folder

from .answer import Answer
from .bandwidth import read_bandwidth
from .interleaved import WARM_TOKENS, Seconds, Times, chain, timed
from .llama_model import LlamaShape, write_llama
from .machine import describe
from .tasks_folders import Folders, Making, make_folders
from .tasks_process import TaskProcess, task_process
from .tasks_report import (
    MODES,
    STAY,
    Held,
    Row,
    checks,
    checks_table,
    differences_table,
    held_row,
    held_table,
    speed_row,
    speed_table,
)
from .tasks_ways import BAKED, CONTROL, WAYS, Opening

TEXT_TOKENS = 24
SWITCHES = 40
_SWITCH_PROMPT = 8
TINY = LlamaShape(64, 2, 4, 2, 128, 512)

Opener = Callable[[str], Opening]
"""What a process of a way opens."""

Key = tuple[str, int, str]
"""A way, a number of tasks, and one of `MODES`."""


def opener(folders: Folders, threads: int, unused: int) -> Opener:
    """The openings of all ways; see `tasks_ways.Opening`."""

    def opening(way: str) -> Opening:
        return Opening(way, folders.graphs[way], folders.adapters, threads, unused)

    return opening


def hold(
    opening: Opening, tasks: Sequence[str], prompt: Sequence[int], new_tokens: int, switches: int
) -> Held:
    """Measure a way with some tasks in a fresh process.

    Raises SystemExit where a task does not answer again as it did before the others were run.
    """
    with task_process(opening) as process:
        before, _ = process.memory()
        opened = process.open()
        loads = [process.load(task) for task in tasks]
        answers = [process.answer(task, prompt, new_tokens) for task in tasks]
        after, resident = process.memory()
        seconds = process.switch(tasks, prompt[:_SWITCH_PROMPT], switches)
        if process.answer(tasks[0], prompt, new_tokens).tokens != answers[0].tokens:
            raise SystemExit(f"{opening.way}: {tasks[0]} answers otherwise after other tasks")
    first = [answer.first for answer in answers]
    texts = [answer.tokens for answer in answers]
    return Held(before, after, resident, opened, loads, first, seconds, texts)


def unused_token(texts: Sequence[Sequence[int]]) -> int:
    """A token that is in none of these texts."""
    held = {token for text in texts for token in text}
    return next(token for token in range(len(held) + 1) if token not in held)


def hold_all(
    folders: Folders, ways: Sequence[str], counts: Sequence[int], threads: int, say: Callable[[str], None]
) -> dict[tuple[str, int], Held]:
    """Measure every way with every number of tasks; baked first, whose texts the others must have.

    Raises SystemExit where baked's tasks all answer the same: a way that never switches would pass then.
    """
    found: dict[tuple[str, int], Held] = {}
    unused = -1
    for way in (BAKED, *ways):
        say(way)
        for count in sorted(counts, reverse=True):
            opening = opener(folders, threads, unused)(way)
            found[way, count] = hold(opening, folders.tasks[:count], folders.prompt, TEXT_TOKENS, SWITCHES)
        if way == BAKED:
            texts = found[BAKED, max(counts)].texts
            unused = unused_token(texts)
            if len(texts) > 1 and len(set(texts)) == 1:
                raise SystemExit("expected tasks that answer differently, got one answer from all")
    return found


def check_parity(folders: Folders, held: Mapping[tuple[str, int], Held]) -> list[dict[str, Any]]:
    """Hold every text against baked's of the same task; return what rounding explains.

    Raises SystemExit where a way computes another model.
    """
    # It imports torch, whose pages would be shared with the processes that were measured.
    from .decode_parity import differences

    prompt = tuple(folders.prompt)
    most = max(count for _, count in held)
    named = {f"{way}, {count} tasks": (way, count) for way, count in held}
    explained = []
    for number, task in enumerate(folders.tasks[:most]):
        own = {prompt: held[BAKED, most].texts[number]}
        others = {(name, prompt): held[key].texts[number] for name, key in named.items() if number < key[1]}
        found = differences(Path(folders.base), Path(folders.adapters) / task, own, others)
        for (name, _), difference in found.items():
            way, count = named[name]
            explained.append({"way": way, "tasks": count, "task": task, **asdict(difference)})
    return explained


@contextmanager
def warm_process(opening: Opening, tasks: Sequence[str], prompt: Sequence[int]) -> Iterator[TaskProcess]:
    """A process in which each of `tasks` has answered."""
    with task_process(opening) as process:
        process.open()
        for task in tasks:
            process.load(task)
        for task in tasks:
            process.answer(task, prompt, WARM_TOKENS)
        yield process


def texts_of(
    opening: Opening, tasks: Sequence[str], prompt: Sequence[int], new_tokens: int
) -> list[tuple[int, ...]]:
    """What each task answers."""
    with warm_process(opening, tasks, prompt) as process:
        return [process.answer(task, prompt, new_tokens).tokens for task in tasks]


def one_after_the_other(process: TaskProcess, tasks: Sequence[str]) -> Callable[[Sequence[int], int], Answer]:
    """Answers, each of the next of `tasks`."""
    following = itertools.cycle(tasks)
    return lambda prompt, new_tokens: process.answer(next(following), prompt, new_tokens)


@dataclass(frozen=True)
class Timing:
    """How answers are timed: a prompt, how many tokens follow it, rounds, and the threads of a process."""

    prompt: Sequence[int]
    new_tokens: int
    rounds: int
    threads: int


def side_by_side(
    own: TaskProcess, other: TaskProcess, tasks: Sequence[str], timing: Timing
) -> tuple[Seconds, list[Seconds], list[Seconds]]:
    """The second's seconds over the first's, and the seconds of both; each answer is of the next task."""
    seconds: tuple[list[Seconds], list[Seconds]] = ([], [])
    first, second = (
        timed(one_after_the_other(process, tasks), timing.prompt, timing.new_tokens, taken)
        for process, taken in zip((own, other), seconds, strict=True)
    )
    (ratio,) = chain(first, [second])
    return ratio, *seconds


def modes(count: int) -> tuple[str, ...]:
    """How so many tasks can follow one another."""
    return MODES if count > 1 else (STAY,)


def measure(
    opening: Opener, ways: Sequence[str], tasks: Sequence[str], counts: Sequence[int], timing: Timing
) -> tuple[dict[Key, Times], list[float]]:
    """Each way's times, and the bandwidth in bytes a second; a number for each round."""
    times = {
        (way, count, mode): Times() for count in counts for mode in modes(count) for way in (BAKED, *ways)
    }
    bandwidths = []
    for round_ in range(timing.rounds):
        bandwidths.append(read_bandwidth(timing.threads))
        seconds: dict[Key, list[Seconds]] = {key: [] for key in times}
        for count in counts:
            some = tasks[:count]
            alone = [some[round_ % count]]
            with warm_process(opening(BAKED), some, timing.prompt) as own:
                for way in ways[:: 1 if round_ % 2 == 0 else -1]:
                    with warm_process(opening(way), some, timing.prompt) as other:
                        for mode in modes(count):
                            chosen = alone if mode == STAY else some
                            (prefill, decode), before, after = side_by_side(own, other, chosen, timing)
                            times[way, count, mode].prefill_ratios.append(prefill)
                            times[way, count, mode].decode_ratios.append(decode)
                            seconds[BAKED, count, mode] += before
                            seconds[way, count, mode] += after
        for key, taken in seconds.items():
            times[key].prefill.append(sum(first for first, _ in taken) / len(taken))
            times[key].decode.append(sum(rest for _, rest in taken) / len(taken))
    return times, bandwidths


def rows_of(
    folders: Folders,
    held: Mapping[tuple[str, int], Held],
    times: Mapping[Key, Times],
    new_tokens: int,
    bandwidths: Sequence[float],
) -> tuple[list[Row], list[Row]]:
    """What the tables show."""
    order = sorted(held, key=lambda key: key[1])  # ways stay in their order
    takes = [
        held_row(way, count, held[way, count], folders.disk[way][count - 1], folders.floor(count))
        for way, count in order
    ]
    lengths = (len(folders.prompt), new_tokens)
    speeds = [
        speed_row(*key, found, lengths, folders.weight_bytes, bandwidths) for key, found in times.items()
    ]
    return takes, speeds


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model, two tasks, one round: does it run? Writes no file unless --out",
    )
    parser.add_argument(
        "--ways", nargs="+", choices=(CONTROL, *WAYS), default=[CONTROL, *WAYS], metavar="WAY"
    )
    parser.add_argument(
        "--model", type=Path, help="a folder of transformers, of Llama's architecture, float32"
    )
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="of tasks")
    parser.add_argument("--speeds", nargs="+", type=int, default=[1, 8], help="numbers of tasks to time")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="a folder for models")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.tokens < 2:
        parser.error(f"--tokens: expected at least 2, got {arguments.tokens}")
    if arguments.quick:
        arguments.counts, arguments.speeds, arguments.rounds = [1, 2], [1, 2], 1
        arguments.prompt, arguments.tokens = 16, 6
    elif arguments.out is None:
        arguments.out = Path("benchmarks/results/tasks.json")
    if (least := min([*arguments.counts, *arguments.speeds])) < 1:
        parser.error(f"--counts, --speeds: expected at least 1 task, got {least}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    say = Console(stderr=True).print
    ways = [way for way in (CONTROL, *WAYS) if way in arguments.ways]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        work = Path(scratch)
        base = arguments.model or (
            write_llama(work / "tiny", TINY) if arguments.quick else model_folder(progress=say)
        )
        say("models")
        most = max([*arguments.counts, *arguments.speeds])
        folders = make_folders(Making(str(base), str(work), [BAKED, *ways], most, arguments.prompt))
        say("memory and switches")
        peers = [way for way in ways if way != CONTROL]
        held = hold_all(folders, peers, arguments.counts, arguments.threads, say)
        say("parity")
        explained = check_parity(folders, held)
        say("speed")
        timing = Timing(folders.prompt, arguments.tokens, arguments.rounds, arguments.threads)
        tasks = folders.tasks[: max(arguments.speeds)]
        opening = opener(folders, arguments.threads, -1)
        texts = texts_of(opening(BAKED), tasks, folders.prompt, arguments.tokens)
        opening = opener(folders, arguments.threads, unused_token(texts))
        times, bandwidths = measure(opening, ways, tasks, arguments.speeds, timing)
    takes, speeds = rows_of(folders, held, times, arguments.tokens, bandwidths)
    result = {
        "machine": describe("onnxruntime", "onnxruntime-genai", "torch", "transformers", "peft"),
        "model": "tiny" if arguments.quick else str(base.name),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "prompt": len(folders.prompt),
        "tokens": arguments.tokens,
        "base_bytes": folders.base_bytes,
        "task_bytes": folders.task_bytes,
        "weight_bytes": folders.weight_bytes,
        "bandwidths": bandwidths,
        "different_answers": len(set(held[BAKED, max(arguments.counts)].texts)),
        "explained_differences": explained,
        "memory": takes,
        "speed": speeds,
        "checks": checks(takes, speeds, folders.base_bytes),
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    # As wide as the tables are, also where the output is no terminal.
    screen = Console(width=160)
    for table in (
        differences_table(explained),
        held_table(takes),
        speed_table(speeds),
        checks_table(result["checks"]),
    ):
        if table.row_count:
            screen.print(table)


if __name__ == "__main__":
    main()
