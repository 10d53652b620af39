# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet(recwarn):
    """PEFT and torch warn a lot; what our own code warns of goes through logging and is tested there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
