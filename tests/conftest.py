"""Settings shared by all tests: one deterministic hypothesis profile, and GPU tests only where there is
one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from loracle.files import cache_folder

# Triton reads this when it is first imported: without a device its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "loracle",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# Where one failure is enough: few examples, and no search for the smallest that fails.
settings.register_profile(
    "mutation",
    parent=settings.get_profile("loracle"),
    max_examples=20,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile(os.environ.get("LORACLE_TEST_PROFILE", "loracle"))


def _cuda_is_there() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is no CUDA device; torch is imported only if there is such
    a test."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _cuda_is_there():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def users_cache() -> Path:
    """Where a real model may have been put, whatever the tests' own cache is."""
    return cache_folder()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(users_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Graphs traced by tests go to a cache of their own, one for the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORACLE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2(users_cache: Path) -> Path:
    """The real 135M-parameter model; fetched where it is not there yet."""
    from loracle.demo.smollm2 import model_folder

    return model_folder(users_cache)
