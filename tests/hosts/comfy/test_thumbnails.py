"""The thumbnails beside the templates, which newer hosts no longer serve themselves."""

from urllib.parse import quote

from page_clients import ask
from places import REPO

PICTURES = sorted((REPO / "workflows").glob("*.jpg"))


def get(*paths):
    """Status and body of each from a server whose host serves templates alone, as newer ones do."""
    return ask(*(("GET", f"/workflow_templates/{path}", {}) for path in paths), add_routes=routes_of_a_newer_host)


def routes_of_a_newer_host(routes):
    from aiohttp import web

    from tlora_core.hosts.comfy.routes.templates import add_routes

    add_routes(routes)

    @routes.get("/workflow_templates/{pack}/{file}")
    async def template(request):
        if not request.match_info["file"].endswith(".json"):
            raise web.HTTPNotFound
        return web.Response(text="the host's")


def test_every_template_has_its_thumbnail(comfy):
    assert PICTURES
    answers = get(*(f"{REPO.name}/{quote(path.name)}" for path in PICTURES))
    assert answers == [(200, path.read_bytes()) for path in PICTURES]


def test_all_else_is_left_to_the_host(comfy):
    template = quote(next((REPO / "workflows").glob("*.json")).name)
    assert {body for _, body in get(f"{REPO.name}/{template}", f"another_pack/{template}")} == {b"the host's"}
    outside = f"{REPO.name}/..%2Fdocs%2Fscreenshots%2F{next((REPO / 'docs').rglob('*.png')).stem}.jpg"
    for status, _ in get(f"another_pack/{quote(PICTURES[0].name)}", f"{REPO.name}/none.jpg", outside):
        assert status == 404


def test_folder_of_the_pack_may_have_another_name(comfy, tmp_path, folder="my T-LoRA"):
    from tlora_core.hosts.comfy.routes.templates import add_routes

    (tmp_path / folder / "workflows").mkdir(parents=True)
    (tmp_path / folder / "workflows" / "a.jpg").write_bytes(b"picture")
    path = f"/workflow_templates/{quote(folder)}/a.jpg"
    answers = ask(("GET", path, {}), add_routes=lambda routes: add_routes(routes, tmp_path / folder))
    assert answers == [(200, b"picture")]


def test_host_that_serves_the_folders_of_packs_serves_those_of_others(comfy, tmp_path):
    from tlora_core.hosts.comfy.routes.templates import add_routes

    (tmp_path / "a.jpg").write_bytes(b"another pack's")

    def with_static(routes):
        add_routes(routes)
        routes.static("/workflow_templates/another_pack", tmp_path)

    assert ask(("GET", "/workflow_templates/another_pack/a.jpg", {}), add_routes=with_static)[0] == (
        200,
        b"another pack's",
    )
