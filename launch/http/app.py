"""The front door as an ASGI application: paths, errors, health. What an answer holds is in endpoints.py."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from launch.http.access import Access
from launch.http.answers import problem
from launch.http.book import Refused
from launch.http.endpoints import Endpoints
from launch.http.health import Health
from launch.http.metrics import Metrics
from launch.http.openapi import openapi
from launch.http.operators import Operators
from launch.http.service import Service

log = logging.getLogger(__name__)

Handler = Callable[[HttpRequest], Awaitable[Response]]


def make_app(service: Service, health: Health, metrics: Metrics, operators: Operators, access: Access) -> Starlette:
    """The application over a service."""
    endpoints = Endpoints(service)

    async def live(request: HttpRequest) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(request: HttpRequest) -> Response:
        found = health.report()
        return JSONResponse(found, 200 if found["ready"] else 503)

    async def schema(request: HttpRequest) -> Response:
        return JSONResponse(openapi(service.names[0]))

    def user(path: str, handler: Handler, method: str) -> Route:
        return Route(path, _checked(access.check_user, handler), methods=[method])

    def operator(path: str, handler: Handler, *methods: str) -> Route:
        return Route(path, _checked(access.check_operator, handler), methods=list(methods))

    def refused(request: HttpRequest, error: Any) -> Response:
        metrics.refused(error.status)
        headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(problem(error.status, error.message, error.param), error.status, headers)

    routes = [
        user("/v1/completions", endpoints.completions, "POST"),
        user("/v1/chat/completions", endpoints.chat, "POST"),
        user("/v1/models", endpoints.models, "GET"),
        user("/v1/models/{name:path}", endpoints.model, "GET"),
        user("/tokenize", endpoints.tokenize, "POST"),
        user("/detokenize", endpoints.detokenize, "POST"),
        Route("/health", live, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/openapi.json", schema, methods=["GET"]),
        Route("/", operators.page, methods=["GET"]),  # holds no figures; /status does
        operator("/status", operators.status, "GET"),
        operator("/metrics", operators.metrics, "GET"),
        operator("/placement", operators.placement, "GET"),
        operator("/profile", operators.profile, "GET", "POST"),
        operator("/migrations", operators.migrations, "GET", "POST"),
    ]
    return Starlette(routes=routes, exception_handlers={Refused: refused, HTTPException: _http, Exception: _failed})


def _checked(check: Callable[[HttpRequest], None], handler: Handler) -> Handler:
    async def answer(request: HttpRequest) -> Response:
        check(request)
        return await handler(request)

    return answer


def _http(request: HttpRequest, error: Any) -> Response:
    words = {404: f"no such path: {request.url.path[:200]}", 405: f"{request.method}: not a method of this path"}
    message = words.get(error.status_code, str(error.detail))
    return JSONResponse(problem(error.status_code, message), error.status_code, error.headers)


def _failed(request: HttpRequest, error: Any) -> Response:
    words = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    log.error("%s %s cannot be answered (%s)", request.method, request.url.path[:200], words)
    log.debug("details", exc_info=error)
    return JSONResponse(problem(500, f"cannot be answered ({words})"), 500)
