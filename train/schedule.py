"""How the learning rate moves over a run."""


def trapezoid(step: int, steps: int, warmup: int, decay: float) -> float:
    """The rate's factor at a step: up linearly, 1, and down linearly to 0 after the last step.

    `warmup` in steps; `decay` the last part of the steps, 0 for a rate that stays.
    """
    falling = (steps - step) / (decay * steps) if decay * steps >= 1 else 1.0
    return min(1.0, (step + 1) / max(1, warmup), falling)
