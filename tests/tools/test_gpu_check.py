"""tools/host.py gpu-check: what becomes of parts that fail, hang or crash, of the time, the table and the JSON; and the
kit for a machine without internet. Parts are stand-ins here, and no ComfyUI is needed."""

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpulib import command, kit, plan, report, runner
from gpulib.comfyui import CannotStart
from gpulib.plan import DYNAMIC, PLAIN, Part
from hostlib import cli, commands
from hostlib.build import Host
from hostlib.errors import HostError
from places import REPO

# A worker whose ComfyUI starts at once, and whose parts are these.
WORKER = """
import os, sys, time, types
sys.path.insert(0, {tools!r})
from gpulib import comfyui, worker
from gpulib.plan import Part

def fine(run):
    run.note(answer=42, ratio=1.23456, process=os.getpid())

def wrong(run):
    run.note(noted=7)
    run.require(False, "two and two are five")

def raises(run):
    raise KeyError("lost")

def memory(run):
    os.kill(os.getpid(), 9)

def leaves(run):
    os._exit(3)

def hangs_here(run):
    time.sleep(600)

def cannot(run):
    run.skip("no such card")

checks = types.ModuleType("gpulib.checks.stand_in")
vars(checks).update({{f.__name__: f for f in (fine, wrong, raises, memory, leaves, hangs_here, cannot)}})
sys.modules["gpulib.checks.stand_in"] = checks

def start(device, host):
    if host in {broken!r}:
        raise comfyui.CannotStart("nothing to be had")
    if host in {dying!r}:
        os._exit(5)
    return types.SimpleNamespace(type="cpu")

comfyui.start = start
worker.parts = lambda: [Part(n, f"stand_in:{{n.split()[0]}}", 1) for n in sys.argv[7:]]
sys.exit(worker.main(*sys.argv[1:]))
"""


def part(name, limit=60, host=PLAIN):
    return Part(name, f"stand_in:{name.split()[0]}", limit, host)


@pytest.fixture
def worker(tmp_path):
    def made(broken=(), dying=()):
        path = tmp_path / "worker.py"
        path.write_text(WORKER.format(tools=str(REPO / "tools"), broken=list(broken), dying=list(dying)))
        return path

    return made


def run(parts, worker, seconds=120.0, device="cuda"):
    told = []
    results = runner.run_parts(parts, runner.Settings(device, "miniature"), seconds, told.append, worker)
    assert sorted(r.name for r in told) == sorted(r.name for r in results) == sorted(p.name for p in parts)
    return {result.name: result for result in results}


def test_a_part_that_fails_raises_or_dies_leaves_the_others_running(worker):
    names = ["fine", "wrong", "fine 2", "raises", "memory", "fine 3", "leaves", "cannot", "fine 4"]
    found = run([part(name) for name in names], worker())
    by_status = {status: [n for n in names if found[n].status == status] for status in report.STATUSES}
    assert by_status["passed"] == ["fine", "fine 2", "fine 3", "fine 4"]
    assert by_status["failed"] == ["wrong", "raises", "memory", "leaves"] and by_status["skipped"] == ["cannot"]
    assert found["wrong"].message == "two and two are five" and "in wrong" in found["wrong"].traceback
    assert found["wrong"].figures == {"noted": 7} and found["fine"].figures["ratio"] == 1.235
    assert found["raises"].message == "KeyError: 'lost'" and "in raises" in found["raises"].traceback
    assert found["leaves"].message == "its process ended with status 3"
    assert found["cannot"].message == "no such card" and not found["cannot"].traceback
    if sys.platform != "win32":
        assert found["memory"].message == "its process was ended by signal 9, as for want of RAM"


def test_no_part_runs_in_a_process_in_which_one_has_failed(worker):
    found = run([part(name) for name in ("fine", "fine 2", "wrong", "fine 3")], worker())
    processes = [found[name].figures["process"] for name in ("fine", "fine 2", "fine 3")]
    assert processes[0] == processes[1] != processes[2]


def test_a_part_that_hangs_is_ended_at_its_limit_and_says_where_it_hung(worker):
    found = run([part("hangs_here", limit=1), part("fine")], worker())
    assert found["hangs_here"].status == "failed" and found["fine"].status == "passed"
    assert found["hangs_here"].message == "took longer than its limit of 1 s"
    assert "in hangs_here" in found["hangs_here"].traceback


def test_what_the_time_does_not_suffice_for_is_not_run_and_never_passed(worker):
    none = run([part("fine"), part("fine 2")], worker(), seconds=0)
    assert {r.status for r in none.values()} == {"not run"}
    assert none["fine"].message == "no time was left"
    cut = run([part("fine"), part("hangs_here"), part("fine 2")], hanging(worker()), seconds=6)
    assert [cut[name].status for name in ("fine", "hangs_here", "fine 2")] == ["passed", "not run", "not run"]
    assert "the time was up" in cut["hangs_here"].message


def hanging(path):
    """The worker with limits that are not reached."""
    path.write_text(path.read_text().replace('[0]}", 1)', '[0]}", 600)'))
    return path


def test_dynamic_vram_that_cannot_be_had_is_skipped_and_the_rest_goes_on(worker):
    parts = [part("fine"), part("fine 2", host=DYNAMIC), part("fine 3", host=DYNAMIC), part("fine 4")]
    found = run(parts, worker(broken=[DYNAMIC]))
    assert [found[p.name].status for p in parts] == ["passed", "skipped", "skipped", "passed"]
    assert found["fine 2"].message == "nothing to be had"
    found = run(parts, worker(dying=[DYNAMIC]))
    assert [found[p.name].status for p in parts] == ["passed", "failed", "failed", "passed"]
    assert "ended with status 5" in found["fine 2"].message


def test_parts_for_dynamic_vram_are_skipped_on_a_cpu(worker):
    found = run([part("fine"), part("fine 2", host=DYNAMIC)], worker(), device="cpu")
    assert found["fine 2"].status == "skipped" and "CUDA" in found["fine 2"].message


@pytest.mark.parametrize("how", ["broken", "dying"])
def test_a_comfyui_that_cannot_be_started_at_all_is_an_error(worker, how):
    with pytest.raises(CannotStart, match="nothing to be had" if how == "broken" else "ended with status 5"):
        run([part("fine"), part("fine 2")], worker(**{how: [PLAIN]}))


def results(*statuses):
    return [runner.Result(f"part {i}", PLAIN, status, 1.5, {"a": 1.0}, "why") for i, status in enumerate(statuses)]


def test_the_exit_status_is_0_only_if_all_that_ran_passed():
    assert report.status(results("passed", "skipped", "not run")) == 0
    assert report.status(results("passed", "failed")) == 1
    assert report.status(results("skipped", "not run")) == 1


def test_the_table_names_every_part_and_counts_them():
    lines = report.table(results("passed", "failed", "skipped", "not run", "passed")).splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == [f"part {i}" for i in range(5)]
    assert "not run" in lines[3] and "why" in lines[1] and "a 1" in lines[0]
    assert lines[-1] == "2 passed, 1 failed, 1 skipped, 1 not run."
    long = runner.Result("x", PLAIN, "failed", 1.0, {}, "word " * 200)
    assert len(report.line(long)) < 160


def test_the_command_writes_the_json_and_returns_the_status(worker, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.plan, "chosen", lambda only: [part("fine"), part("wrong"), part("fine 2")])
    run_parts = runner.run_parts
    monkeypatch.setattr(command.runner, "run_parts", lambda *args: run_parts(*args, worker()))
    asked = SimpleNamespace(device="cpu", minutes=2.0, only=[], json=str(tmp_path / "report.json"))
    assert command.check(asked) == 1
    told = capsys.readouterr()
    assert "2 passed, 1 failed" in told.out and "two and two" in told.out and "fine 2" in told.err
    written = json.loads((tmp_path / "report.json").read_text())
    assert list(written) == ["format", "device", "minutes", "started", "machine", "summary", "parts"]
    assert written["format"] == report.FORMAT and written["summary"]["failed"] == 1 and written["machine"] == {}
    keys = ["name", "host", "status", "seconds", "figures", "message", "traceback"]
    assert all(list(each) == keys for each in written["parts"]) and len(written["parts"]) == 3
    assert written["parts"][1]["figures"] == {"noted": 7} and "Failed" in written["parts"][1]["traceback"]


def test_the_json_is_written_after_each_part(worker, tmp_path, monkeypatch):
    path, run_parts, seen = tmp_path / "report.json", runner.run_parts, []

    def looking(parts, settings, seconds, tell):
        def told(result):
            tell(result)
            seen.append([each["status"] for each in json.loads(path.read_text())["parts"]])

        return run_parts(parts, settings, seconds, told, worker())

    monkeypatch.setattr(command.plan, "chosen", lambda only: [part("fine"), part("fine 2")])
    monkeypatch.setattr(command.runner, "run_parts", looking)
    assert command.check(SimpleNamespace(device="cuda", minutes=2.0, only=[], json=str(path))) == 0
    assert seen == [["passed", "not run"], ["passed", "passed"]]


def test_the_machine_of_the_json_is_what_its_part_found():
    found = [runner.Result("machine", PLAIN, "passed", 1.0, {"torch": "2"}), *results("passed")]
    assert report.as_json(found, device="cpu")["machine"] == {"torch": "2"}


def test_parts_have_names_of_their_own_and_checks_that_exist():
    parts = plan.parts()
    assert len({p.name for p in parts}) == len(parts)
    assert [p.name for p in parts[:2]] == ["machine", "quickstart"]
    for each in parts:
        module, function = each.call.split(":")
        source = (REPO / "tools" / "gpulib" / "checks" / f"{module}.py").read_text()
        assert f"\ndef {function}(run: Run" in source and each.limit <= 120
    assert {p.arguments["gib"] for p in parts if "gib" in p.arguments} == {6, 8, 12, 16}


def test_parts_are_chosen_by_name():
    assert {p.name for p in plan.chosen(["train fp8", "peak *"])} == {"train fp8", "peak sdxl", "peak flux"}
    assert len(plan.chosen([])) == len(plan.parts())
    with pytest.raises(ValueError, match="--only nonsense"):
        plan.chosen(["nonsense"])


def test_host_py_runs_it_with_the_hosts_interpreter(monkeypatch, capsys, tmp_path):
    host = Host(tmp_path / "ComfyUI", tmp_path / "python", "0.30.0", ours=True)
    monkeypatch.setattr(commands, "ensure_host", lambda version: host)
    asked = []
    monkeypatch.setattr(commands.gpu, "check", lambda args, *host: asked.append((args.minutes, host)) or 1)
    assert cli.main(["gpu-check", "--minutes", "3"]) == 1 and asked == [(3.0, (host.python, host.comfyui))]
    monkeypatch.setattr(commands, "ensure_host", lambda version: pytest.fail("a host was set up for a list"))
    assert cli.main(["gpu-check", "--list", "--only", "machine"]) == 0
    assert capsys.readouterr().out.split() == ["machine", "60", "s"]
    assert cli.main(["gpu-check", "--list", "--only", "nonsense"]) == 1


def test_an_unknown_name_and_a_folder_without_a_kit_are_one_sentence(tmp_path):
    for arguments, said in ((["--only", "x"], "--only x: no part"), (["--kit", str(tmp_path)], "is no kit")):
        tool = [sys.executable, str(REPO / "tools" / "gpu_check.py"), *arguments]
        done = subprocess.run(tool, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """(folder, arguments of pip) of a kit made from a small ComfyUI."""
    comfyui = tmp_path / "ComfyUI"
    for name, size in (
        ("comfy/ops.py", 100_000),
        ("comfy/vocab.json", 100_000),
        ("comfy/small.json", 9),
        ("main.py", 9),
    ):
        (comfyui / name).parent.mkdir(parents=True, exist_ok=True)
        (comfyui / name).write_text("x" * size)
    asked = []

    def pip(python, *arguments, purpose):
        asked.append(arguments)
        wheels = Path(arguments[arguments.index("--dest") + 1])
        wheels.mkdir()
        with zipfile.ZipFile(wheels / "einops-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("einops/__init__.py", "")
            wheel.writestr("comfy_kitchen/backends/hip/large.so", "")

    monkeypatch.setattr(kit, "pip", pip)
    monkeypatch.setattr(kit, "_versions", lambda host, names: {name: "1" for name in names})
    host = Host(comfyui, tmp_path / "python", "0.30.0", ours=True)
    sizes = kit.pack(host, tmp_path / "kit", "3.12", everything=False)
    assert list(sizes) == ["kit.tar.xz", "einops-1-py3-none-any.whl"] and all(sizes.values())
    return tmp_path / "kit", asked[0]


def test_a_kit_holds_comfyuis_code_and_wheels_for_that_python(packed):
    folder, asked = packed
    with tarfile.open(folder / "kit.tar.xz") as archive:
        files = [member.name for member in archive if member.isfile()]
    assert files == ["site/einops/__init__.py", "ComfyUI/comfy/ops.py", "ComfyUI/comfy/small.json"]
    assert "comfy-kitchen==1" in asked and "scipy==1" not in asked
    assert asked[asked.index("--python-version") + 1] == "3.12" and "manylinux_2_28_x86_64" in asked


def test_a_kit_is_unpacked_once_and_made_anew_but_nothing_else_is_deleted(packed, tmp_path):
    folder, _ = packed
    comfyui, site = kit.unpack(folder)
    assert (comfyui / "comfy" / "ops.py").is_file() and (site / "einops" / "__init__.py").is_file()
    (site / "einops" / "__init__.py").write_text("kept")
    assert kit.unpack(folder) == (comfyui, site) and (site / "einops" / "__init__.py").read_text() == "kept"
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(HostError, match="is no kit"):
        kit.pack(Host(tmp_path, tmp_path, "", ours=True), other, None, everything=False)
    assert other.is_dir()
