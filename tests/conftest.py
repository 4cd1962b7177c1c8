"""Eight virtual CPU devices and one hypothesis profile for the whole suite."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile

# A shell's background job ignores Ctrl-C and would hand that down to the processes under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: unoptimised code costs a fifth less in all.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Test processes, and those that they start, take each other's compiled programs; small ones too,
# of which there are thousands.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="moezoo-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile(
    "moezoo",
    max_examples=int(os.environ.get("MOEZOO_EXAMPLES", "6")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("moezoo")
