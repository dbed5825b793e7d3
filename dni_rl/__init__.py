"""Synthetic gradients for recurrent learning beyond the truncation window."""

from dni_rl.auxiliary import AuxiliaryTask, later_synthetic_gradients
from dni_rl.backward import Report, backward, cut
from dni_rl.bp_lambda import bp_lambda_backward, bp_lambda_trace, state_jacobian
from dni_rl.contexts import future_inputs, past_inputs, recent_inputs
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
from dni_rl.critics import (
    ConvGradientCritic,
    CriticFit,
    ErrorCritic,
    GradientCritic,
    GradientRegression,
    LossCritic,
    SobolevCritic,
    Window,
)
from dni_rl.feedforward import (
    DecoupledPass,
    DecoupledSequential,
    Interface,
    SequentialReport,
    interface_critics,
)
from dni_rl.horizon import CreditHorizon, credit_horizon
from dni_rl.recurrent_critic import RecurrentGradientCritic, WatchedCore
from dni_rl.targets import lambda_targets

__all__ = [
    "GRU",
    "LSTM",
    "AuxiliaryTask",
    "CellCore",
    "ConvGradientCritic",
    "Core",
    "CreditHorizon",
    "CriticFit",
    "DecoupledPass",
    "DecoupledSequential",
    "ElementwiseLSTM",
    "ErrorCritic",
    "GradientCritic",
    "GradientRegression",
    "Interface",
    "LossCritic",
    "MultiTimescaleCore",
    "RecurrentGradientCritic",
    "Report",
    "Sensitivity",
    "SequentialReport",
    "SobolevCritic",
    "State",
    "WatchedCore",
    "Window",
    "backward",
    "bp_lambda_backward",
    "bp_lambda_trace",
    "credit_horizon",
    "cut",
    "fit_interfaces",
    "future_inputs",
    "interface_critics",
    "lambda_targets",
    "later_synthetic_gradients",
    "past_inputs",
    "recent_inputs",
    "state_jacobian",
    "wrap",
]
