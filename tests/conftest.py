"""Fixtures: the real ComfyUI server, its Python modules in this process, and the browser.

Tests import the core as `tlora_core`. The repository root must stay off sys.path, because its `nodes/` would hide
ComfyUI's `nodes.py`; a finder for that one package takes its place.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path

import hypothesis
import pytest
from hostlib.build import Host
from hostlib.chromium import ABSENT, find_chromium
from hostlib.process import exit_on_signals
from hostlib.server import Server

REPO = Path(__file__).resolve().parents[1]
NEEDS_HOST = "This test needs ComfyUI; run it with: python3 tools/host.py test"
# Set by `python3 tools/host.py test --fast`: the environment holds no ComfyUI, and every test that asks for the fixture
# `host`, itself or through another fixture, is left out.
FAST = os.environ.get("TLORA_FAST") == "1"
LEFT_OUT = pytest.StashKey[int]()

# `python -m pytest` puts the current folder there.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != REPO]


def terminated(status: int):
    """A terminated test run still stops its server. pytest takes this exception for the end, and SystemExit for a
    failed test; its own, pytest.exit's, is an Exception, which the code under test would take for an error."""
    raise KeyboardInterrupt("The test run was terminated.")


exit_on_signals(terminated)
# On a busy machine, the time of an example means nothing.
hypothesis.settings.register_profile("tlora", deadline=None)
hypothesis.settings.load_profile("tlora")


class CoreFinder(importlib.abc.MetaPathFinder):
    """Finds the top-level package `tlora_core` in the repository, and nothing else there."""

    def find_spec(self, name, path=None, target=None):
        if name == "tlora_core":
            return importlib.machinery.PathFinder.find_spec(name, [str(REPO)])
        return None


sys.meta_path.append(CoreFinder())


def pytest_collection_modifyitems(config, items):
    """Leave the tests that need ComfyUI out of a fast run."""
    if not FAST:
        return
    needy = [item for item in items if "host" in item.fixturenames]
    items[:] = [item for item in items if "host" not in item.fixturenames]
    config.hook.pytest_deselected(items=needy)
    config.stash[LEFT_OUT] = len(needy)


def pytest_terminal_summary(terminalreporter, config):
    """Say at the end what was not tested: the tests left out of a fast run, and the browser's without Chromium."""
    if config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"Tests left out because they need ComfyUI: {config.stash[LEFT_OUT]}.", yellow=True)
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    without_browser = sum(ABSENT in reason for reason in reasons)
    if without_browser:
        terminalreporter.write_line(f"Browser tests SKIPPED: {without_browser}. {ABSENT}", yellow=True)


@pytest.fixture(scope="session")
def host() -> Host:
    """The ComfyUI folder and interpreter that tools/host.py chose."""
    comfyui = os.environ.get("TLORA_COMFYUI")
    if not comfyui:
        pytest.fail(NEEDS_HOST)
    return Host(Path(comfyui), Path(sys.executable), os.environ.get("TLORA_HOST_VERSION", "unknown"), ours=True)


@pytest.fixture(scope="session")
def server(host, tmp_path_factory):
    """The real server with the pack, started once, in a workspace of its own."""
    with Server(host, tmp_path_factory.mktemp("workspace")) as running:
        yield running


@pytest.fixture(scope="session")
def newest_frontend_server(host, tmp_path_factory):
    """Another server, with the newest interface instead of the host's own."""
    folder = os.environ.get("TLORA_NEWEST_FRONTEND")
    if not folder:
        pytest.skip("The newest interface is set up by: python3 tools/host.py test")
    with Server(host, tmp_path_factory.mktemp("newest_frontend"), frontend=Path(folder)) as running:
        yield running


@pytest.fixture(scope="module", params=["pinned", "newest"])
def frontend(request, host):
    """The server with the host's own interface, then the one with the newest."""
    return request.getfixturevalue("server" if request.param == "pinned" else "newest_frontend_server")


@pytest.fixture(scope="module")
def loras(server) -> Path:
    """The server's loras folder."""
    return server.workspace / "models" / "loras"


@pytest.fixture(scope="module")
def trained(server):
    """Two T-LoRAs by name, which change the picture in different ways."""
    import graphs

    graph = graphs.TinyGraph()
    nodes = [graph.train(seed=seed, file_name=f"tests/seed{seed}") for seed in (1, 2)]
    result = server.run(graph)
    return [result.outputs[node.id]["text"][0] for node in nodes]


@pytest.fixture(scope="module")
def good(server, trained):
    """The pictures of graphs.bare_and_adapted before anything goes wrong."""
    import graphs

    return graphs.bare_and_adapted(server, trained[0])


@pytest.fixture(scope="session")
def comfy(host, tmp_path_factory):
    """ComfyUI's modules in this process, on the CPU; import what you need (`import comfy.samplers`) inside the test."""
    sys.path.insert(0, str(host.comfyui))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    # These are read when comfy.model_management and folder_paths are first imported.
    args.cpu = True
    args.base_directory = str(tmp_path_factory.mktemp("comfy"))
    import comfy.model_management
    import utils.extra_config  # noqa: F401  as main.py does: later comfy/, which the host's nodes.py puts first, hides `utils`

    yield comfy
    sys.path.remove(str(host.comfyui))


@pytest.fixture(scope="module")
def unet(comfy):
    """A random U-Net of SDXL's kind as MODEL."""
    import host_models

    return host_models.random_unet()


@pytest.fixture(scope="module")
def tlora(unet):
    """A random T-LoRA of `unet`."""
    import host_models
    import sampling_runs

    return host_models.random_tlora(unet, sampling_runs.RANK, sampling_runs.MIN_RANK)


@pytest.fixture(scope="module")
def base(comfy):
    """The tiny base as (MODEL, CLIP, VAE)."""
    from host_models import tiny_base

    return tiny_base()


@pytest.fixture
def output(comfy, tmp_path):
    """The host's output and loras folders, empty."""
    import folder_paths

    before = folder_paths.get_output_directory(), folder_paths.folder_names_and_paths["loras"]
    (tmp_path / "loras").mkdir()
    folder_paths.set_output_directory(str(tmp_path))
    folder_paths.folder_names_and_paths["loras"] = ([str(tmp_path / "loras")], before[1][1])
    yield tmp_path
    folder_paths.set_output_directory(before[0])
    folder_paths.folder_names_and_paths["loras"] = before[1]


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def twins(comfy, request):
    """One random model in the host and in diffusers: kind, MODEL, pipe, denoiser, and tlora(...), which makes a random
    T-LoRA of rank 8 and min_rank 2 for it."""
    from types import SimpleNamespace

    import diffusers_twins
    import random_models

    model, pipe = getattr(diffusers_twins, f"{request.param}_twins")()

    def tlora(min_rank=2, size=1.0, seed=0, **options):
        return random_models.random_tlora(model, 8, min_rank, size, seed, **options)

    denoiser = pipe.unet if request.param == "sdxl" else pipe.transformer
    return SimpleNamespace(kind=request.param, model=model, pipe=pipe, denoiser=denoiser, tlora=tlora)


@pytest.fixture(scope="module")
def one_thread():
    """For tests with small matrix products, which a second thread only slows down."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium for the browser tests."""
    path = find_chromium()
    if path is None:
        pytest.skip(ABSENT)
    return path


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory) -> Path:
    """Contains a tiny CLIP in "clip" and a tiny DINO in "dino"."""
    from encoder_folders import write_clip, write_dino

    root = tmp_path_factory.mktemp("clip_vision")
    for write in (write_clip, write_dino):
        folder = root / write.__name__.removeprefix("write_")
        folder.mkdir()
        write(folder)
    return root
