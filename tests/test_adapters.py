"""The trainers' adapters as a package: what imports what, and what is said if a trainer is not installed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADAPTERS = ROOT / "echo_torch" / "callbacks"
PACKAGES = {
    # adapter: the package that it needs
    "lightning": "lightning",
    "transformers": "transformers",
    "ignite": "ignite",
    "sb3": "stable_baselines3",
    "torchrl": "torchrl",
}


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_echo_torch_imports_no_trainer() -> None:
    """Nor do the policy and the hooks for loaders."""
    names = [*PACKAGES.values(), "accelerate", "tensordict", "gymnasium"]
    done = run(
        "import sys, echo_torch, echo_torch.workers, echo_torch.callbacks.loop\n"
        f"print([name for name in {names} if name in sys.modules])"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("adapter", PACKAGES)
def test_an_adapter_without_its_package_names_the_extra(adapter: str) -> None:
    package = PACKAGES[adapter]
    done = run(
        f"import sys\nsys.modules[{package!r}] = None\n"
        f"try:\n    import echo_torch.callbacks.{adapter}\nexcept ImportError as error:\n    print(error)"
    )
    expected = f"echo_torch.callbacks.{adapter} needs the package {package}: pip install 'echo-torch[{adapter}]'\n"
    assert (done.stdout, done.stderr) == (expected, "")


def test_each_adapter_has_its_extra_which_the_tests_install() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^([a-z0-9]+) = \[", project, re.MULTILINE))
    installed = re.findall(r'"echo-torch\[([a-z0-9,]+)\]"', project)
    assert set(PACKAGES) <= extras
    assert set(PACKAGES) <= set(installed[0].split(","))


@pytest.mark.parametrize("adapter", PACKAGES)
def test_an_adapter_is_thin(adapter: str) -> None:
    """Under 90 lines, but for what explains it."""
    text = (ADAPTERS / f"{adapter}.py").read_text()
    lines = {number for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    assert len(lines) < 90
