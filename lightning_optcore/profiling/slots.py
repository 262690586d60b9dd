"""Where time is added up: a slot for every phase, and what a mark of the collector's buffer holds beside them."""

from __future__ import annotations

from lightning_optcore.profiling.phases import BACKWARD, FORWARD, OPTIMIZER, OTHER, PHASES, TRANSFER

# Columns before the slots: time, the step that begins, CPU time of the training thread while it waited for data.
TIME, STEP, DATA_CPU, HEAD = 0, 1, 2, 3
# One slot for each phase, three that are named below, the rest for the time of single callbacks.
NUM_SLOTS = 48
ROW = HEAD + NUM_SLOTS
OTHER_SLOT = PHASES.index(OTHER)
ON_DEVICE = (TRANSFER, FORWARD, BACKWARD, OPTIMIZER)
# What every step does is timed in the detailed ones alone: these phases, calls of ``log``, and the wait for a batch.
EVERY_STEP = (TRANSFER, FORWARD, BACKWARD, OPTIMIZER)
# Slots of the time of the others, of the calls, and of the wait.
UNSPLIT, LOG, FETCH = range(len(PHASES), len(PHASES) + 3)
DIVIDED = [*(PHASES.index(phase) for phase in EVERY_STEP), LOG, FETCH, OTHER_SLOT]
