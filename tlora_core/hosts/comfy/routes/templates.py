"""Route for the thumbnails beside the templates. The template browser asks for them where it gets the templates, and
newer versions of ComfyUI, such as 0.38.1, serve only those, the JSON files."""

from pathlib import Path

from aiohttp import web

PACK = Path(__file__).parents[4]


def add_routes(routes: web.RouteTableDef, pack: Path = PACK) -> None:
    """Adds to the host's routes, before its own for templates, which it adds after loading packs. Where a host still
    serves the folder of each pack, that is asked first, as its path says more."""

    @routes.get("/workflow_templates/{pack}/{name}.jpg")
    async def thumbnail(request):
        pictures = {path.stem: path for path in (pack / "workflows").glob("*.jpg")}
        if request.match_info["pack"] != pack.name or request.match_info["name"] not in pictures:
            raise web.HTTPNotFound
        return web.FileResponse(pictures[request.match_info["name"]])
