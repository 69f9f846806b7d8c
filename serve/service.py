"""A deployment behind a server: what requests are turned into, and what has been counted."""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from loracle.export.context import context_length
from loracle.export.deployment import Deployment
from loracle.reference import ConfigError, DataError

from .asked import Asked, chat_asked, completion_asked
from .batches import BatchLimits
from .errors import RequestError, shutting_down, wrong
from .forms import ChatForm, Form
from .job import Job
from .json_body import parse_object
from .metrics import Metrics
from .rows import Row
from .scheduler import Scheduler
from .settings import Settings
from .tasks import names, unknown_task

LOG = logging.getLogger("loracle.serve")

_NEW_TOKENS = 128


@dataclass(frozen=True)
class Prepared:
    """A request that can be answered.

    Attributes:
        asked: what for.
        task: of whom; None is the base.
        rows: its prompts.
    """

    asked: Asked
    task: str | None
    rows: tuple[Row, ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(row.prompt) for row in self.rows)


class Service:
    """What the routes share.

    Args:
        deployment: a decoder's, with a tokenizer.
        settings: its limits.

    Attributes:
        draining: no request is taken any more.

    Raises:
        FileError: the deployment's model is no decoder, or has no tokenizer.
    """

    def __init__(self, deployment: Deployment, settings: Settings) -> None:
        self.deployment = deployment
        self.settings = settings
        self.metrics = Metrics()
        self.draining = False
        self.text = deployment.text
        self._vocabulary = deployment.decoder(None, 1).vocabulary
        self.context = context_length(deployment.folder) or settings.max_batch_tokens
        self.scheduler = Scheduler(
            deployment,
            BatchLimits(settings.max_batch, settings.max_batch_tokens, self.context),
            settings.max_waiting,
            self.metrics.batch_rows.observe,
        )
        # Parsing and tokenizing a large body takes a while, and must not hold up the event loop.
        self.preparing = ThreadPoolExecutor(1, "loracle-prepare")
        watch = self.metrics.watch
        watch("loracle_waiting_prompts", "Prompts that wait.", lambda: self.scheduler.waiting)
        watch("loracle_running_prompts", "Prompts being answered.", lambda: self.scheduler.running)
        watch("loracle_loaded_tasks", "Tasks in memory.", lambda: len(deployment.loaded))
        watch("loracle_loaded_bytes", "Bytes of tasks in memory.", lambda: deployment.loaded_bytes)

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self.scheduler.alive and not self.draining

    def require_ready(self) -> None:
        """Raise RequestError, 503, where no request is taken."""
        if not self.ready:
            raise shutting_down()

    def prepare(self, form: Form, body: bytes, job: Job) -> Prepared:
        """What a request asks for, checked, with its prompts as tokens. Takes time: not for the event loop.

        Raises RequestError: 400 or 404.
        """
        found = parse_object(body)
        if isinstance(form, ChatForm):
            asked = chat_asked(found)
        else:
            asked = completion_asked(found, self.settings.max_waiting)
        there = names(self.deployment)
        if asked.model not in there:
            raise unknown_task(asked.model, self.deployment.tasks)
        task = there[asked.model]
        seen: Counter[tuple[int, ...]] = Counter()
        rows = []
        for index, prompt in enumerate(self._prompts(asked)):
            # Equal prompts of one request get different answers.
            seed = asked.sampling.seed + seen[prompt]
            seen[prompt] += 1
            stop, strings = self.text.stop_rules(asked.stop)
            rows.append(
                Row(
                    index,
                    task,
                    prompt,
                    self._max_tokens(asked, len(prompt)),
                    replace(asked.sampling, seed=seed),
                    stop,
                    self.text.answer(strings),
                    job.send,
                )
            )
        return Prepared(asked, task, tuple(rows))

    def _prompts(self, asked: Asked) -> list[tuple[int, ...]]:
        """The prompts' tokens. Raises RequestError: the model cannot read one."""
        field = "messages" if asked.messages else "prompt"
        if asked.messages:
            try:
                texts = [self.text.chat(asked.messages)]
            except (ConfigError, DataError) as error:
                raise RequestError(
                    400, f"messages: {error}", param="messages", code="invalid_value"
                ) from error
        else:
            texts = list(asked.prompts)
        found = []
        for text in texts:
            tokens = tuple(self.text.encode(text, add_special_tokens=not asked.messages))
            if not tokens or max(tokens) >= self._vocabulary:
                got = "others" if tokens else "none"
                raise wrong(field, f"expected some text of the model's tokens, got {got}")
            found.append(tokens)
        return found

    def _max_tokens(self, asked: Asked, prompt: int) -> int:
        """Most tokens of an answer. Raises RequestError: the model's context has not so many beside the
        prompt."""
        room = self.context - prompt
        wanted = asked.max_tokens
        if room < (wanted or 1):
            field = "messages" if asked.messages else "prompt"
            raise RequestError(
                400,
                f"the prompt has {prompt} tokens and the answer may have {wanted or 1}: expected at most "
                f"{self.context} together, the model's context; shorten one of them",
                param=field if room < 1 else asked.limit_field,
                code="context_length_exceeded",
            )
        return min(_NEW_TOKENS, room) if wanted is None else wanted
