"""How every script starts and ends: allocator settings for CPUs before, readable errors and exit codes after."""

from __future__ import annotations

import glob
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from xylem.errors import Failure

# XLA:CPU takes fresh memory for every result; with glibc's defaults the kernel then clears new pages all the time.
# These keep freed memory, in huge pages. Some of them alone are slower than none: all five or nothing.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/kfd")


def on_cpu() -> bool:
    """Whether jax will compute on the CPU, told without importing it."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    return wanted == "cpu" or (not wanted and not any(glob.glob(pattern) for pattern in _ACCELERATORS))


def settle_on_cpu() -> None:
    """On a CPU, start this program again with ``ALLOCATOR`` set, once: glibc reads it when a process begins.

    Settings that the user made are left as they are, all of them.
    """
    if not on_cpu():
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # an installed libtpu would be asked first, and complain
    if not sys.platform.startswith("linux") or any(name in os.environ for name in ALLOCATOR):
        return
    os.environ.update(ALLOCATOR)
    os.execv(sys.executable, sys.orig_argv)


def settle_jax(cache: Path | None = None) -> None:
    """Before the first computation: keep compiled programs in ``cache``, and let CPUs compute in the calling thread.

    XLA:CPU's own threads announce results a moment before they free the temporaries; a next step started in that moment
    takes new memory, up to three times as much in the end (measured). The calling thread frees them first.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # there is no environment variable for it
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def launch(main: Callable[[list[str]], None]) -> None:
    """Run ``main(arguments)``; a failure the user can mend is one message on stderr and its exit code.

    Where nobody reads the output any more (``script --help | head``) the script ends as quietly as any filter does.
    """
    settle_on_cpu()
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more as it ends
        sys.exit(128 + signal.SIGPIPE)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(failure.code)
    except KeyboardInterrupt:
        sys.exit(130)
