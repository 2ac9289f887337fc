"""The Makefile: its targets, its variables, and what it says where something is missing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def make(tmp_path):
    """Runs make in a folder that has nothing but the Makefile: everything is still to be done."""
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "python").mkdir()
    (tmp_path / "pyproject.toml").touch()

    def run(*arguments):
        return subprocess.run(
            ["make", *arguments], cwd=tmp_path, text=True, capture_output=True, check=False
        )

    return run


def test_make_alone_lists_the_commands(make):
    listed = re.findall(r"^  make ([a-z-]+) +\S", make().stdout, re.MULTILINE)
    assert listed == [
        *("help", "setup", "demo", "test", "test-fast", "bench", "docs", "notebook"),
        *("lint", "format", "wheel", "clean"),
    ]


@pytest.mark.parametrize(
    "target",
    ["setup", "demo", "test", "test-fast", "bench", "docs", "notebook", "lint", "format", "wheel"],
)
def test_every_command_sets_up_first(make, target):
    commands = make("-n", target, "PYTHON=some-python", "TORCH=torch==2.11.0").stdout
    steps = [
        "some-python -m venv .venv",
        "pip install torch==2.11.0",
        "pip install 'scikit-build-core",
        "pip install --no-build-isolation",
    ]
    places = [commands.index(step) for step in steps]
    assert places == sorted(places)


def test_without_python3_venv_it_says_how_to_install_it(make, tmp_path):
    # What Debian's python3 does without python3-venv: a folder half made, and exit status 1.
    python = tmp_path / "python3-without-venv"
    python.write_text("#!/bin/sh\nmkdir -p .venv/bin\nexit 1\n")
    python.chmod(0o755)
    result = make("setup", f"PYTHON={python}")
    assert result.returncode != 0
    assert "sudo apt-get install python3-venv" in result.stdout
    assert not (tmp_path / ".venv").exists(), "the next try would take it for finished"
