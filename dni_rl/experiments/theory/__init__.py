"""The parts of `dni_rl.experiments.understanding`."""
