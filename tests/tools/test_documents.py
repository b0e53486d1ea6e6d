"""CONTRIBUTING and docs/ARCHITECTURE.md only name files, commands and names that exist; the commands and tables that
README and the pages beside it print are understood."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from batchlib.jobs import jobs_of
from batchlib.table import read_table
from hostlib import cli
from hostlib.overrides import parse_sets
from places import REPO
from trainlib.arguments import job_of

DOCUMENTS = ["CONTRIBUTING.md", "docs/ARCHITECTURE.md"]
WITH_COMMANDS = ["README.md", "docs/REFERENCE_COMMANDS.md", "docs/BATCH.md", "docs/PLANNING.md"]
# What a scheduler sets.
SCHEDULED = {
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "8",
    "SKYPILOT_NODE_RANK": "2",
    "SKYPILOT_NUM_NODES": "8",
}
CORE = REPO / "tlora_core"
COMFY = CORE / "hosts" / "comfy"
# A document may leave out the folders that its paragraph is about.
STARTS = [REPO, CORE, COMFY, COMFY / "training"]


def quoted(document):
    return re.findall(r"`([^`\n]+)`", (REPO / document).read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_folders_are_there(document):
    named = [text for text in quoted(document) if re.fullmatch(r"[\w./-]+(/|\.(py|json|yml|toml))", text)]
    assert len(named) > 15
    assert [text for text in named if not any((start / text).exists() for start in STARTS)] == []


@pytest.mark.parametrize("document", [*DOCUMENTS, *WITH_COMMANDS])
def test_links_lead_somewhere(document):
    path = REPO / document
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_capitals_are_defined(document):
    names = {text for text in quoted(document) if re.fullmatch(r"_?[A-Z][A-Z_]+", text)} - {"REGISTRY_ACCESS_TOKEN"}
    folders = [CORE, REPO / "tools", REPO / "tests"]
    code = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


@pytest.mark.parametrize(
    "command", sorted({text for name in DOCUMENTS for text in quoted(name) if text.startswith("python3 tools/host.py")})
)
def test_commands_are_understood(command):
    arguments = shlex.split(command)[2:]
    parsed = cli.parse(arguments)
    for path in [getattr(parsed, "script", None), *(text for text in arguments if text.startswith("tests/"))]:
        assert path is None or (REPO / path).exists()


def printed_commands():
    """The commands of tools/host.py in blocks of code, each in one line."""
    for document in WITH_COMMANDS:
        for block in blocks(document, "bash", "yaml"):
            for command in re.findall(r"^.*?(python3 tools/host\.py (?:\\\n|'[^']*'|[^\n'])*)", block, re.MULTILINE):
                yield command.replace("\\\n", " ")


def blocks(document, *languages):
    text = (REPO / document).read_text(encoding="utf-8")
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("command", list(printed_commands()))
def test_printed_commands_are_understood(command, tmp_path, monkeypatch):
    if "$" in command:
        command = subprocess.check_output(["bash", "-c", f"echo {command}"], env=SCHEDULED, text=True)
        assert "--shard 3/8" in command
    name, *arguments = shlex.split(command)[2:]
    parsed = cli.parse([name, *arguments])
    if name == "run":
        assert (REPO / parsed.workflow).is_file() and parse_sets(parsed.set)
    if name == "bench":
        assert (REPO / "benchmarks" / f"{parsed.name}.py").is_file()
    if name == "train":
        (tmp_path / "dog_example").mkdir()
        (tmp_path / "dog_example" / "02.jpg").touch()
        monkeypatch.chdir(tmp_path)
        assert job_of(parsed)["inputs"]["class_word"] == "dog"


@pytest.mark.parametrize("table", [block for name in WITH_COMMANDS for block in blocks(name, "csv")])
def test_printed_tables_are_understood(table, tmp_path):
    (tmp_path / "jobs.csv").write_text(table, encoding="utf-8")
    for picture in re.findall(r"[\w/]+\.jpg", table):
        (tmp_path / picture).parent.mkdir(exist_ok=True)
        (tmp_path / picture).touch()
    workflow = {} if "." in table.split(",")[0] else None
    jobs = jobs_of(read_table(tmp_path / "jobs.csv"), tmp_path, workflow)
    assert len(jobs) == table.strip().count("\n") and all(job.files for job in jobs)
    if workflow is None:
        assert {job.asked["inputs"]["class_word"] for job in jobs} == {"dog", "cat"}
        assert [Path(path).name for job in jobs for path in job.files["image"]] == ["rex.jpg", "tom.jpg"]
