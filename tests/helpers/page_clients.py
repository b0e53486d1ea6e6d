"""Stand-ins for the pages of a browser, and requests to the pack's routes."""

import asyncio
import json


class Pages:
    """Replaces the host's server, and keeps what it is asked to send."""

    def __init__(self):
        self.sent = []
        self.sockets = {"page": object(), "still loading": object()}

    def send_sync(self, event, data, sid=None):
        self.sent.append((event, json.loads(json.dumps(data, allow_nan=False)), sid))


def opened_pages(monkeypatch):
    """Two pages, of which one listens."""
    from tlora_core.hosts.comfy.page import pages

    monkeypatch.setattr(pages, "_listening", {})
    monkeypatch.setattr(pages.PromptServer, "instance", Pages(), raising=False)
    pages.listen("page")
    return pages.PromptServer.instance


def ask(*requests, add_routes=None):
    """Status and body of each (method, path, headers), from the live routes, or others, in a real web server."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    from tlora_core.hosts.comfy.routes import training as live_routes

    async def run():
        app, routes = web.Application(), web.RouteTableDef()
        (add_routes or live_routes.add_routes)(routes)
        app.add_routes(routes)
        async with TestClient(TestServer(app)) as client:
            answers = []
            for method, path, headers in requests:
                if headers.get("Origin") == "own":
                    headers = {"Origin": str(client.make_url("")).rstrip("/")}
                async with client.request(method, path, headers=headers) as answer:
                    answers.append((answer.status, await answer.read()))
            return answers

    return asyncio.run(run())
