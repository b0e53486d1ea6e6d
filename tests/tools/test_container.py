"""The Dockerfile: what it copies is there and is not ignored, what it starts is a command, and it names no registry."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hostlib import cli
from places import REPO

DOCKERFILE = REPO / "Dockerfile"


def instructions(name):
    """The arguments of each instruction of that name, with continued lines joined."""
    text = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^{name} (.+)$", text, re.MULTILINE)


def copied():
    return [source for line in instructions("COPY") for source in line.split()[:-1]]


def allowed():
    lines = (REPO / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "*"
    return [line[1:] for line in lines if line.startswith("!")]


def test_what_is_copied_is_there_and_part_of_the_context():
    assert len(copied()) > 8
    assert [source for source in copied() if not (REPO / source).exists()] == []
    assert sorted(Path(source).name for source in copied()) == sorted(allowed())


def test_what_is_copied_keeps_its_name_and_place():
    for line in instructions("COPY"):
        *sources, target = line.split()
        assert (
            sources == [target.removeprefix("./")]
            or target == "./"
            and all((REPO / each).is_file() for each in sources)
        )


def test_the_setup_has_what_it_is_built_from_and_a_change_of_the_code_does_not_repeat_it():
    before, after = DOCKERFILE.read_text(encoding="utf-8").split("RUN python3 tools/host.py setup")
    assert re.findall(r"^COPY (.+) \./", before, re.MULTILINE) == ["requirements.txt", "tools"]
    assert "COPY tlora_core " in after and "python3-venv" in before


def test_the_examples_mount_folders_that_the_image_uses():
    text = DOCKERFILE.read_text(encoding="utf-8")
    tables, models = re.findall(r'-v "\$PWD[^:"]*:([^"]+)"', text)
    cache = re.search(r"TLORA_HOST_CACHE=(\S+)", text)[1]
    assert instructions("WORKDIR")[-1] == tables and f"{cache}/workspace/models" == models


def test_all_that_the_pack_loads_is_copied():
    ignored = (REPO / ".comfyignore").read_text(encoding="utf-8").split()
    known = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split("\n")
    tops = {name.split("/")[0] for name in known if name} - {line.rstrip("/") for line in ignored}
    not_loaded = {name for name in tops if fnmatch(name, "*.md") or name.startswith(".")}
    assert tops - not_loaded - {"Dockerfile", "benchmarks", "docs", "tests"} <= set(allowed())


@pytest.mark.parametrize("line", ["ENTRYPOINT", "CMD", "RUN"])
def test_what_is_started_is_a_command_of_the_tool(line):
    if line == "RUN":
        [started] = [run.split() for run in instructions("RUN") if "host.py" in run]
        assert started[:2] == ["python3", "tools/host.py"] and cli.parse(started[2:]).command
        return
    [given] = instructions(line)
    words = re.findall(r'"([^"]+)"', given)
    if line == "ENTRYPOINT":
        assert words == ["python3", "/opt/tlora/tools/host.py"] and "/opt/tlora" in instructions("WORKDIR")
    else:
        assert cli.parse(words).command.__name__ == "demo"


def test_the_base_is_an_argument_and_no_host_is_named():
    assert instructions("FROM") == ["${BASE}"] and instructions("ARG")[0].startswith("BASE=")
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert not re.search(r"https?://|index-url|\bpypi\b|\.org\b|\.com\b", text)


def test_the_examples_in_its_head_are_understood():
    text = DOCKERFILE.read_text(encoding="utf-8")
    examples = re.findall(r"^#   docker run .*? tlora(?:-cuda)? (.+)$", text, re.MULTILINE)
    assert [cli.parse(example.split()).command.__name__ for example in examples] == ["demo", "run"]
