"""The rules of docs/ARCHITECTURE.md: who may import ComfyUI, which folder may import which, and that nothing imports
itself by a detour.

An import inside a function counts like one at the top of a module.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from places import REPO

CORE = "tlora_core"
HOST_MODULES = {"comfy", "comfy_extras", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server", "execution"}
MAY_IMPORT_THE_HOST = (f"{CORE}.hosts.comfy", f"{CORE}.tiny.comfy", "nodes")

# From below. A part may import those of earlier lines and itself, and none of its own line or a later one.
CORE_ORDER = (
    ("errors", "version"),
    ("packages",),
    ("method", "tiny"),
    ("layers", "files"),
    ("training",),
    ("reports",),
    ("hosts",),
    ("cli",),
    ("__main__",),
)
HOSTS_ORDER = (("diffusers", "comfy"), ("scripts",))
COMFY_ORDER = (
    ("model",),
    ("page",),
    ("progress", "room", "reach", "whole_sampling"),
    ("sampling", "draw", "files", "encoders", "loaders", "start"),
    ("training",),
    ("routes",),
)

Imports = Mapping[str, set[str]]  # by module, what it imports: names of modules, those from elsewhere too


def modules_of(root: Path, *folders: str) -> dict[str, Path]:
    """The modules below `root` in these packages, by their full names; a package goes by its own name."""
    found = {}
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(root: Path, *folders: str) -> dict[str, set[str]]:
    """What each module imports. A name out of a package is that module where it is one, else the package itself."""
    modules = modules_of(root, *folders)
    return {name: set(_imported(name, path, modules)) for name, path in modules.items()}


def _imported(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package itself. `nodes` leaves its own top with two, for the repository's root.
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}" if source else alias.name
                yield inner if inner in modules else source


def imports_of_the_host(imports: Imports) -> list[str]:
    """Imports of ComfyUI where it may not be imported."""
    return [
        f"{name} imports {other}"
        for name, others in imports.items()
        if not _is_below(name, *MAY_IMPORT_THE_HOST)
        for other in sorted(others)
        if other.split(".")[0] in HOST_MODULES
    ]


def arrows_back(imports: Imports, package: str, order: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports within `package` from a part to another part on its own line of `order` or a later one; and parts that
    `order` does not name."""
    line_of = {part: line for line, parts in enumerate(order) for part in parts}
    found = []
    for name, others in imports.items():
        here = _part(name, package)
        if here is not None and here not in line_of:
            found.append(f"{name} is in no line of the order")
        for other in sorted(others):
            there = _part(other, package)
            if here in line_of and there in line_of and here != there and line_of[there] >= line_of[here]:
                found.append(f"{name} imports {other}")
    return found


def circles(imports: Imports) -> list[list[str]]:
    """Groups of modules that import each other, directly or by a detour."""
    reached = {name: _reachable(name, imports) for name in imports}
    groups = {frozenset(other for other in reached[name] if name in reached.get(other, ())) for name in imports}
    return sorted(sorted(group) for group in groups if group)


def _reachable(name: str, imports: Imports) -> set[str]:
    seen, waiting = set(), [name]
    while waiting:
        new = imports.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def _part(name: str, package: str) -> str | None:
    """The part of `package` that a module lies in; None for the package itself and for what is not in it."""
    return name.removeprefix(f"{package}.").split(".")[0] if name.startswith(f"{package}.") else None


def _is_below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.fixture(scope="module")
def imports():
    return imports_of(REPO, CORE, "nodes")


def test_only_its_own_folders_import_the_host(imports):
    assert imports_of_the_host(imports) == []


def test_no_module_imports_itself_by_a_detour(imports):
    assert circles(imports) == []


def test_folders_import_one_way(imports):
    assert arrows_back(imports, CORE, CORE_ORDER) == []


def test_parts_of_the_hosts_import_one_way(imports):
    assert arrows_back(imports, f"{CORE}.hosts", HOSTS_ORDER) == []
    assert arrows_back(imports, f"{CORE}.hosts.comfy", COMFY_ORDER) == []


def test_the_core_never_imports_the_nodes(imports):
    assert [name for name, others in imports.items() if _is_below(name, CORE) and any(map(_is_node, others))] == []


def _is_node(name: str) -> bool:
    return _is_below(name, "nodes")


# --- the checker itself, on a small tree that is in order, with one import added ---

TREE = {
    "__init__.py": "from .method.ranks import rank",
    "method/__init__.py": "",
    "method/ranks.py": "import math",
    "files/__init__.py": "",
    "files/store.py": "from ..method import ranks",
    "layers/__init__.py": "",
    "layers/overlay.py": "from ..method.ranks import rank",
    "hosts/__init__.py": "",
    "hosts/comfy/__init__.py": "",
    "hosts/comfy/model/__init__.py": "import comfy.sd",
    "hosts/comfy/sampling.py": "from ...layers.overlay import Overlay\nfrom .model import layers",
    "hosts/comfy/training/__init__.py": "from ..sampling import apply",
}


def checked(root, path=None, line=""):
    """(imports of the host, circles, arrows back, arrows back in the host) of the tree with a line added to a file."""
    for name, text in TREE.items():
        file = root / CORE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n{line}\n" if name == path else text)
    found = imports_of(root, CORE)
    orders = ((CORE, CORE_ORDER), (f"{CORE}.hosts.comfy", COMFY_ORDER))
    return [imports_of_the_host(found), circles(found), *(arrows_back(found, *order) for order in orders)]


def test_a_tree_in_order_passes(tmp_path):
    assert checked(tmp_path) == [[], [], [], []]


@pytest.mark.parametrize(
    "rule, path, line, said",
    [
        (0, "method/ranks.py", "import comfy.utils", "tlora_core.method.ranks imports comfy.utils"),
        (0, "files/store.py", "def f():\n    import folder_paths", "tlora_core.files.store imports folder_paths"),
        (2, "method/ranks.py", "from ..files import store", "tlora_core.method.ranks imports tlora_core.files.store"),
        (
            2,
            "layers/overlay.py",
            "from ..files.store import x",
            "layers.overlay imports tlora_core.files.store",
        ),
        (3, "hosts/comfy/sampling.py", "from .training import x", "sampling imports tlora_core.hosts.comfy.training"),
    ],
)
def test_a_broken_import_is_found(tmp_path, rule, path, line, said):
    [found] = checked(tmp_path, path, line)[rule]
    assert found.endswith(said)


def test_a_circle_is_found_within_a_folder_and_by_a_detour(tmp_path):
    (tmp_path / CORE / "method").mkdir(parents=True)
    (tmp_path / CORE / "method" / "starts.py").write_text("from .bank import Bank")
    (tmp_path / CORE / "method" / "bank.py").write_text("from . import ranks")
    found = checked(tmp_path, "method/ranks.py", "def f():\n    from .starts import start")
    assert found[1] == [[f"{CORE}.method.{name}" for name in ("bank", "ranks", "starts")]]


def test_a_folder_without_a_place_in_the_order_is_found(tmp_path):
    (tmp_path / CORE / "helpers").mkdir(parents=True)
    (tmp_path / CORE / "helpers" / "misc.py").write_text("")
    assert checked(tmp_path)[2] == ["tlora_core.helpers.misc is in no line of the order"]
