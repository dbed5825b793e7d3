"""What the programs with recurrent nets have in common."""

import pytest
import torch

from dni_rl.experiments import copy, ptb


@pytest.mark.parametrize("program", [copy, ptb], ids=["copy", "ptb"])
def test_the_auxiliary_task_is_told_of_the_window_that_is_read_next(program, tmp_path):
    plan = program.plan(["--preset", "smoke", "--cells", "dni_aux@4", "--run-folder", str(tmp_path)])
    experiment = program.Experiment(plan.matrix[0].config)
    learner, read, told = experiment.learner, [], []
    update, later = learner.update, learner._later_synthetic_gradients
    learner.update = lambda inputs, *rest: read.append(inputs) or update(inputs, *rest)
    learner._later_synthetic_gradients = lambda end, upcoming: told.append(upcoming) or later(end, upcoming)
    for _ in range(4):
        experiment.update()
    for upcoming, present, following in zip(told, read, read[1:], strict=False):
        assert torch.equal(upcoming, following) and not torch.equal(following, present)
    assert len(told) == 4
