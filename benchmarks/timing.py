"""How benchmarks time: several calls in turn in one process, and the median of each.

Machines are shared and clocks move: what is compared is measured in alternation, never one after
the other, and quoted as a ratio.
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

# A sample lasts at least this long: shorter calls are repeated within it.
SAMPLE_SECONDS = 1e-3


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call: first, second, ..., first, second, ... `repeats` times."""
    inner = {}
    for name, call in calls.items():
        call()  # warm-up: allocations, lazy initialisation
        start = time.perf_counter()
        call()
        inner[name] = max(1, int(SAMPLE_SECONDS / max(1e-9, time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(inner[name]):
                call()
            samples[name].append((time.perf_counter() - start) / inner[name])
    return {name: statistics.median(times) for name, times in samples.items()}


def provenance() -> dict[str, Any]:
    """What a result needs to be repeated: command, date, machine, versions, threads."""
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "revision": revision,
        "processor": _processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return " ".join([fields.get("model name", "?"), "family", fields.get("cpu family", "?")])
