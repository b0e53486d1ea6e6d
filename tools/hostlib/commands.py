"""The commands of tools/host.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from gpulib import command as gpu
from gpulib import kit
from gpulib.comfyui import CannotStart
from trainlib import arguments

from .build import (
    Host,
    ensure_fast_tests,
    ensure_host,
    ensure_lint,
    ensure_newest_frontend,
    ensure_test_packages,
    has_accelerator,
    user_host,
)
from .cache import cache_root
from .chromium import ABSENT, find_chromium
from .errors import HostError
from .overrides import parse_sets
from .pins import REPO
from .pip import venv_python
from .process import run_foreground
from .progress import ProgressLine, format_time
from .results import OutputFile, RunResult, copy_into
from .server import Server, make_workspace

QUICKSTART = REPO / "workflows" / "01 Quickstart.json"
TESTS = REPO / "tests"
KIT = REPO / ".gpu-check"
TRAIN_JOB = REPO / "tools" / "trainlib" / "job.py"
NEWEST_FRONTEND = "TLORA_NEWEST_FRONTEND"  # variable for the tests: the folder of the newest interface


def chosen_host(args: argparse.Namespace) -> Host:
    if args.comfyui:
        if args.host_version:
            raise HostError(
                "--host-version chooses a host that this tool sets up; it cannot be combined with --comfyui."
            )
        return user_host(args.comfyui, args.python)
    if args.python:
        raise HostError("--python names the interpreter of the ComfyUI given with --comfyui; give both.")
    return ensure_host(args.host_version)


def make_server(host: Host, port: int = 0, log_to_terminal: bool = False, frontend: Path | None = None) -> Server:
    """Our own host works in the cache; the user's ComfyUI keeps using its own folders."""
    return Server(host, workspace_of(host), port, log_to_terminal, frontend)


def workspace_of(host: Host) -> Path | None:
    return cache_root() / "workspace" if host.ours else None


def train(args: argparse.Namespace) -> int:
    """A training in a process of its own, without a server; see trainlib.job."""
    job = arguments.job_of(args)
    host = chosen_host(args)
    options = [] if has_accelerator(host.python) else ["--cpu"]
    workspace = workspace_of(host)
    if workspace is not None:
        make_workspace(workspace)
        options += ["--base-directory", str(workspace)]
    job |= {"comfyui": str(host.comfyui), "host_arguments": options}
    environment = {**script_environment(host), **job.pop("environment")}
    return run_foreground([str(host.python), str(TRAIN_JOB), json.dumps(job)], environment)


def setup(args: argparse.Namespace) -> int:
    """The set-up alone, for images and machines that shall have it before the first job."""
    print(f"ComfyUI {chosen_host(args).version} is set up.")
    return 0


def demo(args: argparse.Namespace) -> int:
    if not QUICKSTART.is_file():
        raise HostError(f"The bundled workflow {QUICKSTART} is missing.")
    return _run_on_server(args, QUICKSTART, args.serve)


def run(args: argparse.Namespace) -> int:
    return _run_on_server(args, args.workflow, serve=False)


def _run_on_server(args: argparse.Namespace, workflow: str | Path, serve: bool) -> int:
    if not Path(workflow).is_file():
        raise HostError(f"There is no workflow file {workflow}.")
    sets = parse_sets(args.set)
    host = chosen_host(args)
    _say(f"Starting ComfyUI {host.version} ...")
    with make_server(host) as server:
        _say(f"Running {Path(workflow).name} ...")
        result = server.run(workflow, sets, listener=ProgressLine())
        report(server, result, args.out)
        if serve:
            _say(f"ComfyUI is running at {server.url} - press Ctrl-C to stop it.")
            server.wait()
            server.check_alive()
    return 0


def report(server: Server, result: RunResult, out: str | None) -> None:
    """Print where everything lies, copied to the folder `out` if one was asked for."""
    for text in result.texts:
        print(text)
    for path in result.tlora_files:
        print(f"T-LoRA:  {copy_into(out, path.name, path.read_bytes()) if out else path}")
    for label, files in (("Picture:", result.images), ("File:   ", result.other)):
        for file in files:
            if out:
                print(f"{label} {copy_into(out, file.filename, server.client.fetch(file))}")
            elif file.kind == "output":
                print(f"{label} {file.path}")
    if not out and _only_previews(result.images + result.other):
        print("The workflow made previews only, which are not kept; --out FOLDER saves them.")
    print(f"Done in {format_time(result.seconds)}.", flush=True)


def _only_previews(files: list[OutputFile]) -> bool:
    return bool(files) and all(file.kind != "output" for file in files)


def serve(args: argparse.Namespace) -> int:
    host = chosen_host(args)
    frontend = ensure_newest_frontend(host.python) if args.newest_frontend else None
    with make_server(host, args.port, log_to_terminal=True, frontend=frontend) as server:
        _say(f"ComfyUI {host.version} with the pack is running at {server.url} - press Ctrl-C to stop it.")
        return server.wait()


def test(args: argparse.Namespace) -> int:
    if args.fast:
        return _fast_test(args)
    host = chosen_host(args)
    env = script_environment(host)
    # Not the pack's own root: its nodes/ must never be importable as `nodes`. tests/conftest.py makes tlora_core
    # importable.
    env["PYTHONPATH"] = str(ensure_test_packages(host.python))
    browser = find_chromium()
    if browser:
        env["CHROMIUM"] = browser
        if not env.get(NEWEST_FRONTEND):  # which may name one that is newer than the pinned
            env[NEWEST_FRONTEND] = str(ensure_newest_frontend(host.python))
    else:
        _say(f"{ABSENT} The browser tests will be SKIPPED.")
    return _run_tests(host.python, args.arguments, env, f"Tests on ComfyUI {host.version}")


def _fast_test(args: argparse.Namespace) -> int:
    """The tests that need no ComfyUI, in an environment that has none."""
    if args.comfyui or args.python or args.host_version:
        raise HostError("--fast runs without ComfyUI; it cannot be combined with an option that chooses one.")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TLORA_COMFYUI")}
    return _run_tests(ensure_fast_tests(), args.arguments, {**env, "TLORA_FAST": "1"}, "Tests without ComfyUI")


def _run_tests(python: Path, arguments: list[str], env: dict[str, str], name: str) -> int:
    arguments = list(arguments)
    if not _names_tests(arguments):
        arguments.append(str(TESTS))
    started = time.monotonic()
    status = run_foreground([str(python), "-m", "pytest", *arguments], env)
    _say(f"{name} {'passed' if status == 0 else 'FAILED'} in {format_time(time.monotonic() - started)}.")
    return status


def lint(args: argparse.Namespace) -> int:
    """The linters, the formatter and the type checker, each also when one before it finds something."""
    commands = ensure_lint()
    checks = [
        ["ruff", "check", "."],
        ["ruff", "format", ".", *([] if args.fix else ["--check"])],
        ["pyright", "--pythonpath", str(commands / venv_python(Path()).name)],
    ]
    if (commands / "hadolint").is_file():  # its package has no file for some systems
        checks.append(["hadolint", "Dockerfile"])
    if args.fix:
        checks[0].append("--fix")
    # The Python package that starts pyright would tell of newer versions; this one is pinned.
    env = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    failed = []
    for name, *options in checks:
        _say(f"{name} {' '.join(options)}")
        if run_foreground([str(commands / name), *options], env, cwd=REPO):
            failed.append(name)
    _say(f"Lint FAILED: {', '.join(failed)}." if failed else "Lint passed.")
    return 1 if failed else 0


def _names_tests(arguments: list[str]) -> bool:
    """Whether pytest was told which files to run; otherwise it gets the whole tests folder."""
    for before, argument in zip([""] + arguments, arguments):
        path = Path(argument.split("::")[0])
        if before not in ("-k", "-m") and path.exists() and TESTS in (path.resolve(), *path.resolve().parents):
            return True
    return False


def bench(args: argparse.Namespace) -> int:
    script = REPO / "benchmarks" / f"{args.name}.py"
    if not script.is_file():
        known = sorted(path.stem for path in script.parent.glob("*.py") if not path.stem.startswith("_"))
        raise HostError(f"There is no benchmark '{args.name}'; there are: {', '.join(known) or 'none'}.")
    return _run_script(args, script)


def gpu_check(args: argparse.Namespace) -> int:
    try:
        if args.list:
            return gpu.list_parts(args)
        host = chosen_host(args)
        return gpu.check(args, host.python, host.comfyui)
    except (CannotStart, ValueError) as error:
        raise HostError(str(error)) from error


def gpu_kit(args: argparse.Namespace) -> int:
    _say("Packing (the compression takes a minute) ...")
    archive, *wheels = kit.pack(chosen_host(args), Path(args.folder), args.target_python, args.all).items()
    for name, size in sorted(wheels, key=lambda each: -each[1]):
        print(f"{size / 1e6:6.1f} MB  {name}")
    print(f"With ComfyUI's code, {archive[1] / 1e6:.1f} MB in {args.folder}.")
    print("There: python3 tools/gpu_check.py --kit FOLDER")
    return 0


def python(args: argparse.Namespace) -> int:
    script = Path(args.script)
    if not script.is_file():
        raise HostError(f"There is no script {script}.")
    return _run_script(args, script)


def _run_script(args: argparse.Namespace, script: Path) -> int:
    host = chosen_host(args)
    return run_foreground([str(host.python), str(script), *args.arguments], script_environment(host))


def script_environment(host: Host) -> dict[str, str]:
    """The environment in which a script can import the host's modules and tlora_core."""
    # ComfyUI first: its nodes.py must win over this repository's nodes/.
    paths = [str(host.comfyui), str(REPO)] + [path for path in [os.environ.get("PYTHONPATH")] if path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TLORA_COMFYUI": str(host.comfyui),
        "TLORA_HOST_VERSION": host.version,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
