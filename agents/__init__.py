"""Recurrent actor-critic agents: networks, rollouts, learners, and the run around them."""
