"""tools/host.py: the set-up's cache, starting and stopping the server, the converter, and messages to the user."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest
from hostlib import build, cache, cli, commands
from hostlib.build import Host, unpack_comfyui, user_host
from hostlib.cache import build_once, is_complete
from hostlib.errors import HostError
from hostlib.pins import host_pins, read_pins
from hostlib.pip import pip
from hostlib.process import start_group, stop_group
from hostlib.progress import ProgressLine
from hostlib.results import copy_into
from hostlib.server import PACK_NAME, Server, free_port
from hostlib.websocket import WebSocket
from packaging.requirements import Requirement
from places import REPO

HOST_TOOL = REPO / "tools" / "host.py"
MINI = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 16, "batch_size": 1, "color": 255}},
    "2": {
        "class_type": "SaveImage",
        "inputs": {"images": ["1", 0], "filename_prefix": "mini"},
        "_meta": {"title": "Keep it"},
    },
}
# A stand-in for ComfyUI that starts in no time, starts a child of its own, and says who it is.
FAKE_MAIN = """
import http.server, os, pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(__file__).with_name("pids").write_text(f"{os.getpid()} {child.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake_host(tmp_path):
    folder = tmp_path / "FakeComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text(FAKE_MAIN)
    return Host(folder, Path(sys.executable), "fake", ours=False)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


# --- the cache ---


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
    repo = HOST_TOOL.parents[1]
    lines = (repo / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    told = re.search(r"^dependencies = \[(.*)\]$", (repo / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    assert re.findall(r'"([^"]+)"', told) == required
    pins = dict(pin.split("==") for pin in read_pins()["pack"])
    assert [Requirement(line).name for line in required] == list(pins)
    assert all(Requirement(line).specifier.contains(pins[Requirement(line).name]) for line in required)


@pytest.mark.parametrize("language, separator, folder", [("bash", "/", "ComfyUI"), ("bat", "\\", ".")])
def test_the_readmes_command_installs_the_requirements(tmp_path, language, separator, folder):
    """They are already installed, so pip only says so and needs no network."""
    repo = HOST_TOOL.parents[1]
    custom_nodes = tmp_path / "ComfyUI" / "custom_nodes"
    custom_nodes.mkdir(parents=True)
    (custom_nodes / PACK_NAME).symlink_to(repo)
    [command] = re.findall(
        rf"```{language}\n +(\S+ -m pip install .*)\n", (repo / "README.md").read_text(encoding="utf-8")
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


# --- the server's process ---


def test_free_port_can_be_bound():
    port = free_port()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        assert probe.getsockname() == ("127.0.0.1", port)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot ask for a process without ending it")
def test_server_leaves_no_process_and_no_link(fake_host):
    with Server(fake_host) as server:
        assert server.client.answers()
        link = server._scratch / "custom_nodes" / PACK_NAME
        assert (link / "tools" / "host.py").is_file()
        pids = [int(pid) for pid in (fake_host.comfyui / "pids").read_text().split()]
    assert not link.exists() and HOST_TOOL.is_file()
    wait_for(lambda: not any(map(is_running, pids)))
    assert sorted(path.name for path in fake_host.comfyui.iterdir()) == ["comfy", "main.py", "pids"]


def test_server_that_dies_shows_its_log(fake_host):
    (fake_host.comfyui / "main.py").write_text("print('the frontend is missing'); raise SystemExit(7)")
    with pytest.raises(HostError, match="status 7(?s:.*)the frontend is missing"):
        Server(fake_host).start()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_terminated_tool_stops_its_server(fake_host):
    command = [sys.executable, str(HOST_TOOL), "serve", "--comfyui", str(fake_host.comfyui), "--python", sys.executable]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as tool:
        assert any("is running at http://127.0.0.1:" in line for line in tool.stderr)
        pids = [int(pid) for pid in (fake_host.comfyui / "pids").read_text().split()]
        tool.send_signal(signal.SIGTERM)
        assert tool.wait(30) == 128 + signal.SIGTERM
    wait_for(lambda: not any(map(is_running, pids)))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to ignore")
def test_child_that_ignores_termination_is_killed(monkeypatch):
    monkeypatch.setattr("hostlib.process.GRACE_SECONDS", 0.3)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); "
        "time.sleep(600)"
    )
    process = start_group([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    with process:
        process.stdout.readline()
        stop_group(process)
        assert process.returncode == -signal.SIGKILL


def test_user_comfyui_is_checked(tmp_path, fake_host):
    with pytest.raises(HostError, match="not a ComfyUI folder"):
        user_host(str(tmp_path), None)
    with pytest.raises(HostError, match="--python"):
        user_host(str(fake_host.comfyui), None)
    assert user_host(str(fake_host.comfyui), sys.executable).ours is False


def test_websocket_reads_every_kind_of_frame():
    long = json.dumps("x" * 70000).encode()
    frames = b"\x89\x02hi" + b"\x82\x03\0\0\0" + b"\x01\x03abc\x80\x03def"
    frames += b"\x81\x7e\x00\xc8" + b"y" * 200 + b"\x81\x7f" + len(long).to_bytes(8, "big") + long + b"\x88\x00"
    pongs = []

    def serve_one(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            for start in range(0, len(frames), 1000):
                connection.sendall(frames[start : start + 1000])
            pongs.append(connection.recv(100))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_one, args=(listener,))
        thread.start()
        with WebSocket("127.0.0.1", listener.getsockname()[1], "/ws") as client:
            assert client.receive(5) == "abcdef"
            assert client.receive(5) == "y" * 200
            assert client.receive(5) == long.decode()
            with pytest.raises(ConnectionError):
                client.receive(5)
        thread.join()
    mask = pongs[0][2:6]
    assert pongs[0][:2] == b"\x8a\x82" and bytes(a ^ b for a, b in zip(pongs[0][6:], mask)) == b"hi"


def test_progress_line_shows_title_and_time_left(monkeypatch):
    clock = iter([0.0, 0.0, 30.0, 30.0])
    monkeypatch.setattr("hostlib.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    line = ProgressLine(stream)
    line.node_started("5", "Train T-LoRA")
    line.step("5", "Train T-LoRA", 0, 800)
    line.step("5", "Train T-LoRA", 200, 800)
    assert stream.getvalue().splitlines()[-1].endswith("200/800, 1:30 left")


# --- the real server ---


def test_workflow_runs_on_the_real_server(server):
    result = server.run(MINI, {"EmptyImage.width": 48})
    (image,) = result.images
    assert image.path.is_file() and image.path.parent == server.client.folders["output"]
    assert server.client.fetch(image) == image.path.read_bytes()
    assert image.path.read_bytes()[16:24] == (48).to_bytes(4, "big") + (16).to_bytes(4, "big")


def test_interface_format_runs_on_the_real_server(server):
    workflow = {
        "nodes": [
            {
                "id": 1,
                "type": "EmptyImage",
                "inputs": [],
                "outputs": [{"type": "IMAGE"}],
                "widgets_values": [24, 8, 1, 0],
            },
            {"id": 2, "type": "PreviewImage", "inputs": [{"name": "images", "type": "IMAGE", "link": 5}]},
            {"id": 3, "type": "Note", "widgets_values": ["hello"]},
        ],
        "links": [[5, 1, 0, 2, 0, "IMAGE"]],
    }
    (image,) = server.run(workflow).images
    assert image.kind == "temp" and image.path.is_file()


def test_refused_workflow_is_explained(server):
    result = server.run(MINI, {"1.width": 0}, check=False)
    assert result.errors == ["EmptyImage, node 1: Value 0 smaller than min of 1 (width)"]


def test_workflow_with_one_bad_branch_is_refused_as_a_whole(server):
    bad = {"3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}}
    before = set(server.client.folders["output"].iterdir())
    result = server.run({**MINI, **bad}, check=False)
    assert "node 3: Required input is missing (filename_prefix)" in result.errors[0]
    server.run(MINI)
    assert len(set(server.client.folders["output"].iterdir()) - before) <= 2


def test_failing_node_speaks_for_itself_and_the_exit_is_not_zero(server, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mini.json"
    path.write_text(json.dumps(MINI))
    monkeypatch.setattr(commands, "chosen_host", lambda args: server.host)
    monkeypatch.setattr(commands, "make_server", lambda host: contextlib.nullcontext(server))
    assert cli.main(["run", str(path), "--set", "Keep it.filename_prefix=../../x"]) == 1
    assert "Keep it (SaveImage), node 2: **** ERROR: Saving image outside the output folder" in capsys.readouterr().err
    assert cli.main(["run", str(path), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_copy_overwrites_nothing_and_is_not_made_twice(tmp_path):
    copies = [copy_into(str(tmp_path), "a.b.png", data) for data in (b"1", b"2", b"1", b"2", b"3")]
    assert [path.name for path in copies] == ["a.b.png", "a.b_2.png", "a.b.png", "a.b_2.png", "a.b_3.png"]
    assert [path.read_bytes() for path in copies] == [b"1", b"2", b"1", b"2", b"3"]


def test_scripts_see_the_hosts_nodes_module_and_the_core(host):
    ask = "import importlib.util as u; print(u.find_spec('nodes').origin); print(u.find_spec('tlora_core').origin)"
    env = commands.script_environment(host)
    said = subprocess.run([sys.executable, "-c", ask], env=env, cwd="/", capture_output=True, text=True, check=True)
    nodes, core = map(Path, said.stdout.split("\n")[:2])
    assert nodes == host.comfyui / "nodes.py" and core == HOST_TOOL.parents[1] / "tlora_core" / "__init__.py"


@pytest.mark.parametrize(("given", "used"), [("", "pinned"), ("newer", "newer")])
def test_interface_of_the_environment_goes_before_the_pinned_one(fake_host, monkeypatch, given, used):
    seen = {}
    monkeypatch.setenv(commands.NEWEST_FRONTEND, given)
    monkeypatch.setattr(commands, "chosen_host", lambda args: fake_host)
    monkeypatch.setattr(commands, "ensure_test_packages", lambda python: Path("packages"))
    monkeypatch.setattr(commands, "ensure_newest_frontend", lambda python: Path("pinned"))
    monkeypatch.setattr(commands, "find_chromium", lambda: "chromium")
    monkeypatch.setattr(commands, "run_foreground", lambda command, env: seen.update(env) or 0)
    assert commands.test(cli.parse(["test", "--comfyui", "somewhere"])) == 0
    assert seen[commands.NEWEST_FRONTEND] == used
