"""Omni-masked gradient descent (arXiv 2603.05960) in plain PyTorch, float64 where the model is.

(3)  sum_{j=1..M} S_j = M 1: over a cycle every entry is scaled by M in all
(4)  g_t = S_j (.) grad f(theta_t; z_i), each pair (j, i) once a cycle
(5)  Algorithm 2, layers: gamma of N_L train at a time, their gradients times N_L / gamma; the rest always trains,
     at scale 1
(6)  frozen is: no gradient, no step, no decay, no count of steps; its state is kept, or forgotten
(7)  not the paper's: the a-th step of a layer since it was frozen last has the learning rate times min(a / K, 1)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def cycle_of_gradients(gradients: Sequence[dict[str, Tensor]], masks: int) -> dict[str, Tensor]:
    """(3) and (4) at one point: what a cycle's masked gradients sum to, M times the sum over samples."""
    return {name: masks * sum(g[name].double() for g in gradients) for name in gradients[0]}


def adamw_by_hand(
    params: dict[str, Tensor],
    loss: Callable[[int], Tensor],
    members: Callable[[str], int | None],
    active: Callable[[int], tuple[int, ...]],
    rate: Callable[[int], float],
    *,
    scale: float,
    steps: int,
    forget: bool,
    eps: float,
    decay: float,
    rising: int = 0,
) -> None:
    """(5) as the authors' code runs it: torch's AdamW with gradients switched on and off, `params` moved in place.

    `loss(t)` is that of step t, `members(name)` the number of the layer that a parameter is in, None where it always
    trains, `active(t)` the layers of step t. `forget` drops the state of what is switched off (6); `rising` is K
    of (7), or 0.
    """
    optimizer = torch.optim.AdamW([{"params": [p]} for p in params.values()], eps=eps, weight_decay=decay)
    turn = dict.fromkeys(params, 0)
    for step in range(steps):
        for name, p in params.items():
            p.requires_grad_(members(name) in (None, *active(step)))
            if forget and not p.requires_grad:
                optimizer.state.pop(p, None)
        optimizer.zero_grad(set_to_none=True)
        loss(step).backward()
        for name, p in params.items():
            if p.requires_grad and members(name) is not None:
                p.grad *= scale
        for group, (name, p) in zip(optimizer.param_groups, params.items(), strict=True):
            turn[name] = turn[name] + 1 if p.requires_grad else 0
            masked = rising and members(name) is not None
            group["lr"] = rate(step) * (min(turn[name] / rising, 1) if masked else 1)
        optimizer.step()
