"""Steering a text and seeing what that does: edits as plain data, two texts side by side."""

from saert.measure.steering.compare import Step, Token, side_by_side
from saert.measure.steering.prompt import encode_prompt
from saert.measure.steering.setup import Sampling, Setup
from saert.measure.steering.spec import EditSpec, Op
from saert.measure.steering.watch import Live

__all__ = [
    "EditSpec",
    "Live",
    "Op",
    "Sampling",
    "Setup",
    "Step",
    "Token",
    "encode_prompt",
    "side_by_side",
]
