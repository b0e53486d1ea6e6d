"""Sends events to the pages that listen, and to code in this process. A page that is still loading does not know our
events and would log an error for each."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from server import PromptServer

_lock = threading.Lock()
_listening: dict[str, Any] = {}  # client id -> socket; a reload opens a new socket
_hearing: list[Callable[[str, dict[str, Any]], None]] = []  # in this process


def listen(client: str | None) -> None:
    """Makes `tell` reach this page until its socket closes. `client` is the host's id of the page; without a socket of
    that id nothing happens."""
    sockets = getattr(getattr(PromptServer, "instance", None), "sockets", {})
    with _lock:
        for gone in [known for known, socket in _listening.items() if sockets.get(known) is not socket]:
            del _listening[gone]
        if client is not None and client in sockets:
            _listening[client] = sockets[client]


@contextmanager
def heard_by(hear: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """Within the block, calls `hear` with each event and its data, in the thread that tells them, with or without a
    server. `hear` must not ask a run anything, because a run tells its state while it is locked."""
    _hearing.append(hear)
    try:
        yield
    finally:
        _hearing.remove(hear)


def tell(event: str, data: dict[str, Any]) -> None:
    """Queues the event for each page that listens, if there is a server; `data` holds JSON values."""
    for hear in tuple(_hearing):
        hear(event, data)
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    with _lock:
        clients = [client for client, socket in _listening.items() if server.sockets.get(client) is socket]
    for client in clients:
        server.send_sync(event, data, client)
