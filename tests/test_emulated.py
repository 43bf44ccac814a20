"""The CUDA kernels on the host against plain loops: guard pages around every array, any order of blocks and threads."""

import os
import subprocess

import emulated
import pytest


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
def test_every_kernel_against_plain_loops(tmp_path):
    program = tmp_path / "emulated_kernels_test"
    sources = [str(emulated.CSRC / "test" / name) for name in ("emulated_kernels_test.cc", "emulated_driver.cc")]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-DEMBAX_ISA=plain", "-I", str(emulated.CSRC)]
    command = [*emulated._compiler(), *flags, *sources, "-o", str(program), "-ldl", "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    environment = dict(os.environ, CXX=" ".join(emulated._compiler()))
    ran = subprocess.run(
        [str(program), str(emulated.CSRC)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    assert "the same as plain loops" in ran.stdout
