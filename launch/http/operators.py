"""What operators ask for: metrics, placement, profile, migrations, and what the page at / shows."""

import asyncio
import base64
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response

from launch.cluster.framing import MessageError
from launch.http.book import Refused
from launch.http.endpoints import read_body
from launch.http.health import Health
from launch.http.metrics import CONTENT_TYPE, Metrics
from launch.http.service import Service
from launch.migration.control import ask
from placement import InputError

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'"
)
_MIGRATION_FIELDS = ("placement", "memory", "dry")


class Operators:
    """Args: state: the folder of the record, where experts migrate; secret: of the cluster."""

    def __init__(self, service: Service, health: Health, metrics: Metrics, state: Path | None, secret: bytes) -> None:
        self._service, self._health, self._metrics = service, health, metrics
        self._state, self._secret = state, secret
        self._page = (files("launch.http") / "page.html").read_text(encoding="utf-8")

    async def page(self, request: HttpRequest) -> Response:
        return HTMLResponse(self._page, headers={"content-security-policy": _POLICY, "x-frame-options": "DENY"})

    async def metrics(self, request: HttpRequest) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def status(self, request: HttpRequest) -> Response:
        """All that the page shows."""
        service, now = self._service, time.monotonic()
        under_way = [
            {
                "id": accepted.number,
                "seconds": round(now - accepted.accepted_at, 1),
                "prompt_tokens": len(accepted.request.prompt),
                "tokens": len(accepted.tokens),
                "max_tokens": min(accepted.request.max_tokens, service.config.max_position),
            }
            for accepted in service.book
        ]
        supervisor = service.supervisor
        return JSONResponse(
            {
                **self._health.report(),
                "model": service.names[0],
                "servers": list(supervisor.servers),
                "under_way": under_way,
                "stats": supervisor.stats,
            }
        )

    async def placement(self, request: HttpRequest) -> Response:
        return JSONResponse(await self._asked("placement"))

    async def profile(self, request: HttpRequest) -> Response:
        """POST {"action": "start" | "stop"}; GET is what was counted, as `profile.npz`."""
        if request.method == "GET":
            data = base64.b64decode((await self._asked("profile", action="dump"))["npz"])
            headers = {"content-disposition": 'attachment; filename="profile.npz"'}
            return Response(data, media_type="application/octet-stream", headers=headers)
        action = (await read_body(request)).get("action")
        if action not in ("start", "stop"):
            raise Refused(400, 'action: must be "start" or "stop"', "action")
        return JSONResponse(await self._asked("profile", action=action))

    async def migrations(self, request: HttpRequest) -> Response:
        """GET is how they stand; POST {"what": "plan" | "to" | "memory" | "abort", …} is what `migrate` asks for."""
        if request.method == "GET":
            return JSONResponse(await self._control({"what": "status"}))
        body = await read_body(request)
        if body.get("what") not in ("plan", "to", "memory", "abort"):
            raise Refused(400, 'what: must be "plan", "to", "memory" or "abort"', "what")
        given = {name: body[name] for name in _MIGRATION_FIELDS if body.get(name) is not None}
        return JSONResponse(await self._control({"what": body["what"], **given}))

    async def _control(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._state is None:
            raise Refused(409, "experts do not migrate here; start with --state, and ask the first server")
        state = self._state
        try:
            return await asyncio.to_thread(lambda: ask(state, message, self._secret))
        except InputError as error:
            raise Refused(409, " ".join(str(error).split())) from None

    async def _asked(self, what: str, **fields: Any) -> dict[str, Any]:
        try:
            reply = await self._service.supervisor.ask(what, **fields)
        except MessageError as error:
            raise Refused(503, str(error), retry_after=5) from None
        if "error" in reply:
            raise Refused(409, reply["error"])
        return reply["reply"]
