"""Synthetic gradients for recurrent learning beyond the truncation window."""

from dni_rl.backward import Report, backward, cut
from dni_rl.bp_lambda import bp_lambda_backward, bp_lambda_trace
from dni_rl.cores import (
    GRU,
    LSTM,
    CellCore,
    Core,
    ElementwiseLSTM,
    MultiTimescaleCore,
    Sensitivity,
    State,
    fit_interfaces,
    wrap,
)
from dni_rl.critics import CriticFit, GradientCritic
from dni_rl.feedforward import (
    DecoupledPass,
    DecoupledSequential,
    Interface,
    InterfaceCritic,
    SequentialReport,
    interface_critics,
)
from dni_rl.horizon import CreditHorizon, credit_horizon

__all__ = [
    "GRU",
    "LSTM",
    "CellCore",
    "Core",
    "CreditHorizon",
    "CriticFit",
    "DecoupledPass",
    "DecoupledSequential",
    "ElementwiseLSTM",
    "GradientCritic",
    "Interface",
    "InterfaceCritic",
    "MultiTimescaleCore",
    "Report",
    "Sensitivity",
    "SequentialReport",
    "State",
    "backward",
    "bp_lambda_backward",
    "bp_lambda_trace",
    "credit_horizon",
    "cut",
    "fit_interfaces",
    "interface_critics",
    "wrap",
]
