"""What a model draws at random (dropout) is a function of the key, the step, the micro-batch and the segment.

torch's own generators are seeded anew before every forward of a segment. So a segment that runs twice, as with
recompute, draws the same numbers twice; a resumed run draws what the run without a stop would have drawn, and nothing
of it has to be saved. The state that the generators had is put back afterwards. Python's and numpy's are not touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from optimizers.random import Key, fold


class Draws:
    """The generators of the host and of `device`. None of this waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.generators = [torch.default_generator]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.generators.append(torch.cuda.default_generators[index])

    @contextmanager
    def of(self, key: Key) -> Iterator[None]:
        """In here `seed` draws from `key`; afterwards the generators are as they were."""
        before = [generator.clone_state() for generator in self.generators]
        self.key = key
        try:
            yield
        finally:
            for generator, state in zip(self.generators, before, strict=True):
                generator.set_state(state.get_state())

    def seed(self, *where: int) -> None:
        """What is drawn next is a function of the key and `where`."""
        number = fold(self.key, *where)
        for generator in self.generators:
            generator.manual_seed(number)
