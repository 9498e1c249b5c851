"""The front door as an ASGI application: paths, errors, health. What an answer holds is in endpoints.py."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from launch.http.answers import problem
from launch.http.book import Refused
from launch.http.endpoints import Endpoints
from launch.http.health import Health
from launch.http.service import Service

log = logging.getLogger(__name__)

Handler = Callable[[HttpRequest], Awaitable[Response]]


def make_app(service: Service, health: Health) -> Starlette:
    """The application over a service."""
    endpoints = Endpoints(service)

    async def live(request: HttpRequest) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(request: HttpRequest) -> Response:
        found = health.report()
        return JSONResponse(found, 200 if found["ready"] else 503)

    routes = [
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
        Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        Route("/detokenize", endpoints.detokenize, methods=["POST"]),
        Route("/health", live, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers={Refused: _refused, HTTPException: _http, Exception: _failed})


def _refused(request: HttpRequest, error: Any) -> Response:
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else None
    return JSONResponse(problem(error.status, error.message, error.param), error.status, headers)


def _http(request: HttpRequest, error: Any) -> Response:
    words = {404: f"no such path: {request.url.path[:200]}", 405: f"{request.method}: not a method of this path"}
    message = words.get(error.status_code, str(error.detail))
    return JSONResponse(problem(error.status_code, message), error.status_code, error.headers)


def _failed(request: HttpRequest, error: Any) -> Response:
    words = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    log.error("%s %s cannot be answered (%s)", request.method, request.url.path[:200], words)
    log.debug("details", exc_info=error)
    return JSONResponse(problem(500, f"cannot be answered ({words})"), 500)
