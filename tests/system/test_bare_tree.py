"""A bare GPU image: a source tree without the extension, and Python with torch, numpy, safetensors and tokenizers.

The tests make such a Python out of links to the packages that are here, with nothing else in reach. The import rules
(tests/test_architecture.py) are about what is written down; here it is loaded, and computes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "weft"
LIBRARIES = ("numpy", "safetensors", "tokenizers", "triton")
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

LOAD = """
import importlib, pkgutil, sys
import weft
for package in ("core", "phases", "weave", "comet", "kernels", "models", "devices"):
    folder = importlib.import_module(f"weft.{package}").__path__
    for found in pkgutil.walk_packages(folder, f"weft.{package}."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            print(found.name, error.name)
        except ImportError as error:
            print(found.name, error)
"""

RUN = """
import json, sys
from pathlib import Path
from weft.config import EngineConfig
from weft.core.request import Request, TokenOutput
from weft.core.sampling import SamplingParams
from weft.core.scheduler import Scheduler, SchedulerSettings
from weft.devices import open_device

name, folder = sys.argv[2:]
config = EngineConfig(device=name, num_blocks=16, max_model_len=64, max_num_seqs=4)
device = open_device(config, Path(folder), lambda phase: None)
scheduler = Scheduler(device.capacity(), device.lanes(), SchedulerSettings(max_num_seqs=4))
params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
for number, prompt in enumerate(((7, 8, 9), tuple(range(100, 120)))):
    scheduler.submit(Request(str(number), prompt, params), 0.0)
tokens = {"0": [], "1": []}
while scheduler.live:
    for lane in scheduler.order():
        plan = scheduler.schedule(lane, 0.0)
        if plan is not None:
            device.submit(plan)
    for result in device.poll(60.0):
        assert result.error is None, result.error
        for event in scheduler.complete(result, 0.0):
            if isinstance(event, TokenOutput):
                tokens[event.request].append(event.token)
kernels = device.describe().kernels
device.close()
print(json.dumps({"tokens": tokens, "kernels": kernels}))
"""


def distributions(name: str, seen: set[str]) -> Iterator[Any]:
    """The distribution of this name and those that it requires; what is not installed here is not required here."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return
    if name not in seen:
        seen.add(name)
        yield found
        for line in found.requires or ():
            if "extra ==" not in line:
                yield from distributions(re.split(r"[^\w.-]", line)[0].lower(), seen)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for the image's packages and for the source tree."""
    made = tmp_path_factory.mktemp("bare")
    wanted = [*distributions("torch", set()), *(distribution(name) for name in LIBRARIES)]
    for package in wanted:
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (made / top).exists():
                (made / top).symlink_to(Path(str(package.locate_file(top))))
    (made / "weft").mkdir()
    for child in SOURCE.iterdir():
        if not child.name.startswith("_native"):
            (made / "weft" / child.name).symlink_to(child)
    return made


def run(bare: Path, program: str, *arguments: str) -> str:
    """What the program prints. It sees this folder and the standard library."""
    code = f"import sys; sys.path.append(sys.argv[1]){program}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore::RuntimeWarning", "-c", code, str(bare), *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_else_is_in_reach(bare: Path) -> None:
    tried = "\nfrom importlib.util import find_spec\nprint([name for name in sys.argv[2:] if find_spec(name)])"
    assert run(bare, tried, "msgspec", "zmq", "rich", "starlette", "transformers", "weft._native") == "[]\n"


def test_every_module_loads_but_those_of_the_extension(bare: Path) -> None:
    lacking = dict(line.split(" ", 1) for line in run(bare, LOAD).splitlines())
    native = r"weft\._native|cannot import name '_native'.*"
    assert {name: why for name, why in lacking.items() if not re.fullmatch(native, why)} == {}
    assert {name.split(".")[1] for name in lacking} <= {"kernels", "weave"}


def test_cpu_and_cuda_compute_the_same(bare: Path, tiny_model: Path) -> None:
    cpu, cuda = (json.loads(run(bare, RUN, name, str(tiny_model))) for name in ("cpu", "cuda"))
    assert (cpu["kernels"], cuda["kernels"]) == ("reference", "triton, attention triton")
    assert cpu["tokens"] == cuda["tokens"]
    assert [len(tokens) for tokens in cpu["tokens"].values()] == [4, 4]
