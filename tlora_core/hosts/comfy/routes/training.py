"""Routes that show and control training runs. Nothing that a page sends is used as a path."""

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from ..page.pages import listen
from ..page.training import LiveRun
from .pictures import asked_pictures
from .plan import asked_plan

RUN = "/tlora/runs/{run_id}"


def add_routes(routes: web.RouteTableDef) -> None:
    """Adds to the host's routes; the host also serves each of them below /api."""

    @routes.get("/tlora/runs")
    async def runs(request):
        listen(request.query.get("client"))  # before the answer, so that the page misses no event
        return web.json_response(LiveRun.states())

    @routes.post("/tlora/plan")
    async def plan(request):
        return await _of_inputs(request, asked_plan)

    @routes.post("/tlora/pictures")
    async def pictures(request):
        return await _of_inputs(request, asked_pictures)

    @routes.get(RUN + "/validation/{index:[0-9]{1,9}}")
    async def validation(request):
        picture = _run(request).picture(int(request.match_info["index"]))
        if picture is None:
            raise web.HTTPNotFound(text="This run keeps no such picture.")
        return web.Response(body=picture.content, content_type=picture.content_type)

    @routes.post(RUN + "/stop")
    async def stop(request):
        return _answer(_from_our_page(request) and _run(request).request("stop"))

    @routes.post(RUN + "/checkpoint")
    async def checkpoint(request):
        return _answer(_from_our_page(request) and _run(request).request("checkpoint"))


async def _of_inputs(request: web.Request, answer: Callable[[Any], dict[str, Any]]) -> web.Response:
    """What `answer` makes of a node's inputs, in a thread because it reads files."""
    try:
        return web.json_response(await asyncio.to_thread(answer, await request.json()))
    except (ValueError, KeyError, TypeError) as error:
        raise web.HTTPBadRequest(text="These are not a node's inputs.") from error


def _run(request: web.Request) -> LiveRun:
    run = LiveRun.find(request.match_info["run_id"])
    if run is None:
        raise web.HTTPNotFound(text="The server keeps no such run.")
    return run


def _from_our_page(request: web.Request) -> bool:
    """True, or raises 403: another site's page must not control a training. Scripts send neither header."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    # Browsers send the first only over trusted connections, and a proxy may rewrite the second.
    ours = site in ("same-origin", "none") if site else origin is None or origin.split("://")[-1] == request.host
    if not ours:
        raise web.HTTPForbidden(text="Only ComfyUI's own page may do this.")
    return True


def _answer(taken: bool) -> web.Response:
    return web.json_response({"ok": True}) if taken else web.json_response({"error": "The run has ended."}, status=409)
