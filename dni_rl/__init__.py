"""Synthetic gradients for recurrent learning beyond the truncation window."""

from dni_rl.backward import Report, backward, cut
from dni_rl.cores import GRU, LSTM, CellCore, Core, State, wrap
from dni_rl.critics import CriticFit, GradientCritic

__all__ = [
    "GRU",
    "LSTM",
    "CellCore",
    "Core",
    "CriticFit",
    "GradientCritic",
    "Report",
    "State",
    "backward",
    "cut",
    "wrap",
]
