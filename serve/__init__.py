"""A server over a deployment: completions and chat as OpenAI's, the model's name being a task's.

Needs onnxruntime, NumPy, tokenizers, jinja2, starlette, uvicorn and prometheus_client alone.
"""

from __future__ import annotations

from .app import application
from .server import serve
from .service import Service
from .settings import Settings

__all__ = ["Service", "Settings", "application", "serve"]
