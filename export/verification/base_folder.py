"""The folder of a base model that is named by its folder or by its name on a hub."""

from __future__ import annotations

from pathlib import Path

from loracle.reference import FileError

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")


def base_folder(source: str | Path) -> Path:
    """Return the folder itself; or that of the hub's cache, into which what is missing is downloaded.

    Args:
        source: a folder; or OWNER/NAME, of which the newest revision that can be reached is taken.

    Raises FileError: there is no such folder, and no model of the name in the cache or on the hub.
    """
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from loracle.torch_impl.loading import check_model_source

    check_model_source(str(source))
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(_FILES)))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        said = " ".join(str(error).split())
        raise FileError(
            f"{source}: expected a model folder, or a model's name on a hub that can be reached, got: {said}"
        ) from error
