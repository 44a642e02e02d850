"""The package as it lies there: what the map says of it, what users import, and what a wheel holds."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from echo_torch import EchoSink, TcpClient

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "echo_torch"
MAP = (PACKAGE / "README.md").read_text()
CODE_SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", MAP, flags=re.DOTALL | re.MULTILINE))
PATHS = sorted({span for span in CODE_SPANS if re.fullmatch(r"[\w./]+(/|\.py|\.toml)", span)} - {"__init__.py"})
NAMES = sorted({span for span in CODE_SPANS if re.fullmatch(r"[\w/]+\.py:[\w.]+", span)} - {"file.py:Name"})
MOST_MODULES = 12
"""In one folder: more cannot be taken in at a glance."""
PUBLIC = {
    "echo_torch": "CertificateError Client ConnectionClosedError DeliveryTimeoutError EchoDataset EchoSink "
    "HandshakeError LearnerGoneError PeerStats ProtocolError SinkStats SpecMismatchError TLS TcpClient __version__ "
    "numpy_example",
    "echo_torch.callbacks.fabric": "FabricSinkCallback",
    "echo_torch.callbacks.ignite": "SinkHandler",
    "echo_torch.callbacks.lightning": "FabricSinkCallback SinkCallback",
    "echo_torch.callbacks.loop": "SinkCallback padding",
    "echo_torch.callbacks.sb3": "SinkCallback example",
    "echo_torch.callbacks.torchrl": "SinkCollectorHook SinkHook",
    "echo_torch.callbacks.transformers": "SinkCallback SinkTrainerMixin",
    "echo_torch.ranks": "cpu_group",
    "echo_torch.workers": "Sent SinkCollate SinkDataset",
}


def defined_in(body: list[ast.stmt], inside: str) -> set[str]:
    """Names that the statements of a module define: ``Name``, ``Class.method``, ``Class.attribute``."""
    found = set()
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(inside + node.name)
        if isinstance(node, ast.ClassDef):
            found |= defined_in(node.body, f"{inside}{node.name}.")
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {inside + target.id for target in targets if isinstance(target, ast.Name)}
        if inside and isinstance(node, ast.FunctionDef):  # a method, which sets attributes
            stored = (
                one for one in ast.walk(node) if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store)
            )
            found |= {inside + one.attr for one in stored if ast.unparse(one.value) == "self"}
    return found


@pytest.mark.parametrize("path", PATHS)
def test_paths_in_the_map_exist(path: str) -> None:
    assert (PACKAGE / path).exists() or (ROOT / path).exists()


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_map_exist(name: str) -> None:
    path, attribute = name.split(":")
    assert attribute in defined_in(ast.parse((PACKAGE / path).read_text()).body, "")


def test_the_map_names_every_wing_and_is_short() -> None:
    wings = {f"{folder.name}/" for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    # Each has its line in the spine.
    assert wings == set(re.findall(r"^(\w+/)", MAP, re.MULTILINE))
    assert len(NAMES) > 30
    assert MAP.count("\n") <= 150


def test_a_name_that_is_not_there_is_noticed() -> None:
    names = defined_in(
        ast.parse("ONE = 1\nclass A:\n    def b(self):\n        self.c = 2\ndef d():\n    e = 3").body, ""
    )
    assert names == {"ONE", "A", "A.b", "A.c", "d"}


def test_no_folder_has_more_modules_than_can_be_taken_in() -> None:
    folders = [PACKAGE, *(path.parent for path in PACKAGE.glob("*/__init__.py"))]
    crowded = {folder.name: len(modules) for folder in folders if len(modules := modules_in(folder)) > MOST_MODULES}
    assert crowded == {}
    assert len(folders) > 10


def modules_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.py") if path.name != "__init__.py"]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_imported_from_where_users_do(module: str) -> None:
    imported = importlib.import_module(module)
    missing = [name for name in PUBLIC[module].split() if not hasattr(imported, name)]
    assert missing == []
    if module == "echo_torch":
        assert sorted(imported.__all__) == sorted(PUBLIC[module].split())


@pytest.mark.parametrize(("kind", "column"), [(EchoSink, 1), (TcpClient, 2)])
def test_the_table_of_options_is_that_of_the_signatures(kind: type, column: int) -> None:
    """Names and defaults, both ways; an option that one of the two lacks has a dash there."""
    rows = [
        line.strip("| ").split(" | ") for line in MAP.partition("## Options")[2].splitlines() if line.startswith("| `")
    ]
    table = {row[0].strip("`"): row[column].strip('"') for row in rows if row[column] != "-"}
    signature = inspect.signature(kind).parameters.values()
    options = {option.name: option.default for option in signature if option.default is not option.empty}
    assert table == {name: getattr(default, "__name__", str(default)) for name, default in options.items()}
    assert all(len(row) == 5 and all(row) for row in rows)


@pytest.mark.slow
def test_a_wheel_has_the_modules_that_are_there_and_no_others(tmp_path: Path) -> None:
    """Built of a copy. Fails if an earlier build left modules in ``build/`` that moved since: delete that folder."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "echo_torch", ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT / "build").exists():
        shutil.copytree(ROOT / "build", source / "build")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("echo_torch/")}
    wanted = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")} | {"echo_torch/py.typed"}
    assert packed == wanted


def test_importing_on_windows_says_where_it_runs() -> None:
    """There is no ``fcntl`` there."""
    code = "import sys; sys.modules['fcntl'] = None; import echo_torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: echo_torch runs on Linux and macOS; on Windows, use it under WSL"
    )
