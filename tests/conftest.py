"""What tests share: the cuda marker, the hypothesis profile, one thread, the forced kernel."""

import os

# torch keeps compiled graphs on disk, and does not see that the schema of an op has changed since.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

# Workers of pytest-xdist share the machine: waiting threads of one keep the other from work.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("checkpoint_helpers", "linear_helpers", "patch_helpers")

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed"):
        import machine  # imports the package, which this file does not

        terminalreporter.section("the machine")
        for line in machine.description():
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For modules whose products are too small for threads: waking them is most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def force_kernel(monkeypatch):
    """Call it with the name of a kernel: every product of the test runs on that one."""

    def force(name):
        monkeypatch.setenv("BLOCK_SPARSE_KERNEL", name)

    return force
