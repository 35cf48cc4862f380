"""What a run's record says of the process that made it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sd_erase.provenance import forget_peak_memory, peak_memory_mb


def test_peak_memory_is_that_of_the_process_itself() -> None:
    ballast = bytearray(300 * 2**20)
    ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])  # every page is touched
    code = "from sd_erase.provenance import peak_memory_mb; print(peak_memory_mb())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = peak_memory_mb()
    assert own is not None and own > 300 > float(found.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can begin anew")
def test_each_training_of_a_process_has_a_peak_of_its_own() -> None:
    ballast = bytearray(300 * 2**20)
    ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])
    before = peak_memory_mb()
    del ballast
    forget_peak_memory()
    after = peak_memory_mb()
    assert before is not None and after is not None and after < before - 200
