"""The GitHub workflows and the pre-commit file: what they run exists, and equals what CI and CONTRIBUTING run."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from hostlib import cli
from hostlib import commands as commands_of_the_tool
from places import REPO

WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.yml"))
SYSTEMS = {"ubuntu-latest", "windows-latest", "macos-latest"}


def read(path):
    # YAML 1.1 reads the key `on` as true.
    return {"on" if key is True else key: value for key, value in yaml.safe_load(path.read_text()).items()}


def jobs(name):
    return read(REPO / ".github" / "workflows" / name)["jobs"]


def steps_of(workflow):
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def hooks():
    return [hook for repo in read(REPO / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]


def commands():
    lines = [line for path in WORKFLOWS for step in steps_of(read(path)) for line in step.get("run", "").splitlines()]
    # All lines but those on what newest.yml sets up beside this repository.
    found = [line for line in lines if not re.search(r"ComfyUI/| -C ComfyUI | -m venv ", line)]
    found += [hook["entry"] for hook in hooks()]
    shell = (REPO / ".ci" / "run").read_text().splitlines()
    return found + [re.sub(r"^exec | </dev/null$", "", line) for line in shell if "tools/" in line]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_exists(command):
    program, *arguments = shlex.split(command)
    script = arguments.pop(0) if program in ("python", "python3") else program
    assert (REPO / script).is_file(), command
    if script == program:
        assert os.access(REPO / script, os.X_OK) or sys.platform == "win32"
    if script == "tools/host.py":
        assert cli.parse(arguments).command  # ends the test where there is no such command or option


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_version_or_lie_here(path):
    workflow = read(path)
    used = [step["uses"] for step in steps_of(workflow) if "uses" in step]
    used += [job["uses"] for job in workflow["jobs"].values() if "uses" in job]
    for name in used:
        assert (REPO / name).is_file() if name.startswith("./") else re.fullmatch(r"[\w.-]+/[\w.-]+@v\d+", name)


def test_fast_tests_run_on_every_system_and_python():
    matrix = jobs("test.yml")["fast"]["strategy"]["matrix"]
    assert set(matrix["os"]) == SYSTEMS
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    lowest = re.search(r'^requires-python = ">=(.+)"', (REPO / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    assert matrix["python"][0] == lowest


def test_lint_is_one_command_everywhere():
    lint = "python3 tools/host.py lint"
    assert [step["run"] for step in jobs("test.yml")["lint"]["steps"] if "run" in step] == [lint]
    assert [hook["entry"] for hook in hooks()] == [lint]
    lines = [line.removesuffix(" </dev/null") for line in (REPO / ".ci" / "run").read_text().splitlines()]
    assert lines.index(lint) < lines.index("exec python3 tools/host.py test")


def test_newest_host_is_tested_weekly_with_the_newest_interface():
    workflow = read(REPO / ".github" / "workflows" / "newest.yml")
    (schedule,) = workflow["on"]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"]) and "workflow_dispatch" in workflow["on"]
    ours, hosts = (step["with"] for step in steps_of(workflow) if step.get("uses", "").startswith("actions/checkout@"))
    assert hosts == {"repository": "Comfy-Org/ComfyUI", "path": "ComfyUI"}  # no ref: the newest commit
    set_up, run = (step for step in steps_of(workflow) if step.get("name", "").startswith(("Set up", "Run")))
    assert "--target interface comfyui-frontend-package\n" in set_up["run"]  # no version: the newest
    assert run["working-directory"] == ours["path"] and f"../{hosts['path']}" in run["run"]
    folder = "${{ github.workspace }}/interface/comfyui_frontend_package/static"
    assert run["env"] == {commands_of_the_tool.NEWEST_FRONTEND: folder}


def test_only_a_tested_tag_is_published():
    publish = read(REPO / ".github" / "workflows" / "publish.yml")
    assert publish["on"] == {"push": {"tags": ["v*"]}}
    job = publish["jobs"]["publish"]
    assert job["needs"] == "test" and publish["jobs"]["test"]["uses"] == "./.github/workflows/test.yml"
    last = job["steps"][-1]
    assert last["uses"].startswith("Comfy-Org/publish-node-action@")
    assert last["with"] == {"personal_access_token": "${{ secrets.REGISTRY_ACCESS_TOKEN }}"}
    assert any("check_version.py" in step.get("run", "") for step in job["steps"][:-1])


def test_paths_excluded_from_the_archive_exist():
    lines = (REPO / ".comfyignore").read_text().splitlines()
    left_out = [line for line in lines if line and not line.startswith("#")]
    assert all((REPO / name).exists() for name in left_out)
    assert {".ci/", ".github/", ".pre-commit-config.yaml", "tests/"} <= set(left_out)


@pytest.mark.parametrize("arguments, status", [([], 0), (["v0.0.1"], 1)])
def test_one_version_is_stated_everywhere(arguments, status):
    command = [sys.executable, str(REPO / "tools" / "check_version.py"), *arguments]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == status and ("the tag v0.0.1 says 0.0.1" in said.stderr) == bool(status)
