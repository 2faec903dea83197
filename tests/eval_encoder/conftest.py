"""Tiny models are slower on two threads than on one, and far slower where two tests share a
machine."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread(request):
    """For tests of multimodal models and the commands that they start."""
    if not request.path.name.startswith("test_lmm"):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)
