"""The same twenty steps in the loops of others as in a plain one; where a package is missing, a test says so."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from optimizers import InBackward, torch_optim

STEPS, BREAK, LR, MICRO = 20, 11, 1e-2, 4
OPTIONS = {"rank": 4, "update_proj_gap": 6}
pytestmark = [pytest.mark.run, pytest.mark.filterwarnings("ignore")]


def needs(*packages: str):
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"{', '.join(lacking)} not installed: this host is not tried")


def model() -> nn.Module:
    """A small LLaMA of transformers; what it loses is kept in `model.losses`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.1, use_cache=False, **sizes))
    made.losses = []
    made.register_forward_hook(lambda module, given, out: made.losses.append(out.loss.item()))
    return made


def rows(first: int = 0, count: int = STEPS * MICRO) -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 64, (STEPS * MICRO, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row.clone()} for row in tokens[first : first + count]]


def batch(step: int) -> dict[str, Tensor]:
    some = rows(step * MICRO, MICRO)
    return {key: torch.stack([row[key] for row in some]) for key in some[0]}


def plain(name: str = "sumo", steps: int = STEPS) -> list[float]:
    """The losses of a loop of one's own."""
    net = model()
    opt = torch_optim.optimizer(name)(net, lr=LR, **OPTIONS)
    for i in range(steps):
        net(**batch(i)).loss.backward()
        opt.step()
        opt.zero_grad()
    return net.losses


def close(got: list[float], first: int = 0) -> None:
    expected = plain()[first:]
    assert len(got) == len(expected) and got[0] != got[-1]
    assert got == pytest.approx(expected, rel=1e-6)


class InOrder(torch.utils.data.IterableDataset):
    def __init__(self, first: int = 0) -> None:
        self.first = first

    def __iter__(self):
        return iter(rows(self.first))


def arguments(folder, **given):
    fixed = {"output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": MICRO, "learning_rate": LR}
    fixed |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none"}
    return {**fixed, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, **given}


def trainer(net, folder, way, **given):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**arguments(folder, **given))
    opts = {
        "an optimizer": lambda: {"optimizers": (torch_optim.SUMO(net, lr=LR, **OPTIONS), None)},
        "a class": lambda: {"optimizer_cls_and_kwargs": (torch_optim.SUMO, {"model": net, "lr": LR, **OPTIONS})},
        "a factory": lambda: {"optimizer_cls_and_kwargs": (torch_optim.factory("sumo"), {"lr": LR, **OPTIONS})},
    }[way]()
    return Trainer(net, args, train_dataset=InOrder(), **opts)


@needs("transformers", "accelerate")
@pytest.mark.parametrize("way", ["an optimizer", "a class", "a factory"])
def test_transformers_trainer(way, tmp_path):
    net = model()
    trainer(net, tmp_path, way).train()
    close(net.losses)


@needs("transformers", "accelerate")
@pytest.mark.parametrize("micro", [1, 2], ids=["whole batches", "accumulation 2"])
def test_transformers_trainer_in_backward(micro, tmp_path):
    """No gradient is left when the Trainer comes to clip and to step, and the weights are those of the same without."""
    ends = []
    for given in ({}, {"in_backward": InBackward(micro)}):
        net = model()
        opt = torch_optim.SUMO(net, lr=LR, **OPTIONS, **given)
        left: list[int] = []
        opt.register_step_pre_hook(
            lambda *_, net=net, left=left: left.append(sum(p.grad is not None for p in net.parameters()))
        )
        sizes = {"per_device_train_batch_size": MICRO // micro, "gradient_accumulation_steps": micro}
        made = trainer(net, tmp_path, "an optimizer", **sizes)
        made.optimizer = opt
        made.train()
        assert len(left) == STEPS and (any(left) == (not given))
        ends.append((net.losses, [p.detach() for p in net.parameters()]))
    assert ends[0][0] == ends[1][0] and all(torch.equal(p, q) for p, q in zip(ends[0][1], ends[1][1], strict=True))


@needs("transformers", "accelerate")
def test_transformers_trainer_goes_on_from_its_checkpoint(tmp_path):
    net = model()
    trainer(net, tmp_path, "an optimizer", max_steps=BREAK, save_strategy="steps", save_steps=BREAK).train()
    again = model()
    trainer(again, tmp_path, "an optimizer").train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{BREAK}"))
    close(net.losses + again.losses)


@needs("transformers", "accelerate")
def test_the_callback_writes_the_state_beside_the_trainers_and_logs_every_rate(tmp_path):
    from transformers import TrainerCallback

    from engine.checkpoint.beside import Beside
    from engine.checkpoint.plugged import load_state

    class Seen(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **others):
            logged.append(dict(logs))

    logged: list[dict[str, float]] = []
    net = model()
    made = trainer(
        net,
        tmp_path,
        "a class",
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        logging_strategy="steps",
        logging_steps=1,
    )
    made.add_callback(Beside())
    made.add_callback(Seen())
    made.train()
    again = torch_optim.SUMO(model(), lr=LR, **OPTIONS)
    assert load_state(again, tmp_path / "checkpoint-4" / "optimizer.safetensors") == 4
    for name, slots in made.optimizer.optimizer.named_state().items():
        assert all(torch.equal(t, again.named_state()[name][slot]) for slot, t in slots.items()), name
    assert (tmp_path / "checkpoint-2" / "optimizer.safetensors").is_file()
    assert any({f"optim/{g['name']}/lr" for g in again.param_groups} <= seen.keys() for seen in logged)
    plain = trainer(model(), tmp_path, "an optimizer", max_steps=1, save_strategy="steps", save_steps=1)
    plain.optimizer = torch.optim.AdamW(plain.model.parameters())
    plain.add_callback(Beside())
    with pytest.raises(ValueError, match="got AdamW, expected"):
        plain.train()


@needs("transformers", "accelerate")
def test_transformers_own_groups_have_no_names_and_the_message_says_what_to_give(tmp_path):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**arguments(tmp_path))
    made = Trainer(
        model(), args, train_dataset=InOrder(), optimizer_cls_and_kwargs=(torch_optim.SUMO, {"lr": LR, **OPTIONS})
    )
    with pytest.raises(ValueError, match='give {"model": model'):
        made.train()


def sft(net, folder, **given):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    class InTurn(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2")
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    args = SFTConfig(**arguments(folder, bf16=False, max_length=16, gradient_checkpointing=False, **given))
    opts = {"optimizers": (torch_optim.SUMO(net, lr=LR, **OPTIONS), None)}
    return InTurn(net, args, train_dataset=data, processing_class=tokenizer, **opts)


@needs("trl", "datasets", "transformers", "accelerate")
def test_trl_sft(tmp_path):
    net = model()
    sft(net, tmp_path).train()
    close(net.losses)


@needs("trl", "datasets", "transformers", "accelerate")
def test_trl_sft_goes_on_from_its_checkpoint(tmp_path):
    net = model()
    sft(net, tmp_path, save_strategy="steps", save_steps=BREAK).train()
    again = model()
    sft(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{BREAK}"))
    close(net.losses)
    close(again.losses, BREAK)


def lightning_module(automatic: bool, **options):
    from lightning import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = model(), automatic

        def training_step(self, given, index):
            if self.automatic_optimization:
                return self.net(**given).loss
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.net(**given).loss)
            return opt.step()

        def configure_optimizers(self):
            return torch_optim.SUMO(self.net, lr=LR, **OPTIONS, **options)

    return Module()


def lightning_trainer(folder, steps=STEPS):
    from lightning import Trainer

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, default_root_dir=folder, **quiet)


def loader(first: int = 0):
    return torch.utils.data.DataLoader(InOrder(first), batch_size=MICRO)


@needs("lightning", "transformers")
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_lightning(automatic, tmp_path):
    module = lightning_module(automatic)
    lightning_trainer(tmp_path).fit(module, loader())
    close(module.net.losses)


@needs("lightning", "transformers")
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_lightning_in_backward(automatic, tmp_path):
    module = lightning_module(automatic, in_backward=InBackward())
    lightning_trainer(tmp_path).fit(module, loader())
    close(module.net.losses)


@needs("lightning", "transformers")
def test_lightning_goes_on_from_its_checkpoint(tmp_path):
    module, file = lightning_module(True), tmp_path / "half.ckpt"
    half = lightning_trainer(tmp_path, BREAK)
    half.fit(module, loader())
    half.save_checkpoint(file)
    again = lightning_module(True)
    lightning_trainer(tmp_path).fit(again, loader(BREAK * MICRO), ckpt_path=file, weights_only=True)
    close(module.net.losses + again.net.losses)


@needs("accelerate", "transformers")
@pytest.mark.parametrize("given", [{}, {"in_backward": True}], ids=["behind backward", "in backward"])
@pytest.mark.parametrize("micro", [1, 4], ids=["whole batches", "accumulation 4"])
def test_accelerate(micro, given, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro)
    given = {"in_backward": InBackward(micro)} if given else {}

    def started():
        net = model()
        return accelerator.prepare(net, torch_optim.SUMO(net, lr=LR, **OPTIONS, **given))

    net, opt = started()
    losses: list[float] = []
    for i in range(STEPS):
        if i == BREAK:
            accelerator.save_state(str(tmp_path), safe_serialization=True)
            accelerator.free_memory()
            net, opt = started()
            accelerator.load_state(str(tmp_path))
        of_step = []
        for j in range(micro):
            size = MICRO // micro
            part = {key: t[j * size : (j + 1) * size] for key, t in batch(i).items()}
            with accelerator.accumulate(net):
                loss = net(**part).loss
                accelerator.backward(loss)
                opt.step()
                opt.zero_grad()
            of_step.append(loss.item())
        losses.append(sum(of_step) / micro)
    close(losses)


@needs("accelerate", "transformers")
def test_accelerates_round_trip_at_prepare_changes_no_bit():
    from accelerate import Accelerator

    net = model().bfloat16()
    opt = torch_optim.AdamW(net, lr=LR)
    net(**batch(0)).loss.backward()
    opt.step()
    before = {name: {slot: t.clone() for slot, t in slots.items()} for name, slots in opt.named_state().items()}
    Accelerator(cpu=True).prepare(net, opt)
    for name, slots in opt.named_state().items():
        for slot, t in slots.items():
            assert t.dtype == before[name][slot].dtype and torch.equal(t, before[name][slot]), (name, slot)
