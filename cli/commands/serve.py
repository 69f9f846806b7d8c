"""`loracle serve`: a deployment's tasks over HTTP, as OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..guard import one_line_errors
from ..options import Debug


def command(
    deployment: Annotated[
        Path, typer.Argument(help="Folder with a base, and tasks in the form swappable, if any.")
    ],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0: any free one.")] = 8000,
    threads: Annotated[int, typer.Option("--threads", help="onnxruntime's threads; 0: its own choice.")] = 0,
    max_batch: Annotated[
        int, typer.Option("--max-batch", help="Most prompts of a task that are answered in step.")
    ] = 16,
    max_batch_tokens: Annotated[
        int, typer.Option("--max-batch-tokens", help="Most tokens of a batch, prompts, answers and padding.")
    ] = 16384,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", help="Most prompts that wait; further ones get 429.")
    ] = 256,
    max_body_bytes: Annotated[
        int, typer.Option("--max-body-bytes", help="Most bytes of a request's body; larger ones get 413.")
    ] = 1 << 20,
    cache_bytes: Annotated[
        int | None,
        typer.Option(
            "--cache-bytes",
            help="Most bytes of tasks in memory, the least recently used go first; left out, all stay.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds that a request may take, waiting included.")
    ] = 300.0,
    grace: Annotated[
        float, typer.Option("--grace", help="Seconds that running answers have to finish, once told to stop.")
    ] = 30.0,
    debug: Debug = False,
) -> None:
    """Serve DEPLOYMENT over HTTP: completions and chat in OpenAI's form, `model` naming the task.

    There is no authentication: whoever reaches the address may ask. SIGTERM and Ctrl-C end it gracefully.
    """
    with one_line_errors(debug):
        from loracle.export.deployment import Deployment
        from loracle.serve import Settings, serve
        from loracle.serve.server import log_to_stderr

        settings = Settings(
            host=host,
            port=port,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            max_waiting=max_waiting,
            max_body_bytes=max_body_bytes,
            timeout=timeout,
            grace=grace,
        )
        opened = Deployment(deployment, threads=threads, max_bytes=cache_bytes)
        log_to_stderr()
        there = ", ".join(opened.tasks) or "none"
        serve(opened, settings, lambda address: typer.echo(f"{address}  tasks: {there}"))
