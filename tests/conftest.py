"""What every test starts from: one thread, one seed, and hypothesis that draws the same examples each time."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# last, because benchmarks/coverage.py has the name of a package that a coverage plugin imports
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
torch.set_num_threads(1)  # tests run side by side (pytest-xdist), and sums keep their order

for name, examples in (("ci", 60), ("thorough", 1000)):
    settings.register_profile(name, deadline=None, derandomize=True, print_blob=True, max_examples=examples)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with data sets and checkpoints; the test is skipped where there is none."""
    root = Path(os.environ.get("REVPROP_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data folder {root}: set REVPROP_DATA")
    return root
