"""`loracle verify`: is this the base model with that adapter merged?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracle.reference import CheckError, ConfigError, FileError

from ..guard import one_line_errors
from ..new_file import check_new_file
from ..options import Adapter, Debug, Json, Model, TrustRemoteCode
from ..progress import bar

if TYPE_CHECKING:
    from loracle.export.verification.certificate import Certificate

if TYPE_CHECKING:
    from loracle.export.verification.trained import LoralibLayers


def command(
    candidate: Annotated[
        Path, typer.Argument(help="ONNX folder, file of a task, or folder of a merged checkpoint.")
    ],
    model: Model,
    adapter: Adapter = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The task in the folder; left out, the base model.")
    ] = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record", help="Where all passes, let `loracle tasks` say so of the task; else no longer."
        ),
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Text file with a prompt a line, instead of our own.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="r of a loralib state dict, given as --adapter FILE.pt.", min=1),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="lora_alpha of a loralib state dict.")
    ] = None,
    fan_in_fan_out: Annotated[
        bool, typer.Option("--fan-in-fan-out", help="Layers of a loralib state dict store (in, out).")
    ] = False,
    enable_lora: Annotated[
        list[str] | None,
        typer.Option("--enable-lora", help="Of a loralib MergedLinear: its name and flags, as c_attn=1,0,1."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Examples as for finetune: perplexity or accuracy of base, trained model and candidate.",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", help="How many examples of the data, from the first.", min=1)
    ] = None,
    base_onnx: Annotated[
        Path | None,
        typer.Option(
            "--base-onnx",
            help="The base model's graph by the exporter of CANDIDATE, where that is not loracle; the "
            "candidate's must be the same, node for node.",
        ),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--rounded",
            help="Whether only the correctly rounded merge passes, or every merge whose roundings are inside "
            "their bound. By default what loracle has exported must be correctly rounded.",
        ),
    ] = None,
    outputs: Annotated[
        bool | None,
        typer.Option(
            "--outputs/--no-outputs",
            help="Whether an ONNX model's answers are compared with the unmerged model's in float64. By "
            "default where that fits into memory.",
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="File to write the certificate to, as JSON.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="File to write the certificate to, as a page for people.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove that CANDIDATE is the base model with the adapter merged: its graph, its bits, its answers."""
    with one_line_errors(debug):
        from loracle.export.verification.certificate import certificate_bytes, certificate_of
        from loracle.export.verification.task_verification import task_in_path
        from loracle.export.verification.verify import verify

        from ..verify_text import print_report

        folder, task = task_in_path(candidate, name)
        if record and task is None:
            raise ConfigError("--record: expected a task of a deployment, got none; give its --name")
        lines = None if prompts is None else _lines(prompts)
        writers = _writers(certificate, html, (candidate, model, adapter, prompts, data, base_onnx))
        with bar("comparing tensors", quiet=as_json) as advance:
            report = verify(
                candidate,
                model,
                adapter,
                name=name,
                loralib=_loralib(rank, alpha, fan_in_fan_out, enable_lora or []),
                prompts=lines,
                exact=exact,
                outputs=outputs,
                data=data,
                rows=rows,
                base_graph=base_onnx,
                digests=as_json or bool(writers),
                trust_remote_code=trust_remote_code,
                progress=advance,
            )
        if record and task is not None:
            from loracle.export.task_changes import record_verification

            record_verification(folder, task, report)
        if report.inputs:
            given = {
                "name": name,
                "rank": rank,
                "alpha": alpha,
                "fan_in_fan_out": fan_in_fan_out or None,
                "enable_lora": None if enable_lora is None else " ".join(enable_lora),
                "prompts": None if prompts is None else str(prompts),
                "data": None if data is None else str(data),
                "rows": rows,
                "base_onnx": None if base_onnx is None else str(base_onnx),
                "exact": exact,
                "outputs": outputs,
                "trust_remote_code": trust_remote_code or None,
            }
            certified = certificate_of(report, given)
            for write in writers:
                write(certified)
            if as_json:
                typer.echo(certificate_bytes(certified).decode(), nl=False)
        if not as_json:
            print_report(report)
        if not report.passed:
            raise typer.Exit(CheckError.exit_code)


def _writers(
    certificate: Path | None, html: Path | None, inputs: Iterable[Path | None]
) -> list[Callable[[Certificate], None]]:
    """What writes the certificate where that is asked for."""
    read = [path for path in inputs if path is not None]
    writers: list[Callable[[Certificate], None]] = []
    if certificate is not None:
        from loracle.export.verification.certificate import write_certificate

        check_new_file("--certificate", certificate, read)
        writers.append(partial(write_certificate, certificate))
    if html is not None:
        from loracle.export.verification.certificate_page import write_page

        check_new_file("--html", html, read)
        writers.append(partial(write_page, html))
    return writers


def _lines(path: Path) -> tuple[str, ...]:
    lines = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not lines:
        raise FileError(f"{path}: expected a prompt a line, found none")
    return lines


def _loralib(
    rank: int | None, alpha: float | None, fan_in_fan_out: bool, enable_lora: list[str]
) -> LoralibLayers | None:
    from loracle.export.verification.trained import LoralibLayers

    if rank is None and alpha is None and not fan_in_fan_out and not enable_lora:
        return None
    if rank is None or alpha is None:
        raise ConfigError(
            "--rank, --alpha: expected both for a loralib state dict; give them as it was trained"
        )
    return LoralibLayers(rank, alpha, fan_in_fan_out, dict(map(_flags, enable_lora)))


def _flags(told: str) -> tuple[str, tuple[bool, ...]]:
    name, _, flags = told.partition("=")
    values = flags.split(",")
    if not name or not set(values) <= {"0", "1"}:
        raise ConfigError(f"--enable-lora: expected a module and its flags, as c_attn=1,0,1, got {told!r}")
    return name, tuple(value == "1" for value in values)
