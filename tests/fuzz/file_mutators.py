"""Changes of safetensors files, ONNX graphs and pickles that leave the rest of the file whole."""

import io
import json
import pickletools
import random
import zipfile
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from .bytes_mutators import INTEGERS, mutate_bytes
from .json_mutators import TEXTS, change, is_deep, spelled, text_for

_DTYPES = (
    "BOOL",
    "U8",
    "I8",
    "U16",
    "I16",
    "U32",
    "I32",
    "U64",
    "I64",
    "F8_E4M3",
    "F8_E5M2",
    "F16",
    "BF16",
    "F32",
    "F64",
    "C64",
)
_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
}


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Return a file with another header, of the right length; or other offsets or data; or other bytes."""
    kind = rng.randrange(10)
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:end])
    except (ValueError, RecursionError):
        return mutate_bytes(rng, content)
    data = content[end:]
    if kind < 2 or is_deep(content[:end]):
        return mutate_bytes(rng, content)
    if kind < 6:
        header = change(rng, header)
    elif isinstance(header, dict):
        data = _other_tensors(rng, header)
    text = spelled(header)
    return len(text).to_bytes(8, "little") + text + (data if kind < 9 else mutate_bytes(rng, data))


def _other_tensors(rng: random.Random, header: dict[str, Any]) -> bytes:
    """Give tensors in a header other names, dtypes and shapes, with offsets for them; return data."""
    tensors = [
        (name, own) for name, own in header.items() if name != "__metadata__" and isinstance(own, dict)
    ]
    metadata = header.get("__metadata__")
    header.clear()
    if metadata is not None:
        header["__metadata__"] = metadata
    offset = 0
    changes = {rng.randrange(len(tensors)) for _ in range(rng.choice((1, 1, 2)))} if tensors else set()
    for number, (name, own) in enumerate(tensors):
        dtype, shape = own.get("dtype", "F32"), own.get("shape")
        shape = [size for size in shape if isinstance(size, int)] if isinstance(shape, list) else []
        if number in changes:
            kind = rng.randrange(6)
            if kind == 0:
                name = text_for(rng, name)
            elif kind == 1:
                dtype = rng.choice(_DTYPES)
            elif kind == 2:
                shape = [
                    rng.choice((0, 1, 2, 3, 5)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 40, 70)))
                ]
            elif kind == 3 and shape:
                shape[rng.randrange(len(shape))] += rng.choice((-1, 1, 2))
            elif kind == 4:
                shape.reverse()
            else:
                continue
        count = 1
        for size in shape:
            count *= size
        nbytes = max(0, min(count * (_SIZES.get(dtype, 8) if isinstance(dtype, str) else 8), 1 << 16))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    kind = rng.randrange(4)
    return bytes(offset) if kind == 0 else b"\xff" * offset if kind == 1 else rng.randbytes(offset)


def mutate_onnx(rng: random.Random, content: bytes) -> bytes:
    """Return a graph with other fields somewhere in it; or other bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError:  # one change has been too many
        return mutate_bytes(rng, content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        messages = list(_messages(model))
        _change_field(rng, rng.choice(messages), messages)
    try:
        return bytes(model.SerializeToString())
    except ValueError:  # deeper than the library writes
        return content


def _messages(message: Message) -> list[Message]:
    found = [message]
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for child in value if field.is_repeated else (value,):
                found += _messages(child)
    return found


def _change_field(rng: random.Random, message: Message, messages: list[Message]) -> None:
    present = [field for field, _ in message.ListFields()]
    every = list(message.DESCRIPTOR.fields)
    field = rng.choice(present if present and rng.random() < 0.8 else every)
    if field.is_repeated:
        _change_list(rng, getattr(message, field.name), field, messages)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if rng.random() < 0.5:
            message.ClearField(field.name)
        else:
            own = getattr(message, field.name)
            others = [other for other in messages if other.DESCRIPTOR == own.DESCRIPTOR and other is not own]
            if others:
                copy = type(own)()
                copy.CopyFrom(rng.choice(others))
                own.CopyFrom(copy)
    elif rng.random() < 0.2:
        message.ClearField(field.name)
    else:
        value = _scalar(rng, field, getattr(message, field.name))
        try:
            setattr(message, field.name, value)
        except (ValueError, TypeError):
            message.ClearField(field.name)


def _change_list(rng: random.Random, values: Any, field: FieldDescriptor, messages: list[Message]) -> None:
    kind = rng.randrange(5)
    if kind == 0 and len(values):
        del values[rng.randrange(len(values))]
    elif kind == 1 and len(values):
        at = rng.randrange(len(values))
        values.extend([values[at]] * rng.choice((1, 1, 2, 20)))
    elif kind == 2 and len(values) > 1:
        order = list(values)
        rng.shuffle(order)
        copies = [_copy(value) for value in order]
        del values[:]
        values.extend(copies)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        others = [other for other in messages if field.message_type == other.DESCRIPTOR]
        if others:
            values.append(_copy(rng.choice(others)))
        else:
            values.add()
    else:
        value = _scalar(rng, field, values[0] if len(values) else None)
        try:
            if len(values) and kind == 3:
                values[rng.randrange(len(values))] = value
            else:
                values.append(value)
        except (ValueError, TypeError):
            del values[:]


def _copy(value: Any) -> Any:
    if not isinstance(value, Message):
        return value
    copy = type(value)()
    copy.CopyFrom(value)
    return copy


def _scalar(rng: random.Random, field: FieldDescriptor, value: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        text = (
            text_for(rng, value or "")
            if rng.random() < 0.6
            else rng.choice((*TEXTS, "model.onnx_data", "../x", "-1", str(2**63)))
        )
        return text.encode("utf-8", "replace").decode()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return mutate_bytes(rng, value or b"x")
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return rng.choice((0.0, 1.0, -1.0, float("nan"), float("inf"), 1e30))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice(range(0, 30))
    number = rng.choice((*INTEGERS, -1, -(2**63), 3, 16, 20))
    if isinstance(value, int) and rng.random() < 0.4:
        number = value + rng.choice((-1, 1))
    if field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_SINT32):
        return (number + 2**31) % 2**32 - 2**31 if rng.random() < 0.3 else number % 32
    return (number + 2**63) % 2**64 - 2**63


def mutate_pickled(rng: random.Random, content: bytes) -> bytes:
    """Return a file of torch.save with another pickle in a whole archive; or other bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    if not content.startswith(b"PK"):
        return _other_operations(rng, content)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError):
        return mutate_bytes(rng, content)
    kind = rng.randrange(6)
    name = next((name for name in records if name.endswith("data.pkl")), "")
    compression = zipfile.ZIP_STORED
    if kind < 4 and name:
        records[name] = _other_operations(rng, records[name])
    elif kind == 4:
        own = rng.choice(list(records))
        records[own] = mutate_bytes(rng, records[own])
    else:
        compression = zipfile.ZIP_DEFLATED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for own, record in records.items():
            archive.writestr(own, record)
    return buffer.getvalue()


def _other_operations(rng: random.Random, content: bytes) -> bytes:
    """Change operations of the first pickle in the content: leave out, repeat, exchange, alter."""
    try:
        starts = [at for _, _, at in pickletools.genops(content)]
    except Exception:  # noqa: BLE001  whatever it is, it is no pickle
        return mutate_bytes(rng, content)
    end = starts[-1] + 1
    pieces = [content[start:stop] for start, stop in zip(starts, [*starts[1:], end], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(pieces))
        kind = rng.randrange(6)
        if kind == 0:
            del pieces[at]
            pieces = pieces or [b"."]
        elif kind == 1:
            pieces.insert(at, pieces[rng.randrange(len(pieces))])
        elif kind == 2:
            other = rng.randrange(len(pieces))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif kind == 3:
            pieces.insert(
                at,
                rng.choice(
                    (
                        b"}",
                        b"]",
                        b")",
                        b"(",
                        b"t",
                        b"\x85",
                        b"\x86",
                        b"R",
                        b"b",
                        b"N",
                        b"K\x05",
                        b"J\xff\xff\xff\x7f",
                        b"Q",
                        b"0",
                    )
                ),
            )
        else:
            pieces[at] = pieces[at][:1] + mutate_bytes(rng, pieces[at][1:])
    return b"".join(pieces) + content[end:]
