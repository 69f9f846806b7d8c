"""What every command does with an error: one line on stderr and an exit code, a traceback on request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from loracle.reference import LoracleError

INTERRUPTED = 130
WRONG_INPUT = 2


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn the errors a user can cause into one line and an exit code; let all others through.

    With `debug` nothing is caught, so that Python prints the traceback.
    """
    if debug:
        yield
        return
    try:
        yield
    except LoracleError as error:
        _say(str(error))
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        _say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        raise typer.Exit(WRONG_INPUT) from error
    except ModuleNotFoundError as error:
        _say(f"the package {error.name} is not installed; {_remedy(error.name or '')}")
        raise typer.Exit(WRONG_INPUT) from error
    except KeyboardInterrupt as error:
        _say("interrupted")
        raise typer.Exit(INTERRUPTED) from error


def _remedy(package: str) -> str:
    extras = {
        **dict.fromkeys(("torch", "transformers", "accelerate", "matplotlib"), "torch"),
        **dict.fromkeys(("starlette", "uvicorn", "prometheus_client"), "serve"),
    }
    extra = extras.get(package.split(".")[0], "onnx")
    return f"pip install 'loracle[{extra}]'"


def _say(message: str) -> None:
    line = " ".join(message.split())
    typer.echo(f"error: {line}", err=True)
