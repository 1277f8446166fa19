"""The scale of fp16's loss."""

from __future__ import annotations


class LossScale:
    """What the loss is multiplied by before the backward pass, since fp16 rounds small gradients to zero.

    The rule is that of torch's GradScaler. If a gradient overflows, the step is skipped and the scale is halved; after
    2000 steps without an overflow it is doubled. (These three numbers are GradScaler's defaults.) The scaler keeps the
    state, so that checkpoints hold it as they do for the plain step.

    Args:
        scaler: 🤗 Accelerate's GradScaler; None: the scale is always 1.
    """

    def __init__(self, scaler):
        self.scaler = scaler

    @property
    def value(self) -> float:
        return self.scaler.get_scale() if self.scaler else 1.0

    def update(self, finite: bool) -> None:
        """Set the next step's scale. finite: all gradients of this step are."""
        if not self.scaler:
            return
        state = self.scaler.state_dict()
        good_steps = state["_growth_tracker"] + 1 if finite else 0
        if not finite:
            state["scale"] *= state["backoff_factor"]
        elif good_steps == state["growth_interval"]:
            state["scale"] *= state["growth_factor"]
            good_steps = 0
        self.scaler.load_state_dict({**state, "_growth_tracker": good_steps})
