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


@pytest.fixture
def peft_shira_untouched() -> Iterator[None]:
    """What a test of files leaves of PEFT's own SHiRA: all of it."""
    from peft import PeftModel, PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.shira import ShiraModel

    def state() -> tuple[object, ...]:
        methods = ("from_pretrained", "load_adapter", "add_adapter")
        return PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SHIRA], *(PeftModel.__dict__[name] for name in methods)

    before = state()
    assert before[0] is ShiraModel
    yield
    assert all(a is b for a, b in zip(state(), before, strict=True))
