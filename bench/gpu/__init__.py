# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one unattended run that writes one report: ``make bench-gpu``.

A run is a list of stages, a stage is a list of items. Items run in child processes with a time limit: a crash, a hang
or a missing thing becomes the record of that item, with the end of its output, and the others go on. The report is
rewritten after every item and is also the state from which an interrupted run goes on. docs/gpu-report.md tells how to
read it.
"""
