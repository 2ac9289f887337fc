"""An editable install rebuilds changed C++ on import, and a source that does not compile stops it.

Works on a copy of the sources, installed into an environment of its own that borrows this one's
packages.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core")

REPOSITORY = Path(__file__).parent.parent
IMPORT = "import pytorch_block_sparse; print(pytorch_block_sparse.__file__)"


class Environment:
    """A virtual environment in `folder`; what is installed here can be imported there too."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python = str(folder / "bin" / "python")
        # A path that a .pth file adds is searched, but its own .pth files are not read: this
        # environment's editable install stays out of it.
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        borrowed = folder / "lib" / version / "site-packages" / "borrowed.pth"
        borrowed.write_text(sysconfig.get_path("purelib"))

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SKBUILD"))}
        return subprocess.run([self.python, *arguments], text=True, capture_output=True, env=clean)


@pytest.mark.slow
def test_import_rebuilds_changed_sources(tmp_path):
    sources = tmp_path / "sources"
    shutil.copytree(
        REPOSITORY, sources, ignore=shutil.ignore_patterns(".*", "build", "dist", "out", "tests")
    )
    environment = Environment(tmp_path / "environment")
    install = environment.run(
        *("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--ignore-installed"),
        "--config-settings=cmake.build-type=Debug",
        # What every machine runs: the others are no other build, and take a minute.
        "--config-settings=cmake.define.BLOCK_SPARSE_CPU_LEVELS=baseline;neon",
        *("--editable", str(sources)),
    )
    assert install.returncode == 0, install.stdout + install.stderr

    imported = environment.run("-c", IMPORT)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.startswith(str(sources)), "imported from another place"

    source = sources / "src" / "pattern.cpp"
    intact = source.read_text()
    source.write_text(intact + "\n#error broken on purpose\n")
    broken = environment.run("-c", IMPORT)
    assert broken.returncode != 0
    assert "broken on purpose" in broken.stdout + broken.stderr

    source.write_text(intact)
    mended = environment.run("-c", IMPORT)
    assert mended.returncode == 0, mended.stderr
