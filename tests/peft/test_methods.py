# SPDX-License-Identifier: Apache-2.0
"""Several methods side by side, and a PEFT that has only some of them."""

import copy
import sys

import pytest
from torch import nn

import frodkernels as fk
from frodkernels.peft import _require, methods, tuners
from tests.peft.hra_models import hra
from tests.peft.models import Tiny, close, frod, x
from tests.peft.shira_models import shira

MODELS = {"frod": frod, "hra": hra, "shira": shira}


def test_all_in_one_module():
    together = nn.ModuleList([make() for make in MODELS.values()])
    plain = copy.deepcopy(together)
    report = fk.peft.accelerate(together)
    assert len(report.swapped) == 12 and {line.tuner for line in report.layers} == {"FRoD", "HRA", "SHiRA"}
    for a, b in zip(together, plain, strict=True):
        close(a(x()), b(x()))
    groups = fk.peft.param_groups(together, 1e-3)
    assert [g["name"] for g in groups] == ["frod_lambda", "frod_values", "other"]
    assert len(groups[2]["params"]) == 8
    fk.peft.restore(together)
    assert [type(m) for m in together.modules()] == [type(m) for m in plain.modules()]


@pytest.fixture
def peft_without(monkeypatch):
    """Make a PEFT of the methods that are left; ours for the others must not be imported then."""
    caches = (_require._missing, methods.methods, tuners._classes)

    def remove(*names):
        for cache in caches:
            cache.cache_clear()
        for name in names:
            monkeypatch.setitem(sys.modules, f"peft.tuners.{name}", None)
            for module in [m for m in sys.modules if m.startswith(f"frodkernels.peft.{name}_")]:
                monkeypatch.setitem(sys.modules, module, None)

    yield remove
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("method", MODELS)
def test_works_where_peft_has_one_of_the_methods(peft_without, method):
    peft_without(*(name for name in MODELS if name != method))
    with fk.peft.enabled():
        model = MODELS[method]()
    assert fk.peft.accelerate(model).already
    fk.peft.restore(model)
    assert len(fk.peft.accelerate(model).swapped) == 4
    assert fk.peft.param_groups(model, 1e-3)
    model(x()).sum().backward()


def test_peft_without_any_of_the_methods(peft_without):
    peft_without(*MODELS)
    with pytest.raises(ImportError, match=r"no usable tuner that frodkernels serves \(FRoD: .*HRA: .*SHiRA: .*pip"):
        fk.peft.accelerate(Tiny())
