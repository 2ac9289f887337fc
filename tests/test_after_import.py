"""The hook that calls a function once a module is imported, and imports nothing itself."""

import importlib
import importlib.util
import inspect
import sys

import pytest

from pytorch_block_sparse.integrations._after_import import after_import


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one module in it, that can be imported."""
    folder = tmp_path / "someone_elses"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "inside.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("someone_elses")]:
        del sys.modules[name]
    sys.meta_path[:] = finders


NAME = "someone_elses.inside"


def test_before_the_import(package):
    seen = []
    finders = list(sys.meta_path)
    after_import(NAME, lambda module: seen.append(module.VALUE))
    assert not seen and NAME not in sys.modules and "someone_elses" not in sys.modules
    import someone_elses.inside  # noqa: F401

    assert seen == [1]  # after its code has run
    assert sys.meta_path == finders
    importlib.import_module(NAME)
    assert seen == [1]


def test_after_the_import(package):
    seen = []
    module = importlib.import_module(NAME)
    after_import(NAME, seen.append)
    assert seen == [module]


def test_looking_is_not_importing(package):
    seen = []
    after_import(NAME, seen.append)
    assert importlib.util.find_spec(NAME).name == NAME
    assert not seen and NAME not in sys.modules
    module = importlib.import_module(NAME)
    assert seen == [module] and inspect.getsource(module) == "VALUE = 1\n"


def test_a_module_that_is_not_there(package):
    after_import("someone_elses.missing", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="missing"):
        importlib.import_module("someone_elses.missing")


def test_an_import_that_fails_and_then_works(package):
    seen = []
    (package / "inside.py").write_text("raise ImportError('not yet')\n")
    after_import(NAME, seen.append)
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module(NAME)
    assert not seen
    (package / "inside.py").write_text("VALUE = 'now it works'\n")
    importlib.invalidate_caches()
    assert importlib.import_module(NAME).VALUE == "now it works"
    assert len(seen) == 1


def test_a_name_that_needs_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "pytorch_block_sparse.integrations.trainer", raising=False)
    with pytest.raises(ImportError, match=r"BlockSparsityCallback: needs transformers \(pip"):
        from pytorch_block_sparse.integrations import BlockSparsityCallback  # noqa: F401


def test_their_import_does_not_fail_because_of_us(package):
    def broken(module):
        raise AttributeError("no such name in this version")

    after_import(NAME, broken)
    with pytest.warns(UserWarning, match=r"registered with someone_elses\.inside.*no such name"):
        assert importlib.import_module(NAME).VALUE == 1
