"""Eight CPU devices, strict promotion, checked annotations, and the fixtures that record what tests measure."""

import gc
import importlib.metadata
import importlib.util
import json
import os
import random
import secrets
import sys
from pathlib import Path

PLATFORM = os.environ["JAX_PLATFORMS"] = os.environ.get("XYLEM_TEST_PLATFORM", "cpu")
if PLATFORM == "cpu":
    # Most of a test's time is compiling tiny programs: the last optimisations are left out (half the time, same numbers
    # within rounding). The speed of what is compiled is the benchmarks' business.
    XLA_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    XLA_FLAGS += " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"  # again half the time; newer ones have no other emitter
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"
else:
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"  # accelerators round the factors unless told not to
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # tests run side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# Before the first import of xylem: every annotated call is checked, in tests only. It takes a tenth of the time, so
# the Makefile does it once, in `make test`.
if os.environ.get("XYLEM_CHECK_TYPES") != "no":
    install_import_hook("xylem", "beartype.beartype")

import jax
import pytest

MANY_MAPS = 20_000
CACHE = Path(os.environ.get("XYLEM_CACHE", Path.home() / ".cache" / "xylem"))
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

_proofs: list[dict] = []
_seeds: dict[str, str] = {}


def pytest_addoption(parser) -> None:
    told = "drawn: one case of each test that is not slow; left: all but those that a file names as passed"
    parser.addoption("--cases", choices=("all", "drawn", "left"), default="all", help=told)
    parser.addoption("--passed", metavar="FILE", help="drawn writes what passed there, and left reads it")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config, items) -> None:
    """The oracles are installed on Python 3.11 (setup.py); there a missing one fails, elsewhere the reason is told."""
    kept, cases, passed = items, config.getoption("--cases"), config.getoption("--passed")
    if cases == "drawn":
        draw, several = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")), {}  # all workers draw the same
        for item in items:
            if not item.get_closest_marker("slow"):
                several.setdefault(item.nodeid.split("[")[0], []).append(item)
        kept = [draw.choice(own) for own in several.values()]
    elif cases == "left" and passed and Path(passed).exists():
        names = set(Path(passed).read_text().splitlines())
        kept = [item for item in items if item.nodeid not in names]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    if sys.version_info >= (3, 12) and importlib.util.find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("oracle"):
                item.add_marker(pytest.mark.skip(reason="torch and transformers are installed on Python 3.11 alone"))


def pytest_configure(config) -> None:
    """What passes is written as it passes, by the process that gathers the reports."""
    if config.getoption("--cases") == "drawn" and config.getoption("--passed") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Passed(Path(config.getoption("--passed"))))


class Passed:
    """Appends the name of each test that passes to a file, which begins empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" and report.passed:
            with self.path.open("a") as file:
                file.write(f"{report.nodeid}\n")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Compiled programs are dropped when there are many: each holds some tens of memory maps, and Linux ends a process
    that asks for more than 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng_seed(request) -> int:
    """A seed drawn now and printed with a failure; XYLEM_TEST_SEED repeats one."""
    return _seed(request)


@pytest.fixture(scope="module")
def module_seed(request) -> int:
    """The same for what the tests of a file share."""
    return _seed(request)


def _seed(request) -> int:
    seed = int(os.environ.get("XYLEM_TEST_SEED", secrets.randbits(31)))
    _seeds[request.node.nodeid] = f"XYLEM_TEST_SEED={seed} pytest '{request.node.nodeid}'"
    return seed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Every failure tells the seeds that were drawn for it: the test's own, its file's, and the grid's widths."""
    report = yield
    told = [line for node, line in _seeds.items() if item.nodeid == node or item.nodeid.startswith(f"{node}::")]
    if "grid" in sys.modules:
        told.append(f"XYLEM_GRID_SEED={sys.modules['grid'].SEED} repeats the widths of tests/grid.py")
    if report.failed and told:
        report.sections.append(("seeds", "\n".join(told)))
    return report


@pytest.fixture
def proof():
    """Record one comparison with an independent reference, and fail when it is not close enough.

    ``proof(row, oracle, error, bar, seed, mutation)``: the technique; what it was compared with; the measured error
    and the largest allowed; the seed; the deliberate fault that the same test showed to be caught.
    """

    def record(row: str, oracle: str, error: float, bar: float, seed: int, mutation: str) -> None:
        row_of = {"row": row, "oracle": oracle, "error": float(error), "bar": bar, "seed": seed, "mutation": mutation}
        _proofs.append(row_of)
        assert error <= bar, f"{row} against {oracle}: error {error:.3g}, at most {bar:.3g} allowed (seed {seed})"

    return record


@pytest.fixture
def measured():
    """Record what was measured of one cell of a grid, method x family, and fail when it is more than allowed.

    ``measured(kind, method, family, error, bar, of)``: ``of`` is the number of cells in which the whole suite measures
    this kind, by which ``scripts/proofs.py`` knows whether it has all of them. A cell of which there is nothing to
    measure has its reason: ``measured("empty", method, family, reason, None, of)``.
    """

    def record(kind: str, method: str, family: str, error: float | str, bar: float | None, of: int) -> None:
        _proofs.append({"grid": kind, "method": method, "family": family, "error": error, "bar": bar, "of": of})
        if bar is not None:
            assert float(error) <= bar, f"{kind}, {method} x {family}: {error:.3g}, at most {bar:.3g} allowed"

    return record


def pytest_sessionfinish(session, exitstatus) -> None:
    """Leave the proofs where ``scripts/proofs.py`` gathers them: one JSON object a line."""
    target = os.environ.get("XYLEM_PROOFS")
    if target and _proofs:
        with open(target, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in _proofs)
