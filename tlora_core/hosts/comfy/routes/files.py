"""Routes that describe a file in the loras folders. Names are only looked up in the host's list."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from aiohttp import web

from ....errors import TLoRAError
from ....files.card import read_card, read_thumbnail
from ..files import lora_names, lora_path

_Read = TypeVar("_Read")


def add_routes(routes: web.RouteTableDef) -> None:
    """Adds to the host's routes; the host also serves each of them below /api."""

    @routes.get("/tlora/files")
    async def card(request):
        return web.json_response((await _read(request, read_card)).as_json())

    @routes.get("/tlora/thumbnail")
    async def thumbnail(request):
        picture = await _read(request, read_thumbnail)
        if picture is None:
            raise web.HTTPNotFound(text="The file holds no thumbnail.")
        return web.Response(body=picture, content_type="image/jpeg")


async def _read(request: web.Request, read: Callable[[Path], _Read]) -> _Read:
    """Calls `read` on the file named in the query, in a thread because disks can be slow."""
    name = request.query.get("name", "")
    if name not in await asyncio.to_thread(lora_names):
        raise web.HTTPNotFound(text="There is no such file in the loras folders.")
    try:
        return await asyncio.to_thread(lambda: read(lora_path(name)))
    except (TLoRAError, OSError) as error:
        # The page knows the name already and must not learn the folder.
        reason = (
            str(error) if isinstance(error, TLoRAError) else "it cannot be read; check the disk and its permissions."
        )
        raise web.HTTPUnprocessableEntity(text=reason) from error
