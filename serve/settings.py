"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from loracle.reference import ConfigError


@dataclass(frozen=True)
class Settings:
    """Where a server listens, and what it takes on.

    Attributes:
        host: the address that it listens on.
        port: 0 is any free one.
        max_batch: most prompts that are answered in step.
        max_batch_tokens: most tokens of a batch, its rows padded to one length; one prompt is always taken.
        max_waiting: most prompts that wait; further ones are refused with 429.
        max_body_bytes: of a request; larger ones are refused with 413.
        max_connections: at a time; further ones are refused with 503.
        timeout: seconds that a request may take, its time in the queue with it.
        grace: seconds that answers under way have when the server is told to stop.

    Raises ConfigError for a value out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 16
    max_batch_tokens: int = 16384
    max_waiting: int = 256
    max_body_bytes: int = 1 << 20
    max_connections: int = 512
    timeout: float = 300.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: expected 0 (any) to 65535, got {self.port}")
        for name in ("max_batch", "max_batch_tokens", "max_waiting", "max_body_bytes", "max_connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.timeout <= 1e6:
            raise ConfigError(f"timeout: expected more than 0 seconds, up to 1e6, got {self.timeout}")
        if not 0 <= self.grace <= 1e6:
            raise ConfigError(f"grace: expected 0 to 1e6 seconds, got {self.grace}")
