"""What torch's own wrappers make of a model when they shard it is refused by a message, before any step."""

import pytest
import torch
from helpers.plugged import LR, gradients, options, toy
from torch import nn

from optimizers import torch_optim
from optimizers.contract import UsageError

pytestmark = [
    pytest.mark.run,  # to import FSDP takes seconds
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]


@pytest.fixture
def alone(tmp_path):
    """A group of one process: what is sharded is whole, and has the form of a shard all the same."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def of_two():
    """The first of two processes, of which the other is not there: nothing arrives, and each has half of a tensor."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


RULES = ("sumo", "adamw")  # one of matrices, and one that would do the same to a flat vector


def refused(match: str):
    return pytest.raises(UsageError, match=match)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("world", ["alone", "of_two"])
def test_what_fsdp2_makes_of_a_model(request, world, name):
    from torch.distributed.fsdp import fully_shard

    request.getfixturevalue(world)
    model, before = toy(), toy()
    size = torch.distributed.get_world_size()
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (size,)))
    with refused("got a DTensor.*use DDP"):
        torch_optim.optimizer(name)(model, lr=LR, **options(name))
    opt = torch_optim.optimizer(name)(before, lr=LR, **options(name))
    named = dict(model.named_parameters())
    for group in opt.param_groups:  # as `prepare` puts the new ones into an optimizer that was there
        group["params"] = [named[n] for n in group["param_names"]]
    with refused("got a DTensor"):
        opt.step()


class Odd(nn.Module):
    """Matrices whose names say nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)


@pytest.mark.parametrize("make", [toy, Odd])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("original", [False, True], ids=["flat", "original names"])
def test_what_fsdp1_makes_of_a_model(of_two, name, original, make):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(make(), device_id=torch.device("cpu"), use_orig_params=original)
    assert all(p.ndim == 1 for p in model.parameters())
    named = list(model.named_parameters())
    for given in (model, named, [{"params": named[:1]}, {"params": named[1:]}]):
        with refused("looks flattened or sharded"):
            torch_optim.optimizer(name)(given, lr=LR, **options(name))


def test_what_zero3_leaves_of_a_model():
    """Nothing, until a layer is used: each parameter is empty meanwhile."""
    model = Odd()
    for p in model.parameters():
        p.data = torch.empty(0)
    for name in RULES:
        with refused("looks flattened or sharded"):
            torch_optim.optimizer(name)(model, lr=LR, **options(name))


def test_pieces_are_taken_where_a_group_says_that_they_are_vectors(of_two):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Odd(), device_id=torch.device("cpu"), use_orig_params=True)
    opt = torch_optim.AdamW([{"params": model.named_parameters(), "rule": "adamw"}], lr=LR)
    assert opt.param_groups[0]["param_names"][0] == "first.weight"


@pytest.mark.parametrize("wrap", ["DDP", "FSDP1"])
def test_what_is_whole_is_trained(alone, wrap):
    """As under DDP, and FSDP1 among one process, which shards nothing."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    plain, inside = toy(), toy()
    model = nn.parallel.DistributedDataParallel(inside)
    if wrap == "FSDP1":
        model = FullyShardedDataParallel(inside, device_id=torch.device("cpu"), use_orig_params=True)
    ends = []
    for net in (plain, model):
        opt = torch_optim.SUMO(net, lr=LR, **options("sumo"))
        net(gradients(toy(), 0)).backward()
        opt.step()
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
