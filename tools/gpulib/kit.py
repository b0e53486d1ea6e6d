"""A folder with all that the check needs on a machine with PyTorch and no internet: ComfyUI's source and wheels."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from hostlib.build import Host
from hostlib.errors import HostError
from hostlib.pip import pip

# Found by importing all of it in an environment that had PyTorch, torchvision, torchaudio and numpy alone.
BESIDE_TORCH = (
    *("comfy-kitchen", "comfy-aimdo", "einops", "torchsde", "trampoline"),  # ComfyUI's
    *("prodigyopt", "tensorboardx", "protobuf"),  # the pack's
)
# What images with PyTorch usually have; `everything` packs it too.
USUAL = (
    *("certifi", "h11", "httpcore", "httpx", "huggingface-hub", "idna", "packaging", "pillow", "psutil", "pyyaml"),
    *("regex", "safetensors", "scipy", "tokenizers", "tqdm", "transformers"),
)
SOURCES = ("comfy", "comfy_api/torch_helpers", "comfy_execution", "utils")
_FILES = ("comfyui_version.py", "cuda_malloc.py", "folder_paths.py", "latent_preview.py", "node_helpers.py", "LICENSE")
_LARGEST = 64 * 1024  # bytes of a file that is no code: larger ones are vocabularies of text encoders
_NOT_FOR_NVIDIA = "comfy_kitchen/backends/hip/"
_PLATFORMS = ("2_28", "2_27", "2_24", "2_17", "2_12", "2_5")
_ARCHIVE, _UNPACKED = "kit.tar.xz", "unpacked"


def pack(host: Host, folder: Path, python: str | None, everything: bool) -> dict[str, int]:
    """Makes the folder anew, with one archive in it; returns the bytes of that and of the wheels as downloaded.

    python: the version that the machine has, such as "3.12", on Linux with an x86-64 processor; None for a machine like
    this one. Raises HostError.
    """
    if folder.exists() and not (folder / _ARCHIVE).is_file():
        raise HostError(f"{folder} exists and is no kit; name another folder.")
    with tempfile.TemporaryDirectory() as made:
        site, wheels = Path(made) / "site", Path(made) / "wheels"
        names = (*BESIDE_TORCH, *(USUAL if everything else ()))
        pins = [f"{name}=={version}" for name, version in _versions(host, names).items()]
        options = ["--no-deps", "--only-binary=:all:", "--dest", str(wheels), *_for(python)]
        pip(host.python, "download", *options, *pins, purpose="download the kit's wheels")
        sizes = {wheel.name: wheel.stat().st_size for wheel in wheels.iterdir()}
        for wheel in wheels.iterdir():
            _extract(wheel, site)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # xz makes the kernels half as large as a wheel does.
        with tarfile.open(folder / _ARCHIVE, "w:xz", preset=9) as archive:
            archive.add(site, "site")
            for path in _sources(host.comfyui):
                archive.add(path, Path("ComfyUI") / path.relative_to(host.comfyui))
    return {_ARCHIVE: (folder / _ARCHIVE).stat().st_size, **sizes}


def _extract(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(site, [name for name in opened.namelist() if not name.startswith(_NOT_FOR_NVIDIA)])


def _for(python: str | None) -> Iterator[str]:
    if python:
        yield from ("--implementation", "cp", "--python-version", python)
        for version in _PLATFORMS:
            yield from ("--platform", f"manylinux_{version}_x86_64")


def _sources(comfyui: Path) -> Iterator[Path]:
    for name in _FILES:
        if (comfyui / name).is_file():
            yield comfyui / name
    for name in SOURCES:
        for path in sorted((comfyui / name).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                if path.suffix == ".py" or path.stat().st_size < _LARGEST:
                    yield path


def _versions(host: Host, names: tuple[str, ...]) -> dict[str, str]:
    """Those that the host itself has. Raises HostError for a package that it lacks."""
    ask = (
        "import importlib.metadata as m, json, sys;"
        "has = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()};"
        "print(json.dumps({name: has.get(name) for name in sys.argv[1:]}))"
    )
    said = subprocess.run([str(host.python), "-c", ask, *names], capture_output=True, text=True, check=True)
    found = json.loads(said.stdout)
    lacking = [name for name, version in found.items() if version is None]
    if lacking:
        raise HostError(f"This ComfyUI's Python lacks {', '.join(lacking)}, so their versions are not known.")
    return found


def unpack(folder: Path) -> tuple[Path, Path]:
    """The folders of ComfyUI and of the packages in the kit, unpacked in it once. Raises HostError."""
    if not (folder / _ARCHIVE).is_file():
        raise HostError(f"{folder} is no kit; python3 tools/host.py gpu-kit makes one.")
    target = folder / _UNPACKED
    done = target / "complete"
    if not done.is_file():
        with tarfile.open(folder / _ARCHIVE) as archive:
            # Older patch releases of Python lack the filter; the archive is our own.
            archive.extractall(target, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        done.touch()
    return target / "ComfyUI", target / "site"
