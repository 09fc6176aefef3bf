import os
from pathlib import Path

import pytest
import torch

from helpers import settings_parser

settings_parser.speed_up()
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: without a GPU its kernels run on CPU tensors
    from helpers.interpreter import speed_up

    speed_up()

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory holds NaN, so that a result that was never written shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture(
    params=[
        ("cpu", "torch"),
        ("cpu", "triton"),
        pytest.param(("cuda", "torch"), marks=pytest.mark.gpu),
        pytest.param(("cuda", "triton"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def on(request) -> dict[str, str]:
    """A device and a backend. The kernels run on a GPU, or where there is none through Triton's interpreter."""
    device, backend = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if (device, backend) == ("cpu", "triton") and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    return {"device": device, "backend": backend}


@pytest.fixture
def shared_dir() -> Path:
    """The folder with the golden files and real text: ../shared, or the one named by LIGHTHOUSE_SHARED."""
    folder = Path(os.environ.get("LIGHTHOUSE_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir() and "LIGHTHOUSE_SHARED" not in os.environ:
        # Another folder beside the repository may have the same name.
        pytest.skip(f"no golden files in {folder} (set LIGHTHOUSE_SHARED)")
    return folder
