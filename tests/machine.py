"""What a failed run says of the machine: which it is, and whether its float64 arithmetic is right.

Not a test. Processors that now and then compute wrongly exist (Hochschild et al., "Cores that don't
count", HotOS 2021), and their failures look like those of a kernel.
"""

import math
import pathlib
import platform

import torch

from op_helpers import Case

ROUNDS = 200


def description():
    """One line for each thing that failures may depend on."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    yield f"{models[0] if models else platform.machine()}, {len(models)} threads"
    flags = next((line for line in lines if line.startswith("flags")), "")
    yield "AVX-512 and AMX: " + " ".join(f for f in flags.split() if f[:6] in ("avx512", "amx_bf"))
    yield f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    wrong = ", ".join(f"{name} {count}" for name, count in wrong_of_torch().items())
    yield f"torch in float64, wrong elements of {ROUNDS} x 999: {wrong}"
    yield f"forward in float64, calls of {ROUNDS} that differ from the first: {wrong_of_forward()}"


def wrong_of_torch():
    """Operations that are exact by IEEE 754, against Python's own."""
    x = torch.rand(999, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    y = x.flip(0)
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    operations = {
        "sums": (lambda: x + y, [a + b for a, b in pairs]),
        "products": (lambda: x * y, [a * b for a, b in pairs]),
        "quotients": (lambda: x / y, [a / b for a, b in pairs]),
        # Not sqrt: torch leaves that to MKL, which rounds some of them otherwise.
        "roots": (lambda: x.rsqrt(), [1 / math.sqrt(a) for a, _ in pairs]),
    }
    return {
        name: sum(int((of() != torch.tensor(exact, dtype=x.dtype)).sum()) for _ in range(ROUNDS))
        for name, (of, exact) in operations.items()
    }


def wrong_of_forward():
    case = Case(tokens=(12,))
    with torch.no_grad():
        first, *others = (
            case.linear(case.x, case.values, case.bias).clone() for _ in range(ROUNDS + 1)
        )
    return sum(not torch.equal(first, other) for other in others)


if __name__ == "__main__":
    print("\n".join(description()))
