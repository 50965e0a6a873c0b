"""Without a GPU the Triton kernels run in Triton's interpreter; with one the same tests run compiled."""

import os
import pathlib

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_report_header(config):
    mode = "compiled for " + torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return (
        f"torch {torch.__version__}, Triton kernels: {mode}, real data: {os.environ.get('OSSCL_REAL_DATA')}"
    )


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """Real machine sounds and scores, from OSSCL_REAL_DATA; the test is skipped where it is unset."""
    folder = os.environ.get("OSSCL_REAL_DATA")
    if not folder:
        pytest.skip("OSSCL_REAL_DATA is not set")
    return pathlib.Path(folder).resolve()
