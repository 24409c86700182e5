"""How close two trajectories must be: relative to the way that they went."""

import numpy as np
from torch import Tensor


def assert_follows(
    got: Tensor,
    expected: Tensor | np.ndarray,
    way: np.ndarray,
    *,
    rtol: float = 5e-5,
    atol: float = 2e-6,
    said: str = "",
) -> None:
    """Every entry of `got` is that of `expected`, up to `rtol` of its own `way` and `atol`.

    `way` holds, entry by entry, the sum of |step| so far. A rule that divides by the root of a second moment multiplies
    the rounding of a product by 1 / sqrt(v): an entry with a hundredth of the others' gradient has a hundred times
    their error, and as a rule a hundred times their step. `atol` is the rounding of the weights themselves, which are
    of size 1: 6e-8 a step.
    """
    expected = np.asarray(expected, np.float64)
    error, allowed = np.abs(got.double().numpy() - expected), rtol * way + atol
    worst = np.unravel_index(np.argmax(error / allowed), error.shape)
    assert (error <= allowed).all(), (
        f"{said}: entry {tuple(map(int, worst))} is {error[worst]:.1e} away after a way of {way[worst]:.3g}, "
        f"allowed {allowed[worst]:.1e}"
    )
