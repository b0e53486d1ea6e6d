"""tools/host.py: the set-up of a ComfyUI, its cache, its pins and its archive."""

import io
import re
import subprocess
import sys
import tarfile
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest
from hostlib import build, cache
from hostlib.build import unpack_comfyui
from hostlib.cache import build_once, is_complete
from hostlib.errors import HostError
from hostlib.pins import host_pins, read_pins
from hostlib.pip import pip
from hostlib.server import PACK_NAME
from packaging.requirements import Requirement
from places import REPO


def test_half_finished_set_up_is_built_again(tmp_path):
    folder = tmp_path / "host"

    def cut_off(target):
        (target / "leftover").write_text("half a file")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(folder, cut_off)
    assert not is_complete(folder)
    build_once(folder, lambda target: (target / "whole").write_text("x"))
    assert is_complete(folder)
    assert sorted(path.name for path in folder.iterdir()) == [cache.MARKER, "whole"]


def test_finished_set_up_is_not_built_again(tmp_path):
    build_once(tmp_path / "host", lambda target: None)
    build_once(tmp_path / "host", lambda target: pytest.fail("built twice"))


def test_marker_appears_only_after_the_build(tmp_path):
    seen = []
    build_once(tmp_path / "host", lambda target: seen.append(is_complete(target)))
    assert seen == [False]


def test_two_set_ups_at_once_build_once(tmp_path):
    builds = []

    def slow(target):
        builds.append(1)
        time.sleep(0.3)

    threads = [threading.Thread(target=build_once, args=(tmp_path / "host", slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_host_is_rebuilt_when_its_pins_change(tmp_path, monkeypatch):
    monkeypatch.setenv("TLORA_HOST_CACHE", str(tmp_path))
    built, installed = [], []

    def build_host(pins, folder):
        built.append(folder)
        (folder / "constraints.txt").write_text("torch==1\n")

    monkeypatch.setattr(build, "_build_host", build_host)
    monkeypatch.setattr(
        build, "pip", lambda python, *arguments, purpose: installed.append(Path(arguments[-1]).read_text())
    )
    first, again = build.ensure_host(), build.ensure_host()
    assert first == again and len(built) == len(installed) == 1 and "torch==1\ndiffusers==" in installed[0]
    pins = read_pins()
    monkeypatch.setattr("hostlib.pins.read_pins", lambda: {**pins, "pack": ["diffusers==0.0.1"]})
    assert build.ensure_host() == first and len(built) == 1 and "diffusers==0.0.1" in installed[1]
    monkeypatch.setattr("hostlib.pins.read_pins", lambda: {**pins, "torch": ["torch==0.0.1"]})
    assert build.ensure_host().comfyui != first.comfyui and len(built) == 2


def test_every_pinned_host_is_complete():
    for version in read_pins()["hosts"]:
        pins = host_pins(version)
        assert re.fullmatch(r"[\w-]+==[\d.]+", pins.sdist) and re.fullmatch(r"[0-9a-f]{64}", pins.sha256)


def test_what_the_pack_requires_is_pinned_and_told_alike_to_pip_and_to_the_registry():
    lines = (REPO / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    told = re.search(r"^dependencies = \[(.*)\]$", (REPO / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    assert re.findall(r'"([^"]+)"', told) == required
    pins = dict(pin.split("==") for pin in read_pins()["pack"])
    assert [Requirement(line).name for line in required] == list(pins)
    assert all(Requirement(line).specifier.contains(pins[Requirement(line).name]) for line in required)


@pytest.mark.parametrize("language, separator, folder", [("bash", "/", "ComfyUI"), ("bat", "\\", ".")])
def test_the_readmes_command_installs_the_requirements(tmp_path, language, separator, folder):
    """They are already installed, so pip only says so and needs no network."""
    custom_nodes = tmp_path / "ComfyUI" / "custom_nodes"
    custom_nodes.mkdir(parents=True)
    (custom_nodes / PACK_NAME).symlink_to(REPO)
    [command] = re.findall(
        rf"```{language}\n +(\S+ -m pip install .*)\n", (REPO / "README.md").read_text(encoding="utf-8")
    )
    arguments = command.replace(separator, "/").split()[1:]
    ran = subprocess.run(
        [sys.executable, *arguments, "--no-index", "--dry-run"], cwd=tmp_path / folder, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert all(f"already satisfied: {Requirement(pin).name}" in ran.stdout for pin in read_pins()["pack"])


def test_diffusers_leaves_the_hub_client_of_transformers_4_and_of_5_as_it_is():
    """Where pip has to move huggingface-hub for it, transformers, and with it ComfyUI, may start no more."""
    [hub] = [
        each
        for each in map(Requirement, metadata.requires("diffusers"))
        if each.name == "huggingface-hub" and each.marker is None
    ]
    assert all(hub.specifier.contains(version) for version in ("0.34.0", "0.36.2", "1.3.0", "1.33.0"))


def test_pip_failure_shows_pips_output():
    with pytest.raises(HostError, match="could not install nonsense(?s:.*)tlora-no-such-package"):
        pip(Path(sys.executable), "install", "--no-index", "tlora-no-such-package", purpose="install nonsense")


def make_archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
        link = tarfile.TarInfo("pkg-1/vendor/ComfyUI/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def test_only_comfyui_leaves_the_archive(tmp_path):
    archive = make_archive(
        tmp_path / "a.tar.gz", ["pkg-1/setup.py", "pkg-1/vendor/ComfyUI/main.py", "pkg-1/vendor/ComfyUI/comfy/a.py"]
    )
    unpack_comfyui(archive, tmp_path / "out")
    files = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if not path.is_dir()
    )
    assert files == ["comfy/a.py", "main.py"]


def test_archive_that_climbs_out_is_refused(tmp_path):
    archive = make_archive(tmp_path / "a.tar.gz", ["pkg-1/vendor/ComfyUI/../../evil.py"])
    with pytest.raises(HostError, match="unsafe path"):
        unpack_comfyui(archive, tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("evil.py"))
