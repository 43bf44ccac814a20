"""The card, its software and how fast it copies."""

import ctypes
import functools
import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path

CHECKOUT = Path(__file__).parents[2] / "embax"
COPY_BYTES = 4 << 30
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,mig.mode.current,compute_mode"


def describe() -> dict:
    """Returns what there is: card, driver, versions, the backends of embax and why each can or cannot run."""
    import jax

    import embax
    from embax import kernels

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    found: dict = {
        "card": device.device_kind,
        "platform": device.platform,
        "devices": len(jax.devices()),
        "nvidia-smi": smi(f"--query-gpu={QUERY}"),
        "processes on the card": smi("--query-compute-apps=pid,used_memory"),
        "memory for arrays": stats.get("bytes_limit"),
        "L2 bytes": l2_bytes(),
        "runtime": " ".join(str(device.client.platform_version).split()),
        "python": platform.python_version(),
        "versions": versions(),
        "embax": embax.__version__,
        "embax from": "the checkout" if Path(embax.__file__).is_relative_to(CHECKOUT) else "an installation",
    }
    choice = kernels.choose()
    found["chosen"] = f"{choice.name} ({choice.reason})"
    found["backends"] = {name: kernels.get(name).unavailable() or "available" for name in kernels.REGISTRY}
    return found


def versions() -> dict[str, str]:
    """Returns the versions of what is installed and could matter."""
    names = ("jax", "nvidia-", "optax", "flax", "torch", "fbgemm", "numpy", "triton")
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {name: found[name] for name in sorted(found) if name.lower().startswith(names)}


def smi(query: str) -> str:
    """Returns what nvidia-smi answers, "" where there is none."""
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@functools.cache
def l2_bytes() -> int | None:
    """Returns the size of the card's L2 cache, None where the driver cannot be asked."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    value, device = ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    failed = driver.cuDeviceGetAttribute(ctypes.byref(value), 38, device)  # CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
    return None if failed else value.value


def memory_limit() -> int:
    """Returns the bytes that JAX may fill with arrays: of the card, or of the host where there is none."""
    import jax

    from benchmarks.cpu.contenders import available_bytes

    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or available_bytes()


def copy_bandwidth(scale: float, calls: int = 10, turns: int = 7) -> dict:
    """Returns the best bytes a second of ``x + 1`` on a large donated array, what is read and written counted."""
    import jax
    import jax.numpy as jnp

    count = max(min(int(COPY_BYTES * scale), memory_limit() // 4) // 4, 1 << 16)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jax.block_until_ready(add(jnp.zeros(count, jnp.float32)))
    rates = []
    for _ in range(turns):
        begin = time.perf_counter()
        for _ in range(calls):
            array = add(array)
        jax.block_until_ready(array)
        rates.append(2 * 4 * count * calls / (time.perf_counter() - begin))
    return {"bytes_per_second": max(rates), "worst": min(rates), "array_bytes": 4 * count}
