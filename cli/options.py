"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path, typer.Option("--model", help="Folder of the base model: config.json and safetensors.")
]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="PEFT adapter folder; left out, the base model itself.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to make; must not exist, or be empty.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let modelling code in the model's folder run; read it first."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
