# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def repeatable(recwarn) -> Iterator[None]:
    """One thread, one seed. PEFT's and torch's warnings are recorded, not shown: ours go through logging."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
