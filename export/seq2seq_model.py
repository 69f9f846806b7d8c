"""An exported encoder and decoder as files: its graphs opened, what a target begins with, and its positions.

Needs onnxruntime alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from loracle.files.json_file import read_json_object
from loracle.files.sidecar import CONFIG_FILE
from loracle.reference import FileError

from .names import (
    ATTENTION_MASK,
    DECODER_FILE,
    DECODER_WITH_PAST_FILE,
    ENCODER_FILE,
    ENCODER_MASK,
    ENCODER_STATES,
    GENERATION_FILE,
    INPUT_IDS,
    LAST_HIDDEN_STATE,
    LOGITS,
    PAST_LENGTH,
    cross_names,
)
from .opening import DTYPES, open_session

_START = ("decoder_start_token_id", "bos_token_id")
_FORCED = "forced_bos_token_id"
_POSITIONS = "max_position_embeddings"


@dataclass(frozen=True)
class Seq2SeqModel:
    """The graphs of an exported model, opened; several sessions may use them.

    Attributes:
        encoder, first, later: the encoder, the decoder's first step, and its later ones.
        start: the tokens that every target begins with.
        positions: most tokens of a source, and of a target; None where there is no limit.
    """

    encoder: onnxruntime.InferenceSession
    first: onnxruntime.InferenceSession
    later: onnxruntime.InferenceSession
    start: tuple[int, ...]
    positions: int | None

    @property
    def layers(self) -> int:
        """How many the decoder has."""
        return sum(entry.name.endswith(".decoder.key") for entry in self.later.get_inputs())


def is_seq2seq(folder: str | Path) -> bool:
    """Whether a folder holds an exported model with an encoder before its decoder."""
    return Path(folder, ENCODER_FILE).is_file() or Path(folder, DECODER_FILE).is_file()


def open_seq2seq(folder: str | Path, threads: int = 0) -> Seq2SeqModel:
    """Open the three graphs of an exported folder; see `open_session`.

    Raises FileError where a graph is missing, onnxruntime refuses it or it has other inputs or outputs, or
    nothing says what a target begins with.
    """
    folder = Path(folder)
    model = Seq2SeqModel(
        open_session(folder / ENCODER_FILE, threads),
        open_session(folder / DECODER_FILE, threads),
        open_session(folder / DECODER_WITH_PAST_FILE, threads),
        start_tokens(folder),
        _positions(folder),
    )
    _check_interface(model, folder)
    return model


def start_tokens(folder: Path) -> tuple[int, ...]:
    """The tokens that every target begins with: `decoder_start_token_id`, or without one `bos_token_id`, and
    `forced_bos_token_id` where there is one; from `generation_config.json`, or else from `config.json`.

    Raises FileError where there is no first one, or one is no token.
    """
    paths = [folder / name for name in (GENERATION_FILE, CONFIG_FILE)]
    configs = {path: read_json_object(path) for path in paths if path.is_file()}

    def named(key: str) -> int | None:
        for path, config in configs.items():
            token = config.get(key)
            if token is None:
                continue
            if type(token) is not int or token < 0:
                raise FileError(f"{path}: {key}: expected a token, got {token!r}")
            return token
        return None

    first = next((token for key in _START if (token := named(key)) is not None), None)
    if first is None:
        raise FileError(
            f"{folder}: expected decoder_start_token_id in {GENERATION_FILE} or {CONFIG_FILE}, found none"
        )
    forced = named(_FORCED)
    return (first,) if forced is None else (first, forced)


def _positions(folder: Path) -> int | None:
    path = folder / CONFIG_FILE
    found = read_json_object(path).get(_POSITIONS) if path.is_file() else None
    if found is not None and (type(found) is not int or found < 1):
        raise FileError(f"{path}: {_POSITIONS}: expected a positive integer, got {found!r}")
    return found


def _check_interface(model: Seq2SeqModel, folder: Path) -> None:
    """Raise FileError unless inputs and outputs of the graphs are those that `loracle export` gives them."""
    past = [name for _, name in cross_names("past_key_values", model.layers)]
    present = cross_names("present", model.layers)
    if not present:
        raise FileError(
            f"{folder / DECODER_WITH_PAST_FILE}: expected inputs past_key_values.0.decoder.key and so on, "
            "found none; export with `loracle export`"
        )
    own = [name for side, name in present if side == "decoder"]
    expected = {
        ENCODER_FILE: (model.encoder, {INPUT_IDS, ATTENTION_MASK}, [LAST_HIDDEN_STATE]),
        DECODER_FILE: (
            model.first,
            {INPUT_IDS, ENCODER_MASK, ENCODER_STATES},
            [LOGITS, *(name for _, name in present)],
        ),
        DECODER_WITH_PAST_FILE: (model.later, {INPUT_IDS, ENCODER_MASK, PAST_LENGTH, *past}, [LOGITS, *own]),
    }
    for file, (session, inputs, outputs) in expected.items():
        given = [*session.get_inputs(), *session.get_overridable_initializers()]
        names = {entry.name for entry in given}
        results = {entry.name for entry in session.get_outputs()}
        wrong = sorted(names ^ inputs) or sorted(results ^ set(outputs))
        if wrong:
            raise FileError(
                f"{folder / file}: {wrong[0]}: expected the inputs and outputs of an exported encoder and "
                "decoder, got others; export with `loracle export`"
            )
        for entry in (*given, *session.get_outputs()):
            if entry.type != "tensor(int64)" and entry.type not in DTYPES:
                raise FileError(
                    f"{folder / file}: {entry.name}: expected one of {', '.join(DTYPES)}, got {entry.type}; "
                    "export in fp32 or fp16"
                )
