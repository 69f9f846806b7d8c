"""Whether the outputs of anybody's graph are those of the unmerged model, within its rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files import Adapter
from loracle.reference import ConfigError, ShapeError

from ..encoder_inputs import FROM_PADDING, Feeds, image_inputs, positions_of, text_inputs
from ..names import ATTENTION_MASK, INPUT_IDS, PIXEL_VALUES, TOKEN_TYPE_IDS
from ..opening import open_session
from ..tasks import Task
from ..texts import Texts
from .encoder_check import judge_answers
from .foreign_inputs import Role, read_interface
from .foreign_session import ForeignDecoder, ForeignSession
from .outputs_check import Generated, OutputsResult, generate_with_logits, judged
from .report import Check
from .weight_products import is_quantized, multiplied_dtype

Array = np.ndarray[Any, Any]


def check_foreign_outputs(
    graph_path: Path,
    ir_model: ir.Model,
    task: Task,
    model_dir: str | Path,
    adapter: Adapter | None,
    config: Mapping[str, Any],
    texts: Texts | None,
    new_tokens: int,
    trusted: bool = False,
    *,
    rounded_to: np.dtype[Any] | None = None,
) -> OutputsResult:
    """Run the texts, or images drawn from a seed, through onnxruntime and through the unmerged model in
    float64, and compare: logits or states, and the most likely tokens or classes.

    The bound is that of the dtype which most of the graph's weights are stored or multiplied in, whichever
    is narrower, or of `rounded_to`. A graph of quantised products is measured instead.

    Args:
        graph_path: the graph's file.
        ir_model: its content.
        task: what the model is for.
        model_dir: the base model's folder.
        config: the content of the merged model's `config.json`.
        texts: None for a model of images.
        new_tokens: how many tokens a decoder writes after each text.
        trusted: whether the folder's own modelling code may run.
        rounded_to: the dtype in which weights were merged that the graph holds in a wider one.

    Raises:
        ConfigError: the model has an encoder and a decoder.
        FileError: the graph needs an input that is not understood, or lacks an output, or onnxruntime
            refuses it.
        ShapeError: a text has more tokens than the model has positions.
    """
    from .truth import Float64Model, Truth

    session = open_foreign(graph_path, task, config)
    dtype, quantised = multiplied_dtype(ir_model.graph, rounded_to), is_quantized(ir_model.graph)
    if not task.cached:
        batches, answers = encoder_answers(session, task, texts, config)
        del session
        model = Float64Model(model_dir, adapter, task, config, trusted=trusted)
        return judge_answers(task, batches, answers, model, dtype, quantised=quantised)
    decoder = ForeignDecoder(session)
    prompts = _prompts(decoder, texts, config, new_tokens)
    runs = [generate_with_logits(decoder, prompt, count) for prompt, count in prompts]
    del decoder, session
    model = Float64Model(model_dir, adapter, config=config, trusted=trusted)
    truths = model.evaluate([run.ids[:-1] for run in runs], dtype)
    # Where a prompt's logits are its last position's alone, the tokens before it have none to compare.
    unseen = [len(truth.logits) - len(run.logits) for run, truth in zip(runs, truths, strict=True)]
    runs = [
        Generated(run.ids[skipped:], run.prompt_length - skipped, run.logits)
        for run, skipped in zip(runs, unseen, strict=True)
    ]
    truths = [
        Truth(truth.logits[skipped:], truth.deviation) for truth, skipped in zip(truths, unseen, strict=True)
    ]
    for number, (run, truth) in enumerate(zip(runs, truths, strict=True), 1):
        if run.logits.shape != truth.logits.shape:
            wrong = f"prompt {number}: expected logits {truth.logits.shape}, got {run.logits.shape}"
            return OutputsResult(
                (Check("logits lie inside the derived bound", False, "", (wrong,)),), None, None
            )
    return judged(runs, truths, quantised=quantised)


def open_foreign(graph_path: Path, task: Task, config: Mapping[str, Any]) -> ForeignSession:
    """A session on a graph of a task.

    Raises:
        ConfigError: the model has an encoder and a decoder, or its positions begin elsewhere than at 0.
        FileError: see `read_interface`.
    """
    if task.encoded:
        raise ConfigError(
            f"{graph_path}: expected a model of one graph, got one for {task.name}; verify its weights alone"
        )
    session = open_session(graph_path, reuse=False)
    interface = read_interface(session, graph_path, task.outputs, config)
    if not task.cached and Role.POSITIONS in interface.inputs and config.get("model_type") in FROM_PADDING:
        # Their numbers begin behind that of the padding token, and go on only where there is no padding.
        entry = interface.inputs[Role.POSITIONS]
        raise ConfigError(
            f"{graph_path}: {entry.name}: expected a graph that counts positions itself, got one that is "
            "given them; export the model without it"
        )
    return ForeignSession(session, interface)


def _prompts(
    decoder: ForeignDecoder, texts: Texts | None, config: Mapping[str, Any], new_tokens: int
) -> list[tuple[tuple[int, ...], int]]:
    """The texts and how many tokens are written after each, both cut where the graph reads no more."""
    limit, longest = positions_of(config), decoder.longest
    prompts = []
    for number, text in enumerate(() if texts is None else texts.tokens, 1):
        prompt = text[:longest]
        count = new_tokens if longest is None else min(new_tokens, longest - len(prompt) + 1)
        if limit is not None and len(prompt) + count - 1 > limit:  # the last token is not read
            raise ShapeError(
                f"prompt {number}: expected at most {limit} tokens with its answer, as many as the model has "
                f"positions, got {len(prompt) + count - 1}; shorten it"
            )
        prompts.append((prompt, count))
    return prompts


def encoder_answers(
    session: ForeignSession, task: Task, texts: Texts | None, config: Mapping[str, Any]
) -> tuple[list[Feeds], list[list[Array]]]:
    """What a model without a cache is given, by the names of the model's forward, and what it answers.

    Texts are one batch, padded on the right, where the graph has a mask and takes any batch; else they come
    one by one. Where it reads texts of one length alone, and has no mask, a shorter text is repeated.

    Raises:
        ConfigError: as `one_input`.
        ShapeError: a text has more tokens than the model has positions.
    """
    interface = session.interface
    if Role.PIXELS in interface.inputs:
        pixels = interface.inputs[Role.PIXELS]
        images = [image_inputs(_image_shape(pixels.axes[1:], config), pixels.dtype, interface.rows or 2)]
        return images, [session.run_images(feeds[PIXEL_VALUES])[: len(interface.outputs)] for feeds in images]
    if texts is None:
        raise _no_texts(session)
    names = _names(session)
    batched = session.has(Role.MASK) and interface.rows is None and interface.width is None
    if batched:
        batches = text_inputs(texts, names, config)
    else:
        batches = [_alone(session, texts, row, names, config) for row in range(len(texts.tokens))]
    return batches, [answer(session, task, feeds) for feeds in batches]


def _alone(
    session: ForeignSession, texts: Texts, row: int, names: Sequence[str], config: Mapping[str, Any]
) -> Feeds:
    """One text, cut or repeated where the graph demands a length."""
    width = session.interface.width
    tokens, types = texts.tokens[row][:width], texts.types[row][:width]
    (feeds,) = text_inputs(Texts((tokens,), (types,)), names, config)
    if width is None or session.has(Role.MASK):
        return feeds
    return {name: np.resize(array, (1, width)) for name, array in feeds.items()}


def answer(session: ForeignSession, task: Task, feeds: Mapping[str, Array]) -> list[Array]:
    """The outputs for texts, without what belongs to a length or a batch that the graph demands.

    Raises ShapeError: the graph has no mask, and reads texts of another length.
    """
    interface = session.interface
    rows, length = feeds[INPUT_IDS].shape
    missing = 0 if interface.width is None else interface.width - length
    if missing and not session.has(Role.MASK):
        raise ShapeError(
            f"{interface.graph}: expected a text of {interface.width} tokens, for the graph reads so many "
            f"and has no mask, got {length}; give longer texts"
        )
    copies = 1 if interface.rows is None else interface.rows // rows
    given = {
        name: np.tile(np.pad(array, ((0, 0), (0, missing))), (copies, 1)) for name, array in feeds.items()
    }
    found = session.run_texts(given[INPUT_IDS], given[ATTENTION_MASK], segments=given.get(TOKEN_TYPE_IDS))
    kept = slice(None) if task.pooled else slice(length)
    return [array[:rows, kept] for array in found[: len(interface.outputs)]]


def _image_shape(axes: Sequence[int | str | None], config: Mapping[str, Any]) -> tuple[int, ...]:
    size = config.get("image_size")
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    known = (config.get("num_channels", 3), height, width)
    shape = [length if isinstance(length, int) else own for length, own in zip(axes, known, strict=True)]
    if not all(type(length) is int for length in shape):
        raise ConfigError(f"image_size: expected an integer for the graph's open axes, got {size!r}")
    return tuple(int(length) for length in shape if length is not None)


def one_input(session: ForeignSession, texts: Texts | None, config: Mapping[str, Any]) -> Feeds:
    """The longest text, or images, by the names of the model's forward: as many rows and tokens as the graph
    demands.

    Raises:
        ConfigError: there are no texts for a model that reads some, or nothing tells an image's size.
        ShapeError: the text has more tokens than the model has positions.
    """
    interface = session.interface
    rows = interface.rows or 1
    if Role.PIXELS in interface.inputs:
        pixels = interface.inputs[Role.PIXELS]
        return image_inputs(_image_shape(pixels.axes[1:], config), pixels.dtype, rows)
    if texts is None:
        raise _no_texts(session)
    longest = max(range(len(texts.tokens)), key=lambda number: len(texts.tokens[number]))
    names = _names(session)
    (feeds,) = text_inputs(Texts((texts.tokens[longest],), (texts.types[longest],)), names, config)
    width = interface.width or feeds[INPUT_IDS].shape[1]
    return {name: np.tile(np.resize(array, (1, width)), (rows, 1)) for name, array in feeds.items()}


def run_input(session: ForeignSession, feeds: Mapping[str, Array], more: Sequence[str]) -> list[Array]:
    """The values of some names for what `one_input` returns."""
    if PIXEL_VALUES in feeds:
        found = session.run_images(feeds[PIXEL_VALUES], more)
    else:
        found = session.run_texts(
            feeds[INPUT_IDS], feeds[ATTENTION_MASK], segments=feeds.get(TOKEN_TYPE_IDS), more=more
        )
    return found[len(found) - len(more) :]


def _names(session: ForeignSession) -> list[str]:
    return [INPUT_IDS, ATTENTION_MASK] + [TOKEN_TYPE_IDS] * session.has(Role.SEGMENTS)


def _no_texts(session: ForeignSession) -> ConfigError:
    return ConfigError(f"{session.interface.graph}: expected texts for a model that reads tokens, got none")
