"""Learning rate as a pure function of the step."""

import math

from engram.config import OptimConfig, ScheduleConfig


def learning_rate(step: int, optim: OptimConfig, total_steps: int) -> float:
    """optim.lr x warm-up x decay for update `step`, where 0 is the first update and total_steps - 1 the last.

    Warm-up rises linearly and reaches the peak at update warmup_steps - 1; its first update already moves. `step` takes
    the factor of the last milestone that step / total_steps has reached (arXiv 2401.02954). `cosine` and `wsd` (arXiv
    2404.06395) are at final_factor in the last update.
    """
    schedule = optim.schedule
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return optim.lr * warmup * _decay(step, schedule, total_steps)


def _decay(step: int, schedule: ScheduleConfig, total_steps: int) -> float:
    if schedule.kind == "step":
        reached = [
            factor
            for milestone, factor in zip(schedule.milestones, schedule.factors, strict=True)
            if step / total_steps >= milestone
        ]
        return reached[-1] if reached else 1.0
    if schedule.kind == "constant":
        return 1.0
    updates_left = max(0, total_steps - 1 - step)
    if schedule.kind == "cosine":
        decaying = max(1, total_steps - 1 - schedule.warmup_steps)
        share_left = (1 - math.cos(math.pi * min(1.0, updates_left / decaying))) / 2
    else:
        decaying_steps = schedule.decay_fraction * total_steps
        share_left = min(1.0, updates_left / decaying_steps) if decaying_steps else 1.0
    return schedule.final_factor + (1 - schedule.final_factor) * share_left
