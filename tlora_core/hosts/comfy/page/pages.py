"""Sends events to the pages that can take them. A page that is still loading knows none of ours, and complains of
each."""

import threading
from typing import Any

from server import PromptServer

_lock = threading.Lock()
_listening: dict[str, Any] = {}  # by client id, the socket; one that is opened again after a reload is another


def listen(client: str | None) -> None:
    """From now on `tell` reaches this page, until its socket closes. `client` is the id that the host knows it by;
    without a socket of that id nothing happens."""
    sockets = getattr(getattr(PromptServer, "instance", None), "sockets", {})
    with _lock:
        for gone in [known for known, socket in _listening.items() if sockets.get(known) is not socket]:
            del _listening[gone]
        if client is not None and client in sockets:
            _listening[client] = sockets[client]


def tell(event: str, data: dict[str, Any]) -> None:
    """Queues the event, whose data are JSON values, for each page that listens. Does nothing without a server."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    with _lock:
        clients = [client for client, socket in _listening.items() if server.sockets.get(client) is socket]
    for client in clients:
        server.send_sync(event, data, client)
