"""One torch thread: the sums, and so the trained bits, are those of one order; and nothing waits for a busy core."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
