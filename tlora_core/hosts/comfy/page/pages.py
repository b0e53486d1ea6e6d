"""Sends events to the pages that listen. A page that is still loading does not know our events and would log an error
for each."""

import threading
from typing import Any

from server import PromptServer

_lock = threading.Lock()
_listening: dict[str, Any] = {}  # client id -> socket; a reload opens a new socket


def listen(client: str | None) -> None:
    """Makes `tell` reach this page until its socket closes. `client` is the host's id of the page; without a socket of
    that id nothing happens."""
    sockets = getattr(getattr(PromptServer, "instance", None), "sockets", {})
    with _lock:
        for gone in [known for known, socket in _listening.items() if sockets.get(known) is not socket]:
            del _listening[gone]
        if client is not None and client in sockets:
            _listening[client] = sockets[client]


def tell(event: str, data: dict[str, Any]) -> None:
    """Queues the event for each page that listens; `data` holds JSON values. Does nothing without a server."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    with _lock:
        clients = [client for client, socket in _listening.items() if server.sockets.get(client) is socket]
    for client in clients:
        server.send_sync(event, data, client)
