"""The trainers' adapters as a package: what imports what, and what is said if a trainer is not installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    """Nor do the policy, the hooks for loaders, and what Fabric calls. Nor is the server's package needed."""
    names = [*PACKAGES.values(), "accelerate", "tensordict", "gymnasium", "echo"]
    done = run(
        "import sys, echo_torch, echo_torch.workers, echo_torch.callbacks.loop, echo_torch.callbacks.fabric\n"
        f"print([name for name in {names} if name in sys.modules])"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_an_adapter_without_its_package_names_the_extra() -> None:
    """In one line."""
    done = run(
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({[*PACKAGES.values()]}))\n"
        f"for adapter in {[*PACKAGES]}:\n"
        "    try:\n        importlib.import_module(f'echo_torch.callbacks.{adapter}')\n"
        "    except ImportError as error:\n        print(error)"
    )
    expected = [
        f"echo_torch.callbacks.{adapter} needs the package {package}: pip install 'echo-torch[{adapter}]'"
        for adapter, package in PACKAGES.items()
    ]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


def test_each_adapter_has_its_extra_which_the_tests_install() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^([a-z0-9]+) = \[", project, re.MULTILINE))
    installed = re.findall(r'"echo-torch\[([a-z0-9,]+)\]"', project)
    assert set(PACKAGES) <= extras
    assert set(PACKAGES) <= set(installed[0].split(","))


@pytest.mark.parametrize(
    "file", sorted({path.stem for path in ADAPTERS.glob("*.py")} - {"__init__", "loop", "sb3_samples"})
)
def test_an_adapter_is_thin(file: str) -> None:
    """Under 90 lines, with what explains them."""
    assert len((ADAPTERS / f"{file}.py").read_text().splitlines()) < 90
