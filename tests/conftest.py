"""Eight virtual CPU devices and one hypothesis profile for the whole suite.

MOEZOO_PLATFORM=cuda runs it on the GPUs there are instead: tests that need more devices skip, and
products of float32 are as exact as on a CPU.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from importlib.metadata import version

# A shell's background job ignores Ctrl-C and would hand that down to the processes under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
PLATFORM = os.environ.get("MOEZOO_PLATFORM", "cpu")
os.environ.setdefault("JAX_PLATFORMS", "cpu" if PLATFORM == "cpu" else f"{PLATFORM},cpu")
if PLATFORM == "cpu":
    # Tests compile much and compute little: unoptimised code costs a fifth less in all, and the
    # older emitters of loops, which jaxlib 0.10 still has, compile in half the time. Splitting a
    # program for several compiling threads costs a twelfth where tests fill all cores anyway.
    flags = "--xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):
        flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", flags)
else:
    # A GPU multiplies float32 as TF32 otherwise, with a thousandth of the accuracy.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several test processes

# A compiler takes and returns much memory: with huge pages, which a process is given at its start,
# test processes are a twentieth faster.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

# Test processes, and those that they start, take each other's compiled programs; small ones too,
# of which there are thousands.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="moezoo-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

jax.config.update("jax_num_cpu_devices", int(os.environ.get("MOEZOO_DEVICES", "8")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    reason = "needs a GPU: set MOEZOO_PLATFORM=cuda"
    for item in items:
        if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason=reason))


settings.register_profile(
    "moezoo",
    max_examples=int(os.environ.get("MOEZOO_EXAMPLES", "6")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("moezoo")
