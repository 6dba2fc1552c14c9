"""State machines of Hypothesis: `make test` runs a sample of what may happen, `make fuzz` (MODEL_TIMES) so many times that."""

from __future__ import annotations

import os

from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

TIMES = int(os.environ.get("MODEL_TIMES", "1"))


def run_model(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    """So many runs of at most so many steps each; AssertionError with the shortest one found that breaks a rule."""
    wanted = settings(max_examples=examples * TIMES, stateful_step_count=steps, deadline=None)
    run_state_machine_as_test(machine, settings=wanted)
