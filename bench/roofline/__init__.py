# SPDX-License-Identifier: Apache-2.0
"""Modelled times of the kernels, beside what the hardware allows and beside a dense product or plain torch.

``python -m bench.roofline`` prints tables, ``--json`` records, ``--dispatch`` where other kernels win, and
``--householder`` what becomes of chained reflections. Counts come from running the real launches in the executor
(``bench.kernels.counts``), rates from ``devices``, the rule that joins them from ``model``. Nothing here was measured
on a device: every time is modelled. ``docs/kernels.md`` has the model.
"""
