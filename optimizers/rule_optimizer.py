"""The base of every class in `torch_optim`: a `torch.optim.Optimizer` that moves tensors by the engine's kernel.

What has to be saved lies in the groups and the state; all else is made from them, and made anew in a copy.
"""

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import plugged
from .assembled import Assembled, Wrap, freeze, named
from .contract import Family, Group, State, UsageError
from .groups import Given, Groups, Wanted, groups_from, numbered
from .in_backward import PREVIOUS, Hooks, InBackward, check_alone
from .motion import Kernels, Motion
from .state import Slots
from .storage.stored import BasesDtype, MomentsDtype, check_kept

REFUSED = {
    "foreach": "updates are one kernel a layer; give compile=True for speed",
    "fused": "give compile=True: the update of a layer is then one kernel",
    "capturable": "the clock lives on the host; give compile=True instead of capturing a graph",
    "differentiable": "an update writes in place and is not recorded",
}


class RuleOptimizer(torch.optim.Optimizer):
    """One rule on the matrices, another on the rest; the base of all classes here."""

    family: ClassVar[Family[Any]]

    def __init__(
        self,
        params: Given,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        rest: str = "adamw",
        rest_lr: float | Tensor | None = None,
        rest_options: Mapping[str, Any] | None = None,
        match: Sequence[str] = (),
        wrap: Wrap | None = None,
        in_backward: InBackward | None = None,
        seed: int = 0,
        stagger: bool = True,
        stochastic_rounding: bool = False,
        moments_dtype: MomentsDtype = "fp32",
        bases_dtype: BasesDtype = "fp32",
        compile: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Any,
    ) -> None:
        """`params`: a model, its `named_parameters()`, or groups of them; `options` are those of the rule.

        A rule that moves every entry by itself trains all of them. Any other trains matrices, or what the regular
        expressions in `match` find in a name; embeddings, norms, head and vectors go to the rule `rest`, at `rest_lr`
        where that is given, norms and vectors without decay. So one group may become several, each with one rule. A
        group with "rule", or with an option such as "rank", is that rule's as a whole. Parameters that require no
        gradient are left out; where they are to train later, use `add_param_group`.

        `wrap` makes an optimizer of the engine into another one, such as `wrappers.masks.Masks`: what it freezes has
        `requires_grad` False, no gradient and no state until its turn comes, which is at the end of a step. Or
        `wrappers.subspaces.Subspaces`: matrices move in random subspaces, with the state of those.

        `in_backward` moves a layer inside of backward, as soon as its gradients are there, and frees them.

        `seed` is that of all draws; `stagger` rebuilds bases a few tensors a step; `stochastic_rounding` is for
        bfloat16 parameters. `moments_dtype` ("fp32", "bf16", "int8") and `bases_dtype` ("fp32", "bf16") are what the
        state is kept in: see `storage.stored`. Raises UsageError (a ValueError) for what is not honoured, a rank above
        a side, missing names and flattened matrices.
        """
        given = {"rest": rest, "rest_lr": rest_lr, "rest_options": dict(rest_options or {}), "match": tuple(match)}
        self._given: dict[str, Any] = {"options": options, **given}
        self._stagger, self._compile, self._wrap, self._in_backward = stagger, compile, wrap, in_backward
        self._left: dict[str, weakref.ref[Tensor]] = {}
        self._started = False
        self._ready()
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach, "fused": fused}
        defaults |= {"capturable": capturable, "differentiable": differentiable, "seed": seed}
        kept = {"moments_dtype": moments_dtype, "bases_dtype": bases_dtype}
        super().__init__(self._prepared(params), {**defaults, **kept, "stochastic_rounding": stochastic_rounding})
        self._started = True
        self._assemble()
        check_kept(self._made.rules, moments_dtype, bases_dtype)
        self._fill(0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters from now on, routed as those before; they count their steps from here."""
        if not self._started:
            super().add_param_group(param_group)
            return
        self._between_steps("add_param_group")
        added, before = 1 + max(group["added"] for group in self.param_groups), list(self.param_groups)
        try:
            for group in self._prepared([param_group], added):
                super().add_param_group(group)
            self._assemble()
            self._fill(added)
        except ValueError:
            self.param_groups = before
            self._assemble()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient, and return what `closure` returned, if there is one.

        Where every learning rate is 0 and every gradient too, nothing happens: no clock advances and nothing is drawn.
        Under `in_backward` most have moved by now, and gradients are gone afterwards. Raises UsageError where the
        parameters are not those that the optimizer was made for. A closure is called once, at the start.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        begun = self._hooks.motion if self._hooks else None
        motion = begun or self._begin()
        if not begun and self._idle():
            return loss
        motion.check_rates(self.param_groups)
        for layer in list(motion.layers):
            motion.move(layer, free=self._hooks is not None)
        self._end(motion)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As every optimizer; under `in_backward` gradients that have moved something are gone already."""
        super().zero_grad(set_to_none)
        if self._hooks:
            self._hooks.forget()

    def accumulating(self) -> AbstractContextManager[None]:
        """For all backward passes of a step but the last one: their gradients only add up, under `in_backward` too."""
        return self._hooks.accumulating() if self._hooks else nullcontext()

    def receipt(self) -> str:
        """Who trains what: a line a group, and what the state takes."""
        return plugged.receipt(self.param_groups, self.named_state(), self._still_there())

    def named_state(self) -> State:
        """The state by the names of the parameters, as the engine keeps it; the tensors are those of the optimizer."""
        return {n: self.state[p] for group in self.param_groups for n, p in named(group) if p in self.state}

    def owners(self) -> dict[str, Group]:
        """Every parameter's group, as the engine knows it, by name."""
        owner: dict[str, Group] = {}
        for group in self.param_groups:
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            for name, _ in named(group):
                rule = self._made.optimizers[group["added"]].owner[name].rule
                owner[name] = Group(group["name"], rule, (), lr, decay, group["why"])
        return owner

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by a GradScaler only, which scales and divides gradients, and skips steps: too late for these."""
        if self._hooks:
            raise UsageError(
                "GradScaler: got an optimizer with in_backward, whose layers moved by gradients that were not unscaled "
                "yet; start anew without one of the two (bfloat16 needs no scaler)"
            )
        return False

    @property
    def metadata(self) -> dict[str, str]:
        """What `wrap` does, as the engine's checkpoints say it; nothing without one."""
        return dict(self.param_groups[0].get("wrapped", {}))

    @torch.no_grad()
    def load_named_state(self, state: Mapping[str, Slots], count: int) -> None:
        """Copy a state of the engine, as it stands once `count` steps are done, into this optimizer, bit by bit.

        Raises UsageError, having copied nothing, where names, slots, shapes or dtypes differ.
        """
        self._between_steps("load_named_state")
        self._put(plugged.checked(state, self._made.expected(self.param_groups, count)))
        for group in self.param_groups:
            group["count"] = count

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer: state by number, and groups. Raises UsageError inside of a step."""
        self._between_steps("state_dict")
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, back: torch's own would cast every slot to the parameter's dtype.

        Parameters are found by name where both sides have names, else by place. Raises UsageError, having changed
        nothing, where groups, rules, slots, shapes or dtypes differ.
        """
        self._between_steps("load_state_dict")
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        saved, groups = plugged.matched(state_dict, self.param_groups)
        self._put(plugged.checked(saved, self._made.expected(self.param_groups, groups[0]["count"])))
        for group, new in zip(self.param_groups, groups, strict=True):
            group.pop(PREVIOUS, None)
            group.update({key: value for key, value in new.items() if key != PREVIOUS or self._clips})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """All that is not made from it; what a parameter needs to be found again, if it was frozen, does not come."""
        self._between_steps("a copy")
        kept = ("_given", "_stagger", "_compile", "_wrap", "_in_backward", "_started")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._left = {}
        self._ready()
        self.__dict__.setdefault("_optimizer_load_state_dict_pre_hooks", {})
        self.__dict__.setdefault("_optimizer_load_state_dict_post_hooks", {})
        self._assemble()

    def _prepared(self, params: Given, added: int = 0) -> Groups:
        """Groups of one rule each, as torch takes them."""
        frozen: dict[str, Tensor] = {}
        before = self.param_groups if self._started else []
        numbers = [
            int(n.removeprefix("param.")) for g in before for n in g["param_names"] if re.match(r"param\.\d+$", n)
        ]
        groups = groups_from(params, Wanted(self.family, **self._given), frozen, 1 + max(numbers, default=-1))
        if not any(group["params"] for group in groups):
            raise UsageError("params: every parameter is frozen (requires_grad=False); unfreeze what is to be trained")
        self._left |= {name: weakref.ref(p) for name, p in frozen.items()}
        return numbered(groups, before, added)

    def _ready(self) -> None:
        """What neither the groups nor a copy have."""
        self._clips = self._in_backward is not None and self._in_backward.clip_norm is not None
        self._kernels = Kernels(self._compile, "scale" if self._clips else "none")
        self._hooks: Hooks | None = None

    def _between_steps(self, what: str) -> None:
        """Raises UsageError inside of a step, as some layers have moved and others have not."""
        if self._hooks and self._hooks.motion:
            raise UsageError(f"{what}: some layers have moved in backward, and others have not; call step() first")

    def _assemble(self) -> None:
        """What is made from the groups."""
        self._made = Assembled(self.param_groups, self.state, self._stagger, self._wrap)
        if self._wrap:
            self.param_groups[0]["wrapped"] = dict(self._made.optimizers[0].metadata)
        if self._hooks:
            self._hooks.remove()
        if self._in_backward:
            check_alone()
            params = [p for group in self.param_groups for p in group["params"]]
            self._hooks = Hooks(params, self._begin, self._in_backward.micro_batches)

    def _fill(self, added: int) -> None:
        """A fresh state for the parameters that came with this number."""
        plugged.check_groups(self.param_groups, self._made.rules, self._made.shapes, REFUSED)
        params = {n: p for group in self.param_groups if group["added"] == added for n, p in named(group)}
        plain = {name: p.detach() for name, p in params.items()}
        state = self._made.optimizers[added].init(plain)
        if self._wrap:
            plugged.check_wrapped(self._made.optimizers[added], plain, state)
        for name, slots in state.items():
            self.state[params[name]] = slots
        self._made.missing[added].look(state)
        freeze(self.param_groups, self.state, self._wrap is not None)

    def _put(self, state: Mapping[str, Slots]) -> None:
        """Take over a state that fits: into the tensors that are there, and where there are none, as copies."""
        self._made.put(self.param_groups, self.state, state)
        freeze(self.param_groups, self.state, self._wrap is not None)

    def _begin(self) -> Motion:
        """A step begins: with `step`, or in backward with the first gradient that is complete."""
        self._check()
        bound = None
        if self._in_backward:
            check_alone()
            group = self.param_groups[0]
            device = group["params"][0].device
            previous = group[PREVIOUS].to(device) if PREVIOUS in group else torch.zeros((), device=device)
            bound = self._in_backward.bound(previous)
        return Motion(self.param_groups, self.state, self._made, self._kernels, bound)

    def _end(self, motion: Motion) -> None:
        """A step is done: the clock advances, and masks change."""
        if self._clips:
            self.param_groups[0][PREVIOUS] = motion.norm()
        if self._hooks:
            self._hooks.end()
        for group in self.param_groups:
            group["count"] += 1
        self._switch()

    def _switch(self) -> None:
        """What a wrapper changes for the next step: now, so that the next forward saves nothing for a frozen layer."""
        count = self.param_groups[0]["count"]
        if not self._wrap or not self._made.optimizers[0].switches(count):
            return
        self._made.switch(self.param_groups, self.state)
        freeze(self.param_groups, self.state, masked=True)

    def _check(self) -> None:
        """Raises UsageError where groups, parameters or state are not what they were when the optimizer was made."""
        plugged.check_groups(self.param_groups, self._made.rules, self._made.shapes, REFUSED)
        if self._wrap:
            plugged.check_decay(self.param_groups, self._made.optimizers[0].owner)
        names = {p: name for group in self.param_groups for name, p in named(group)}
        plugged.check_owned(self.state, names, masked=self._wrap is not None)
        for p, name in names.items():
            plugged.check_dense(name, p.grad)
        plugged.check_left(self._still_there(), self.state)

    def _still_there(self) -> dict[str, Tensor]:
        """What was frozen when the optimizer was made, by name."""
        return {name: p for name, ref in self._left.items() if (p := ref()) is not None}

    def _idle(self) -> bool:
        """Is there nothing to do, as every rate and every gradient is 0, or there is no gradient?"""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        rates = [group["lr"] for group in self.param_groups]
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates) or any(map(bool, rates)):
            return not grads
        return not any(bool(g.any()) for g in grads)
