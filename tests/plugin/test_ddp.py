"""Two processes under DDP move as one does on the mean of their gradients."""

import os

import pytest
import torch
from helpers.grids import few
from helpers.plugged import LR, gradients, options, toy, weights
from torch.nn.parallel import DistributedDataParallel

from optimizers import torch_optim
from optimizers.wrappers.masks import Masks

STEPS, MASKS = 8, Masks(active=1, period=2)


def train(model, opt, given) -> None:
    for i in range(STEPS):
        opt.zero_grad()
        model(given(i)).backward()
        opt.step()


def process(rank: int, folder: str, masked: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = toy()
    model = DistributedDataParallel(net, find_unused_parameters=masked)  # before the optimizer, which freezes layers
    opt = torch_optim.SUMO(model, lr=LR, wrap=MASKS if masked else None, **options("sumo"))
    train(model, opt, lambda i: gradients(net, 2 * i + rank))
    torch.save({"weights": weights(net), "names": list(opt.named_state())}, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.run
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("masked", few([False, True], True))
def test_two_processes_move_as_one(masked, tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path), masked), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    net = toy()
    opt = torch_optim.SUMO(net, lr=LR, wrap=MASKS if masked else None, **options("sumo"))

    def mean(i):
        a, b = (gradients(net, 2 * i + rank) for rank in range(2))
        return {name: (g + b[name]) / 2 for name, g in a.items()}

    train(net, opt, mean)
    assert one["names"] == other["names"] == list(opt.named_state())
    for name, p in weights(net).items():
        assert torch.equal(one["weights"][name], other["weights"][name]), name
        torch.testing.assert_close(one["weights"][name], p, rtol=1e-5, atol=1e-6, msg=name)
