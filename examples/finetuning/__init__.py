# SPDX-License-Identifier: Apache-2.0
"""The parts of `examples/finetune.py`: data, models, training, timing and the report."""
