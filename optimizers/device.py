"""What may be asked of tensors in a step: only on the CPU does the host know their values without waiting."""

from torch import Tensor


def free_to_read(x: Tensor) -> bool:
    """May code of a step branch on the values of x? Elsewhere it computes both ways and selects."""
    return x.device.type == "cpu"
