"""What the built libraries need from outside, read from their ELF files.

One build has to load into every torch from 2.11 on, so nothing but the stable ABI may be used;
these tests look at the result and not at the sources that should have led to it.
"""

from __future__ import annotations

import importlib.util
import re
import struct
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from pytorch_block_sparse import _library

NEEDED = re.compile(
    r"(libtorch_cpu|libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux-[\w-]+)\.so(\.\d+)*"
)
# The stable ABI, but what lies in libtorch_cuda, which may not be there; and what a linker puts in
# every library. Anything else must carry a version of the C or C++ runtime.
SYMBOL = re.compile(
    r"(?!\w*cuda)(aoti_)?torch_\w+|aoti_torch_device_type_cuda|_ITM_\w+TMCloneTable|__gmon_start__"
)
VERSION = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")

DYNAMIC, DYNSYM, VERNEED, VERSYM = 6, 11, 0x6FFFFFFE, 0x6FFFFFFF  # section types
DT_NEEDED, DT_RPATH, DT_RUNPATH = 1, 15, 29


@dataclass
class Imports:
    """What a library asks the dynamic linker for."""

    needed: list[str] = field(default_factory=list)
    run_paths: list[str] = field(default_factory=list)
    symbols: list[tuple[str, str]] = field(default_factory=list)  # (name, version or "")


def read_imports(data: bytes) -> Imports:
    """The imports of a 64-bit little-endian ELF shared library."""
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    # Of each section: name, type, flags, address, offset, size, link, info, alignment, entry size.
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]
    sections = {header[1]: header for header in headers}

    def string(section: tuple[int, ...], at: int) -> str:
        start = headers[section[6]][4] + at
        return data[start : data.index(b"\0", start)].decode()

    def entries(section: tuple[int, ...], layout: str) -> list[tuple[int, ...]]:
        return list(struct.iter_unpack(layout, data[section[4] : section[4] + section[5]]))

    imports = Imports()
    for tag, value in entries(sections[DYNAMIC], "<qQ"):
        if tag == DT_NEEDED:
            imports.needed.append(string(sections[DYNAMIC], value))
        elif tag in (DT_RPATH, DT_RUNPATH):
            imports.run_paths.append(string(sections[DYNAMIC], value))

    versions = {}
    at = sections[VERNEED][4]
    for _ in range(sections[VERNEED][7]):  # one record a library, with a list of its versions
        _, names, _, first, following = struct.unpack_from("<HHIII", data, at)
        name_at = at + first
        for _ in range(names):
            _, _, index, name, next_name = struct.unpack_from("<IHHII", data, name_at)
            versions[index] = string(sections[VERNEED], name)
            name_at += next_name
        at += following

    symbols = entries(sections[DYNSYM], "<IBBHQQ")
    for (name, _, _, section, _, _), (version,) in zip(
        symbols, entries(sections[VERSYM], "<H"), strict=True
    ):
        if name and section == 0:  # undefined
            imports.symbols.append(
                (string(sections[DYNSYM], name), versions.get(version & 0x7FFF, ""))
            )
    return imports


def complaints(imports: Imports) -> list[str]:
    """Everything that is not on the lists above."""
    found = [f"needs {name}" for name in imports.needed if not NEEDED.fullmatch(name)]
    found += [f"has run path {path}" for path in imports.run_paths]
    found += [
        f"undefined symbol {name} {version}".rstrip()
        for name, version in imports.symbols
        if not (VERSION.fullmatch(version) if version else SYMBOL.fullmatch(name))
    ]
    return found


def library(name: str) -> Path:
    spec = importlib.util.find_spec(f"pytorch_block_sparse.{name}")
    if spec is None or spec.origin is None:
        assert name != "_C", "the library _C is always built"
        pytest.skip(f"{name} was not built")
    return Path(spec.origin)


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_library_needs_only_what_is_allowed(name):
    imports = read_imports(library(name).read_bytes())
    # Loaded locally, a library has to name torch itself; and the reader has to have seen something.
    assert "libtorch_cpu.so" in imports.needed
    assert ("torch_call_dispatcher", "") in imports.symbols
    assert any(version.startswith("GLIBC") for _, version in imports.symbols)
    assert complaints(imports) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (Imports(needed=["libtorch_python.so"]), "needs libtorch_python.so"),
        (Imports(needed=["libcudart.so.13"]), "needs libcudart.so.13"),
        (Imports(needed=["libc10.so"]), "needs libc10.so"),
        (Imports(run_paths=["$ORIGIN"]), "has run path $ORIGIN"),
        (Imports(symbols=[("_ZN2at4_ops5empty4callEv", "")]), "undefined symbol _ZN2at4_ops5"),
        (Imports(symbols=[("PyObject_Call", "")]), "undefined symbol PyObject_Call"),
        (
            Imports(symbols=[("aoti_torch_get_current_cuda_stream", "")]),
            "undefined symbol aoti_torch_get_current_cuda_stream",
        ),
        (Imports(symbols=[("cudaMalloc", "libcudart.so.13")]), "undefined symbol cudaMalloc lib"),
    ],
)
def test_checker_complains(change, complaint):
    imports = read_imports(library("_C").read_bytes())
    imports.needed += change.needed
    imports.run_paths += change.run_paths
    imports.symbols += change.symbols
    assert len(complaints(imports)) == 1
    assert complaints(imports)[0].startswith(complaint)


@pytest.mark.parametrize(
    ("cuda", "loaded"), [(None, ["_C.so"]), ("13.0", ["_C.so", "_C_cuda.so"])], ids=str
)
def test_the_cuda_library_is_loaded_where_torch_has_cuda(cuda, loaded, monkeypatch):
    both = ["pytorch_block_sparse._C", "pytorch_block_sparse._C_cuda"]
    specs = {name: ModuleSpec(name, None, origin=name.split(".")[1] + ".so") for name in both}
    monkeypatch.setattr(_library, "find_spec", specs.get)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    seen = []
    monkeypatch.setattr(torch.ops, "load_library", seen.append)
    _library._load()
    assert seen == loaded


def test_a_package_that_was_not_built_says_so(monkeypatch):
    monkeypatch.setattr(_library, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"_C is missing; install the package"):
        _library._load()


def includes_torch(text: str) -> bool:
    return re.search(r'^\s*#\s*include\s*[<"](torch|ATen|c10)/', text, re.MULTILINE) is not None


def test_only_the_binding_includes_torch():
    root = Path(__file__).parent.parent
    sources = [
        path
        for folder in ("include", "src", "tests/cpp")
        for path in (root / folder).rglob("*")
        if path.suffix in {".h", ".hpp", ".cuh", ".cpp", ".cu"}
    ]
    assert len(sources) > 10
    including = {path for path in sources if includes_torch(path.read_text())}
    assert including, "the binding does include torch"
    assert {path.parent.relative_to(root).as_posix() for path in including} == {"src/torch"}


def test_include_checker_sees_torch():
    assert includes_torch("#pragma once\n  # include <torch/csrc/stable/tensor.h>\n")
    assert includes_torch('#include "c10/util/Half.h"')
    assert not includes_torch('#include "binding.h"  // not torch/')
