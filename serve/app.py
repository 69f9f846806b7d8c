"""The routes of the server, as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .answering import respond
from .errors import GONE, RequestError, internal_error
from .forms import ChatForm, CompletionForm, Form, model_object
from .metrics import CONTENT_TYPE
from .service import Service
from .tasks import BASE, names, unknown_task
from .watch import MODEL_ROUTE, Watched

LOG = logging.getLogger("loracle.serve")

# Seconds that the worker has to end the step that it is at.
_LAST_STEP = 10.0


def application(service: Service) -> Starlette:
    """The application. It answers from when its lifespan begins."""
    started = int(time.time())

    def answering(form: Form) -> Route:
        async def answer(request: Request) -> Response:
            return await respond(service, form, request)

        path = "/v1/chat/completions" if isinstance(form, ChatForm) else "/v1/completions"
        return Route(path, answer, methods=["POST"])

    # Plain functions run in threads: they look at the folder, and wait for a task that is being loaded.
    def models(request: Request) -> Response:
        there = [*service.deployment.tasks]
        found = [*there, *({BASE} - set(there))]
        return JSONResponse({"object": "list", "data": [model_object(name, started) for name in found]})

    def model(request: Request) -> Response:
        name = request.path_params["model"]
        if name not in names(service.deployment):
            raise unknown_task(name, service.deployment.tasks)
        return JSONResponse(model_object(name, started))

    def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def health(request: Request) -> Response:
        alive = service.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def ready(request: Request) -> Response:
        return JSONResponse(
            {"status": "ready" if service.ready else "not ready"}, 200 if service.ready else 503
        )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.scheduler.start()
        try:
            yield
        finally:
            service.scheduler.stop()
            await asyncio.to_thread(service.scheduler.join, _LAST_STEP)
            service.preparing.shutdown(wait=False)

    routes = [
        answering(CompletionForm()),
        answering(ChatForm()),
        Route("/v1/models", models),
        Route(f"{MODEL_ROUTE}{{model}}", model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Watched, metrics=service.metrics, routes=frozenset(route.path for route in routes))
        ],
        exception_handlers={
            RequestError: _refuse,
            HTTPException: _refuse_route,
            ClientDisconnect: _gone,
            Exception: _fail,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body, error.status, error.headers)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_path", 405: "wrong_method"}.get(error.status_code)
    refused = RequestError(error.status_code, error.detail, code=code, headers=error.headers)
    return await _refuse(request, refused)


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads it; the log tells."""
    return Response(status_code=GONE)


async def _fail(request: Request, error: Exception) -> Response:
    """A fault of ours, which starlette raises again, so that it is in the log with its traceback."""
    failure = internal_error()
    return JSONResponse(failure.body, failure.status)
