"""Where compiled kernels are kept, and what happens if there are none.

numba is configured once per process, so most tests start other processes.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from batches import compiled_kernels, generate
from transformers import LlamaForCausalLM

from llama import ROOT

COMPILE = """
import dataclasses, json, logging, sys
from pathlib import Path
import torch
from llama.torch_engine.cpu_compiler import compile_in_background, use_threads

logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
kernels = compile_in_background(torch.float32, torch.float32, Path(sys.argv[1])).result()
use_threads(1)
found = None
if kernels is not None:
    gated = torch.empty(1, 2)
    kernels.swiglu(torch.ones(1, 4).numpy(), gated.numpy())
    functions = [getattr(kernels, field.name) for field in dataclasses.fields(kernels)]
    compiled = sum(f.stats.cache_misses.total() for f in functions if f is not None)
    found = {"gated": gated.tolist(), "compiled": compiled}
print(json.dumps(found))
"""

ANSWER = """
import json, logging
from llama.load import load_llama
from llama.sampling_params import SamplingParams
from llama.settings import Settings

logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
llama = load_llama(Settings.from_environment())
stream = llama._engine.submit([1, 5, 9, 77], SamplingParams(temperature=0.0, max_new_tokens=12))
tokens = [token for tokens in stream for token in tokens]
llama.close()
print(json.dumps(tokens))
"""

# Code that runs first in a process, so that kernels cannot be compiled there.
OBSTACLES = {
    "numba is not installed": "import sys; sys.modules['numba'] = None\n",
    "NUMBA_DISABLE_JIT is set": "import os; os.environ['NUMBA_DISABLE_JIT'] = '1'\n",
    "no OpenMP library": "import sys; sys.modules['numba.np.ufunc.omppool'] = None\n",
    "another threading layer is in use": (
        "import numba; numba.config.THREADING_LAYER = 'workqueue'; numba.get_num_threads()\n"
    ),
}


class Outcome(NamedTuple):
    found: Any
    warnings: list[str]


class Process:
    """A Python process whose kernels are kept below `cache_dir`."""

    def __init__(self, script: str, cache_dir: Path, **variables: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
        environment |= {"LLAMA_CACHE_DIR": str(cache_dir), **variables}
        command = [sys.executable, "-c", script, str(cache_dir)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
        )

    def outcome(self) -> Outcome:
        output, errors = self._process.communicate(timeout=120)
        assert self._process.returncode == 0, errors
        warnings = [line for line in errors.splitlines() if line.startswith("WARNING ")]
        return Outcome(json.loads(output), warnings)


def outcomes(*cache_dirs: Path, **variables: str) -> list[Outcome]:
    """Compile or load kernels in several processes at the same time."""
    processes = [Process(COMPILE, cache_dir, **variables) for cache_dir in cache_dirs]
    return [process.outcome() for process in processes]


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """A cache folder with the kernels that this process uses."""
    swiglu: Any = compiled_kernels(torch.float32, torch.float32).swiglu
    kept = Path(swiglu.stats.cache_path).parent
    shutil.copytree(kept, tmp_path / "numba" / kept.name)
    return tmp_path


@pytest.fixture(autouse=True)
def no_code_beside_the_sources() -> Iterator[None]:
    yield
    assert not list((ROOT / "llama").rglob("*.nbi"))


def files(cache_dir: Path, name: str, suffix: str) -> list[Path]:
    found = [
        path for path in cache_dir.glob("numba/*/*/*") if path.suffix == suffix and f".{name}-" in path.name
    ]
    assert found
    return found


def assert_works(outcome: Outcome, *, compiled: bool) -> None:
    """The kernels work. Some of them were compiled or, unless `compiled`, all were in the cache."""
    assert outcome.found["gated"] == [pytest.approx([torch.sigmoid(torch.tensor(1.0)).item()] * 2)]
    assert (outcome.found["compiled"] > 0) == compiled


def test_processes_that_compile_at_once_keep_code_that_the_next_one_uses(tmp_path: Path) -> None:
    for outcome in outcomes(tmp_path, tmp_path):
        assert_works(outcome, compiled=True)
        assert outcome.warnings == []
    (outcome,) = outcomes(tmp_path)
    assert_works(outcome, compiled=False)


def test_numbas_own_variable_for_the_cache_folder_comes_first(cache_dir: Path, tmp_path: Path) -> None:
    (outcome,) = outcomes(tmp_path / "other", NUMBA_CACHE_DIR=str(cache_dir / "numba"))
    assert_works(outcome, compiled=False)
    assert not (tmp_path / "other").exists()


def test_the_cache_folder_may_start_with_the_home_directory(cache_dir: Path) -> None:
    (outcome,) = outcomes(Path("~"), HOME=str(cache_dir))
    assert_works(outcome, compiled=False)


def test_kernels_are_compiled_in_memory_if_the_cache_folder_cannot_be_written(tmp_path: Path) -> None:
    file, no_home = tmp_path / "file", Path("~no-such-user")
    file.write_bytes(b"")
    for outcome in outcomes(file, no_home):
        assert_works(outcome, compiled=True)
        assert outcome.warnings == []
    assert not (ROOT / no_home).exists()


def test_damaged_code_in_the_cache_is_not_used_but_deleted(cache_dir: Path) -> None:
    other = cache_dir / "other"
    shutil.copytree(cache_dir / "numba", other / "numba")
    for folder, suffix, content in ((cache_dir, ".nbi", b""), (other, ".nbc", b"garbage")):
        for path in files(folder, "add_and_norm", suffix):
            path.write_bytes(content)
    for folder, outcome in zip((cache_dir, other), outcomes(cache_dir, other), strict=True):
        assert_works(outcome, compiled=True)
        (warning,) = outcome.warnings
        assert f" in {folder / 'numba'}" in warning
        assert "are damaged" in warning
        assert list((folder / "numba").iterdir()) == []


def test_code_of_another_version_of_numba_is_replaced(cache_dir: Path) -> None:
    for path in files(cache_dir, "swiglu", ".nbi"):
        path.write_bytes(pickle.dumps("0.1") + b"a format of its own")
    for compiled in (True, False):
        (outcome,) = outcomes(cache_dir)
        assert_works(outcome, compiled=compiled)
        assert outcome.warnings == []


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=OBSTACLES.keys())
def test_without_kernels_there_is_one_warning_and_no_error(cache_dir: Path, obstacle: str) -> None:
    outcome = Process(obstacle + COMPILE, cache_dir).outcome()
    assert outcome.found is None
    (warning,) = outcome.warnings
    assert "no compiled kernels, so the engine is slower: " in warning


@pytest.mark.parametrize("obstacle", ["", OBSTACLES["no OpenMP library"]], ids=["compiled", "torch"])
def test_an_engine_with_and_without_kernels_gives_the_tokens_of_generate(
    model: LlamaForCausalLM, llama_folder: Path, cache_dir: Path, obstacle: str
) -> None:
    many = "64"  # more threads than there are cores
    variables = {"LLAMA_WEIGHTS": str(llama_folder), "LLAMA_MAX_CONTEXT": "100", "LLAMA_THREADS": many}
    folder = cache_dir if obstacle else Path("~no-such-user")  # a user without a home
    outcome = Process(obstacle + ANSWER, folder, **variables).outcome()
    assert outcome.found == generate(model, [1, 5, 9, 77], 12)
    assert len(outcome.warnings) == bool(obstacle)


THREADS = """
import json, logging, os, sys
from pathlib import Path
import torch
from llama.torch_engine.cpu_compiler import compile_in_background, use_threads

kernels = compile_in_background(torch.float32, torch.float32, Path(sys.argv[1])).result()
import numba

def run_kernel():
    cache, table, numbers = torch.zeros(2, 64, 4, 8, 16), torch.ones(8, 16), torch.zeros(64, dtype=torch.long)
    qkv, attended = torch.ones(64, 12 * 16), torch.empty(64, 4 * 16)
    arrays = [tensor.numpy() for tensor in (qkv, table, table, numbers, cache, numbers)]
    kernels.attend_rows(*arrays, 1.0, attended.numpy())

def threads():
    return len(os.listdir("/proc/self/task"))

found = {"layer": numba.threading_layer()}
for count in (2, 1, 64):
    use_threads(count)
    found[str(count)] = [torch.get_num_threads(), numba.get_num_threads()]
use_threads(2)
torch.ones(10_000_000).exp()
with_torch = threads()
run_kernel()
found["new"] = threads() - with_torch
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists the threads in /proc")
def test_torch_and_the_kernels_use_the_same_threads(cache_dir: Path) -> None:
    """`new` is the number of threads that a kernel starts after torch."""
    found = Process(THREADS, cache_dir, NUMBA_NUM_THREADS="2", OMP_NUM_THREADS="2").outcome().found
    assert found == {"layer": "omp", "2": [2, 2], "1": [1, 1], "64": [64, 2], "new": 0}
