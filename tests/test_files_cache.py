"""Where the cache is."""

from pathlib import Path

import pytest

from loracle.files import cache_folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LORACLE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/loracle")),
        ({"HOME": "/home/someone"}, Path("/home/someone/.cache/loracle")),
    ],
)
def test_cache_folder(variables: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORACLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == expected
