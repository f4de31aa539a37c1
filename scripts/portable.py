"""Run the tests that touch arithmetic as several kinds of processor would sum; `make portable` calls this.

One machine can stand for others: torch and oneDNN choose their kernels by what the processor can do, and both can be
told to take an older one. Kernels and threads differ in the order in which they add, so in the last bits of nearly
every sum. A test that depends on those is red somewhere else, and with this it is red here.
"""

import os
import subprocess
import sys
import time

ARITHMETICS: tuple[dict[str, str], ...] = (
    {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"},
)
"""What is set for each run; what a processor does not have is taken as the best that it has."""

_SAY = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"


def run(asked: dict[str, str], more: list[str]) -> int:
    """The marked tests under one arithmetic; gives pytest's exit code."""
    chosen = {name for arithmetic in ARITHMETICS for name in arithmetic}
    environment = {name: value for name, value in os.environ.items() if name not in chosen} | asked
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # two threads on a shared core would wait busily for each other
    said = subprocess.run([sys.executable, "-c", _SAY], env=environment, capture_output=True, text=True, check=True)
    capability, threads = said.stdout.split()
    settings = " ".join(f"{name}={value}" for name, value in asked.items())
    print(f"== {settings}: torch computes with {capability}, threads: {threads}", flush=True)
    started = time.monotonic()
    code = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "auto", "-m", "arithmetic", *more], env=environment
    ).returncode
    print(f"== {'green' if code == 0 else 'RED'} after {time.monotonic() - started:.0f} s", flush=True)
    return code


def main() -> int:
    """All of them, also after a red one; arguments go to pytest."""
    red = [asked for asked in ARITHMETICS if run(asked, sys.argv[1:])]
    print(f"{len(ARITHMETICS) - len(red)} of {len(ARITHMETICS)} arithmetics green")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
