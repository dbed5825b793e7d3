"""Recurrent cores: one contract, one loop over time, and faster paths that give the same numbers."""

from dni_rl.cores.base import Core, State, StateHistory, UnrolledState, clear_state, unroll_stepwise
from dni_rl.cores.gated import GRU, LSTM, CellCore, wrap
from dni_rl.cores.rtrl import ElementwiseLSTM, Sensitivity
from dni_rl.cores.timescales import MultiTimescaleCore, fit_interfaces

__all__ = [
    "GRU",
    "LSTM",
    "CellCore",
    "Core",
    "ElementwiseLSTM",
    "MultiTimescaleCore",
    "Sensitivity",
    "State",
    "StateHistory",
    "UnrolledState",
    "clear_state",
    "fit_interfaces",
    "unroll_stepwise",
    "wrap",
]
