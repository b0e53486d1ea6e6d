"""tools/host.py: starting and stopping the server, the converter, and messages to the user."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hostlib import cli, commands
from hostlib.build import Host, user_host
from hostlib.errors import HostError
from hostlib.process import start_group, stop_group
from hostlib.progress import ProgressLine
from hostlib.results import copy_into
from hostlib.server import PACK_NAME, Server, free_port
from hostlib.websocket import WebSocket
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
