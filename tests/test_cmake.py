"""What CMake decides before it compiles anything: whether CUDA is built, and where CUTLASS is."""

import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

CMAKE = shutil.which("cmake")
MODULES = Path(__file__).parent.parent / "cmake"

pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake")


def run(*arguments):
    result = subprocess.run([CMAKE, *map(str, arguments)], text=True, capture_output=True)
    return result.returncode, result.stdout + result.stderr


# --- AUTO: CUDA is built where there are both nvcc and a GPU --------------------------------------


def program(path, prints):
    path.write_text(f"#!/bin/sh\necho '{prints}'\n")
    path.chmod(0o755)
    return path


GPU = "GPU 0: NVIDIA H200 (UUID: GPU-1)"
NVCC = "Cuda compilation tools, release {}, V{}.1"


@pytest.mark.parametrize(
    ("nvcc", "gpus", "built"),
    [
        ("13.0", GPU, "ON"),
        ("12.3", GPU, "ON"),
        ("12.2", GPU, "OFF"),  # too old
        ("13.0", "No devices found.", "OFF"),
        ("13.0", None, "OFF"),  # no driver
        (None, GPU, "OFF"),
    ],
)
def test_cuda_is_built_where_it_can_run(nvcc, gpus, built, tmp_path):
    # An empty name counts as searched for and not found.
    compiler = program(tmp_path / "nvcc", NVCC.format(nvcc, nvcc)) if nvcc else ""
    smi = program(tmp_path / "nvidia-smi", gpus) if gpus else ""
    code, output = run(
        f"-DBLOCK_SPARSE_NVCC={compiler}",
        f"-DBLOCK_SPARSE_NVIDIA_SMI={smi}",
        *("-P", MODULES / "detect_cuda.cmake"),
    )
    assert code == 0, output
    assert f"BLOCK_SPARSE_CUDA: {built} (detected)" in output


# --- CUTLASS: the folder that was named, the package, or what git fetches -------------------------


@pytest.fixture
def project(tmp_path):
    """Configures a project that only looks for CUTLASS, with a Python of its own."""
    source = tmp_path / "project"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(lookup LANGUAGES NONE)\n"
        f"include({MODULES}/cutlass.cmake)\n"
    )
    venv.create(tmp_path / "environment", with_pip=False)
    python = tmp_path / "environment" / "bin" / "python"

    def configure(**options):
        options = {"Python_EXECUTABLE": python} | options
        flags = [f"-D{name}={value}" for name, value in options.items()]
        code, output = run("-S", source, "-B", tmp_path / "build", *flags)
        found = re.search(r"-- CUTLASS: (.*)", output)
        return code, output, Path(found[1]) if found else None

    return configure


def headers(include):
    (include / "cutlass").mkdir(parents=True)
    (include / "cutlass" / "cutlass.h").touch()
    return include


def test_where_cutlass_is_looked_for(project, tmp_path):
    site_packages = next((tmp_path / "environment" / "lib").glob("python*")) / "site-packages"
    fetched, named = (
        headers(tmp_path / "fetched" / "include"),
        headers(tmp_path / "own" / "include"),
    )
    options = {"FETCHCONTENT_SOURCE_DIR_CUTLASS": fetched.parent}  # in place of git
    assert project(**options)[2] == fetched
    package = headers(site_packages / "cutlass_library" / "source" / "include")
    assert project(**options)[2] == package
    assert project(CUTLASS_DIR=named.parent, **options)[2] == named
    assert project(CUTLASS_DIR="", **options)[2] == package


def test_a_folder_without_cutlass_is_an_error(project, tmp_path):
    code, output, _ = project(CUTLASS_DIR=tmp_path)
    assert code != 0
    assert f"no cutlass/cutlass.h in {tmp_path}/include" in " ".join(output.split())
