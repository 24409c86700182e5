"""optimizer.safetensors is one format: a run's state goes into somebody's own loop and back, to the bit."""

import json
import shutil

import pytest
import torch
from helpers.grids import few
from helpers.plugged import engine, engine_step, facade, facade_step, options, same, same_state, toy, weights
from helpers.runs import TINY, assert_identical, corpus, here, newest

from engine import checkpoint
from engine.checkpoint import CheckpointError
from engine.checkpoint.plugged import load_state, save_state
from models.llama import Llama, LlamaConfig
from optimizers import torch_optim
from optimizers.contract import UsageError
from optimizers.registry import RULES

RUN = f"sumo demo {TINY} --rank 4 --update-proj-gap 4 --save-every 6 --keep-every 6"


@pytest.mark.parametrize("name", few(RULES, "adamw", "galore", "snsm", "sumo"))
def test_the_state_of_a_step_of_the_engine_goes_into_a_loop_and_back(name, tmp_path):
    theirs, mine = toy(), toy()
    step, opt = engine(theirs, name), facade(mine, name)
    for i in range(7):
        engine_step(step, theirs, i)
    mine.load_state_dict(theirs.state_dict())
    opt.load_named_state(step.state, step.count)
    file = tmp_path / "optimizer.safetensors"
    for i in range(7, 14):
        engine_step(step, theirs, i)
        facade_step(opt, mine, i)
        if i == 9:
            save_state(opt, file)
            opt = facade(mine, name)
            assert load_state(opt, file) == 10
        assert same(weights(mine), weights(theirs)) and same_state(opt.named_state(), step.state), i
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.run
def test_a_checkpoint_of_a_recipe_goes_through_a_loop_of_ones_own_and_the_run_goes_on(tmp_path):
    corpus(tmp_path)
    done = here(tmp_path, f"{RUN} --steps 12 --out straight")
    assert done.code == 0, done.err
    source = tmp_path / "straight" / "step-00000006"
    saved = checkpoint.load(source)
    model = Llama(LlamaConfig(**{k: v for k, v in saved.model_config.items() if k in LlamaConfig.__dataclass_fields__}))
    model.load_state_dict({name: p.clone() for name, p in saved.params.items()}, strict=False)
    opt = torch_optim.SUMO(model, lr=6e-3, rest_lr=3e-2, rank=4, update_proj_gap=4)
    assert load_state(opt, source) == 6
    assert same_state(dict(opt.named_state().items()), {name: saved.state[name] for name in opt.named_state()})
    save_state(opt, tmp_path / "optimizer.safetensors")
    mine = checkpoint.TensorFile(tmp_path / "optimizer.safetensors")
    own = checkpoint.TensorFile(source / "optimizer.safetensors")
    assert {name: mine.form(name) for name in mine.names} == {name: own.form(name) for name in own.names}
    back = tmp_path / "back"
    state = {name: opt.named_state()[name] for name in saved.state}
    params = {name: model.get_parameter(name).detach() for name in saved.params}
    checkpoint.save(back, 6, params, state, saved.trainer, saved.model_config, saved.header)
    shutil.copy(tmp_path / "straight" / "metrics.jsonl", back)
    done = here(tmp_path, f"{RUN} --steps 12 --out back --resume auto")
    assert done.code == 0, done.err
    assert "at step 6\n" in done.out
    assert_identical(back, tmp_path / "straight")
    assert newest(back).step == 12


def test_a_state_of_other_options_a_wrapper_or_no_count_is_refused(tmp_path):
    file = tmp_path / "optimizer.safetensors"
    opt = facade(toy(), "sumo")
    save_state(opt, file)
    other = torch_optim.SUMO(toy(), **{**options("sumo"), "rho": 0.5})
    with pytest.raises(CheckpointError, match=r"sumo \{'rho': 1.0\}, expected sumo \{'rho': 0.5\}"):
        load_state(other, file)
    plain, state = tmp_path / "plain", opt.named_state()
    flat = {f"{name}/{slot}": t for name, slots in state.items() for slot, t in slots.items()}
    head = {"owners": json.dumps(list(state))}
    checkpoint.tensorfile.write(plain, flat, head)
    with pytest.raises(UsageError, match="count="):
        load_state(opt, plain)
    assert load_state(opt, plain, count=5) == 5 and opt.param_groups[0]["count"] == 5
    checkpoint.tensorfile.write(plain, flat, {**head, "traversal": "{}"})
    with pytest.raises(CheckpointError, match="wrapper"):
        load_state(opt, plain, count=5)
    small = torch_optim.SUMO(toy().layers[0], **options("sumo"))
    with pytest.raises(UsageError, match="of 12 parameters, expected 5"):
        load_state(small, file)
    model = toy()
    first, *later = model.named_parameters()
    opt = torch_optim.AdamW([first])
    first[1].grad = torch.ones_like(first[1])
    opt.step()
    opt.add_param_group({"params": later})
    with pytest.raises(UsageError, match=r"have taken \[0, 1\] steps"):
        save_state(opt, file)
