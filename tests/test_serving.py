"""Serving without Python: the installed C++ package, and a compiled model that runs from C++.

Both programs of examples/cpp are built as docs/serving.md says, whose Python compiles the model.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "serving.md"

needs_compiler = pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "ninja", "g++"))), reason="needs cmake, ninja and g++"
)


def run(*command, **variables):
    result = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **variables},
        text=True,
        capture_output=True,
    )
    return result.returncode, result.stdout + result.stderr


def done(*command, **variables):
    code, output = run(*command, **variables)
    assert code == 0, output
    return output


def configure(source, build, *options):
    return done("cmake", "-S", source, "-B", build, "-G", "Ninja", *options)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """Where the core is installed, as a component of what the package was built in."""
    build = ROOT / "build" / "editable"
    if not (build / "CMakeCache.txt").exists():
        pytest.skip("needs build/editable: make setup")
    prefix = tmp_path_factory.mktemp("prefix")
    done("cmake", "--build", build, "--target", "block_sparse_core")
    done("cmake", "--install", build, "--prefix", prefix, "--component", "core")
    return prefix


# --- The products, in plain C++ -------------------------------------------------------------------


@pytest.fixture(scope="module")
def multiply(core, tmp_path_factory):
    build = tmp_path_factory.mktemp("multiply")
    configure(ROOT / "examples" / "cpp", build, f"-DCMAKE_PREFIX_PATH={core}")
    done("cmake", "--build", build)
    return build / "multiply"


@needs_compiler
@pytest.mark.parametrize("kernel", ["cpu_panel", "cpu_reference"])
def test_a_program_multiplies(multiply, kernel):
    said = done(multiply, BLOCK_SPARSE_KERNEL=kernel)
    assert f"{kernel}: chosen" in said
    assert "the result is that of plain loops, bit for bit" in said
    assert float(re.search(r"([\d.]+) GFLOP/s", said)[1]) > 0


@needs_compiler
def test_an_error_reaches_the_program(multiply):
    code, said = run(multiply, BLOCK_SPARSE_KERNEL="fastest")
    assert code != 0 and "no kernel is called 'fastest'" in said


@needs_compiler
def test_what_is_installed(core):
    installed = {path.relative_to(core) for path in core.rglob("*") if path.is_file()}
    headers = {Path("include") / path.relative_to(ROOT / "include") for path in installed_headers()}
    assert {path for path in installed if path.parts[0] == "include"} == headers
    assert [path.name for path in installed if path.suffix == ".a"] == ["libblock_sparse.a"]
    (config_version,) = core.rglob("block_sparse-config-version.cmake")
    (built,) = re.findall(r'PACKAGE_VERSION "(.*?)"', config_version.read_text())[:1]
    assert built == version("pytorch_block_sparse")
    # A moved folder is still found: no path of this machine is in it.
    for path in core.rglob("*.cmake"):
        assert str(ROOT) not in path.read_text()


def installed_headers():
    return (ROOT / "include" / "block_sparse").glob("*.h")


# --- A model, with AOTInductor --------------------------------------------------------------------


@pytest.fixture(scope="module")
def aoti_run(core, tmp_path_factory):
    if torch.version.cuda is not None and shutil.which("nvcc") is None:
        pytest.skip("find_package(Torch) of a torch with CUDA needs nvcc")
    build = tmp_path_factory.mktemp("aoti")
    prefixes = f"{core};{torch.utils.cmake_prefix_path}"
    configure(
        ROOT / "examples" / "cpp", build, "-DWITH_TORCH=ON", f"-DCMAKE_PREFIX_PATH={prefixes}"
    )
    done("cmake", "--build", build, "--target", "aoti_run")
    return build / "aoti_run"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder in which the Python of the page was run."""
    folder = tmp_path_factory.mktemp("package")
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    here = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(code, str(PAGE), "exec"), {})
    finally:
        os.chdir(here)
    return folder


LIBRARY = find_spec("pytorch_block_sparse._C").origin


@pytest.mark.slow
@needs_compiler
def test_a_compiled_model_runs_without_python(aoti_run, package):
    files = [package / "model.pt2", package / "input.pt", package / "output.pt"]
    done(aoti_run, *files, LIBRARY)
    wanted = torch.load(package / "expected.pt", weights_only=True)
    assert torch.equal(torch.load(package / "output.pt", weights_only=True), wanted)


@pytest.mark.slow
@needs_compiler
def test_the_compiled_model_takes_any_number_of_tokens(aoti_run, package, tmp_path):
    model = torch._inductor.aoti_load_package(str(package / "model.pt2"))
    x = torch.randn(33, 256)
    torch.save(x, tmp_path / "input.pt")
    done(aoti_run, package / "model.pt2", tmp_path / "input.pt", tmp_path / "output.pt", LIBRARY)
    assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True), model(x))


@pytest.mark.slow
@needs_compiler
def test_the_traps(aoti_run, package, tmp_path):
    model, output = package / "model.pt2", tmp_path / "output.pt"
    code, said = run(aoti_run, model, package / "input.pt", output, "libm.so.6")
    assert code != 0 and "Could not find schema for block_sparse::forward" in said
    code, said = run(aoti_run, model, package / "input.pt", output, "nowhere/_C.so")
    assert code != 0 and "nowhere/_C.so: cannot open" in said

    torch.save(torch.randn(3, 255), tmp_path / "input.pt")
    files = (model, tmp_path / "input.pt", output, LIBRARY)
    done(aoti_run, *files)
    code, said = run(aoti_run, *files, AOTI_RUNTIME_CHECK_INPUTS="1")
    assert code != 0 and "expected: 256, but got: 255" in said


COMPILED_ON_GPU = """
import sys
import torch
from torch import nn
from pytorch_block_sparse import BlockSparseLinear

kind, path = sys.argv[1:]
layer = nn.Linear(256, 512) if kind == "dense" else BlockSparseLinear(256, 512, density=0.25)
model = nn.Sequential(layer, nn.ReLU(), nn.Linear(512, 10))
model = model.to("cuda", torch.bfloat16).eval().requires_grad_(False)
x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
tokens = torch.export.Dim("tokens", min=1, max=4096)
with torch.no_grad():
    program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},))
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    compiled = torch._inductor.aoti_load_package(path)
    for count in (1, 8, 300):
        x = torch.randn(count, 256, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), model(x))
"""


@pytest.mark.cuda
def test_a_compiled_model_runs_on_a_gpu(tmp_path):
    def codes(kind):
        return run(sys.executable, "-c", COMPILED_ON_GPU, kind, tmp_path / f"{kind}.pt2")

    code, said = codes("dense")
    if code < 0:  # ended by a signal
        pytest.skip(f"torch {torch.__version__} cannot load a compiled dense model here: {said}")
    assert code == 0, said
    code, said = codes("sparse")
    assert code == 0, said
