"""Settings shared by all tests: one deterministic hypothesis profile, and GPU tests only where there is
one."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "loracle",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("loracle")


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
