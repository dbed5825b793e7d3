"""Recurrent cores: one contract, one loop over time, and faster paths that give the same numbers."""

from dni_rl.cores.base import Core, State, StateHistory, UnrolledState, clear_state, unroll_stepwise
from dni_rl.cores.gated import GRU, LSTM, CellCore, wrap

__all__ = [
    "GRU",
    "LSTM",
    "CellCore",
    "Core",
    "State",
    "StateHistory",
    "UnrolledState",
    "clear_state",
    "unroll_stepwise",
    "wrap",
]
