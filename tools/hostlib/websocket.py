"""A WebSocket client (RFC 6455) just large enough to listen to ComfyUI's events."""

from __future__ import annotations

import base64
import os
import socket
import struct

TEXT, CLOSE, PING, PONG = 0x1, 0x8, 0x9, 0xA


class WebSocket:
    """A connection that yields whole text messages; binary ones (previews) are dropped."""

    def __init__(self, host: str, port: int, path: str, timeout: float = 10):
        self._socket = socket.create_connection((host, port), timeout)
        self._buffer = b""
        self._fragments: list[bytes] = []
        self._opcode = 0
        self._handshake(host, port, path)

    def _handshake(self, host: str, port: int, path: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self._socket.sendall(request.encode())
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise ConnectionError(f"the server refused the WebSocket: {head[:80]!r}")

    def receive(self, timeout: float) -> str | None:
        """The next text message, or None when `timeout` seconds pass without one."""
        self._socket.settimeout(timeout)
        while True:
            frame = self._take_frame()
            if frame is None:
                try:
                    self._fill()
                except TimeoutError:
                    return None
                continue
            message = self._handle(*frame)
            if message is not None:
                return message

    def _fill(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data

    def _take_frame(self) -> tuple[bool, int, bytes] | None:
        """Cut one whole frame (final, opcode, payload) off the buffer, if there is one."""
        data = self._buffer
        if len(data) < 2:
            return None
        length, start = data[1] & 0x7F, 2
        if length >= 126:
            size, code = (2, ">H") if length == 126 else (8, ">Q")
            if len(data) < 2 + size:
                return None
            (length,) = struct.unpack_from(code, data, 2)
            start = 2 + size
        if len(data) < start + length:
            return None
        self._buffer = data[start + length :]
        return bool(data[0] & 0x80), data[0] & 0x0F, data[start : start + length]

    def _handle(self, final: bool, opcode: int, payload: bytes) -> str | None:
        if opcode == PING:
            self._send(PONG, payload)
        elif opcode == CLOSE:
            raise ConnectionError("the server closed the connection")
        elif opcode < CLOSE:
            if opcode:
                self._opcode, self._fragments = opcode, []
            self._fragments.append(payload)
            if final and self._opcode == TEXT:
                return b"".join(self._fragments).decode()
        return None

    def _send(self, opcode: int, payload: bytes) -> None:
        """Send one short control frame; a client has to mask what it sends."""
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
