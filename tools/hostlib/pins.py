"""Reads tools/host_pins.json, the only place where versions are pinned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import HostError

REPO = Path(__file__).resolve().parents[2]
PINS_FILE = REPO / "tools" / "host_pins.json"


@dataclass(frozen=True)
class HostPins:
    """Everything one host version is built from."""

    version: str
    sdist: str
    sha256: str
    torch: tuple[str, ...]
    constraints: tuple[str, ...]


def read_pins() -> dict:
    return json.loads(PINS_FILE.read_text(encoding="utf-8"))


def default_version() -> str:
    return read_pins()["default_host"]


def host_pins(version: str | None = None) -> HostPins:
    pins = read_pins()
    version = version or pins["default_host"]
    if version not in pins["hosts"]:
        raise HostError(f"ComfyUI {version} is not a supported host version; choose one of {', '.join(pins['hosts'])}.")
    host = pins["hosts"][version]
    return HostPins(
        version=version,
        sdist=host["sdist"],
        sha256=host["sha256"],
        torch=tuple(pins["torch"]),
        constraints=tuple(pins["torch"] + pins["constraints"] + host.get("constraints", [])),
    )


def pack_pins() -> tuple[str, ...]:
    """Versions of what the pack's own requirements.txt asks for."""
    return tuple(read_pins()["pack"])


def ray_pin() -> str:
    return read_pins()["ray"]


def newest_frontend_pin() -> str:
    """The interface that users have who update it by itself, ahead of every pinned host."""
    return read_pins()["newest_frontend"]


def test_pins() -> tuple[str, ...]:
    return tuple(read_pins()["tests"])


def fast_pins() -> tuple[str, ...]:
    """What the pack's code needs without ComfyUI; what names no version here takes that of the hosts' constraints."""
    return tuple(read_pins()["fast"])


def fast_constraints() -> tuple[str, ...]:
    """Versions for the environment without ComfyUI: the hosts' own, but for what `fast_pins` pins otherwise."""
    pins = read_pins()
    own = {pin.split("==")[0] for pin in pins["fast"] if "==" in pin}
    return tuple(pin for pin in pins["constraints"] + pins["pack"] if pin.split("==")[0] not in own)


def lint_pins() -> tuple[str, ...]:
    """The formatter and linter, and the type checker."""
    return tuple(read_pins()["lint"])


def lone_test_pins() -> tuple[str, ...]:
    """Test packages to install without what they require: what the tests need of it, as torch, is there already."""
    return tuple(read_pins()["tests_without_dependencies"])
