"""The base of every class in `torch_optim`: a `torch.optim.Optimizer` that moves tensors by the engine's kernel.

What has to be saved lies in the groups and the state; all else is made from them, and made anew in a copy.
"""

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import plugged
from .compile import compiled
from .contract import Family, Group, Hyper, Optimizer, Params, Rule, Slots, State, UsageError
from .groups import Given, Groups, Wanted, groups_from, rule_of
from .kernel import Kernel, make_kernel, rebuild_in_place, seeds
from .missing import Missing
from .partition import partition
from .random import Key, fold
from .routing import block

Wrap = Callable[[Optimizer, Params, Key], Optimizer]

REFUSED = {
    "foreach": "updates are one kernel a layer; give compile=True for speed",
    "fused": "give compile=True: the update of a layer is then one kernel",
    "capturable": "the clock lives on the host; give compile=True instead of capturing a graph",
    "differentiable": "an update writes in place and is not recorded",
}


class Moving(NamedTuple):
    """A parameter that moves in this step."""

    name: str
    p: Tensor
    g: Tensor
    slots: Slots
    rule: Rule
    hyper: Hyper


class Layer(NamedTuple):
    """What parameters that are updated by one kernel have in common."""

    name: str
    device: torch.device
    key: Key
    rounding: bool


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
        seed: int = 0,
        stagger: bool = True,
        stochastic_rounding: bool = False,
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

        `seed` is that of all draws; `stagger` rebuilds bases a few tensors a step; `stochastic_rounding` is for
        bfloat16 parameters. Raises UsageError (a ValueError) for what is not honoured, a rank above a side, missing
        names and flattened matrices.
        """
        given = {"rest": rest, "rest_lr": rest_lr, "rest_options": dict(rest_options or {}), "match": tuple(match)}
        self._given: dict[str, Any] = {"options": options, **given}
        self._stagger, self._compile, self._wrap = stagger, compile, wrap
        self._left: dict[str, weakref.ref[Tensor]] = {}
        self._started = False
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach, "fused": fused}
        defaults |= {"capturable": capturable, "differentiable": differentiable, "seed": seed}
        super().__init__(self._prepared(params), {**defaults, "stochastic_rounding": stochastic_rounding})
        self._started = True
        self._assemble()
        self._fill(0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters from now on, routed as those before; they count their steps from here."""
        if not self._started:
            super().add_param_group(param_group)
            return
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
        Raises UsageError where the parameters are not those that the optimizer was made for.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check()
        if self._idle():
            return loss
        for added, optimizer in self._optimizers.items():
            self._step(added, optimizer)
        self._switch()
        return loss

    def receipt(self) -> str:
        """Who trains what: a line a group, and what the state takes."""
        left = {name: p for name, ref in self._left.items() if (p := ref()) is not None}
        return plugged.receipt(self.param_groups, self.named_state(), left)

    def named_state(self) -> State:
        """The state by the names of the parameters, as the engine keeps it; the tensors are those of the optimizer."""
        return {n: self.state[p] for group in self.param_groups for n, p in _named(group) if p in self.state}

    def owners(self) -> dict[str, Group]:
        """Every parameter's group, as the engine knows it, by name."""
        owner: dict[str, Group] = {}
        for group in self.param_groups:
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            for name, _ in _named(group):
                rule = self._optimizers[group["added"]].owner[name].rule
                owner[name] = Group(group["name"], rule, (), lr, decay, group["why"])
        return owner

    @property
    def metadata(self) -> dict[str, str]:
        """What `wrap` does, as the engine's checkpoints say it; nothing without one."""
        return dict(self.param_groups[0].get("wrapped", {}))

    @torch.no_grad()
    def load_named_state(self, state: Mapping[str, Slots], count: int) -> None:
        """Copy a state of the engine, as it stands once `count` steps are done, into this optimizer, bit by bit.

        Raises UsageError, having copied nothing, where names, slots, shapes or dtypes differ.
        """
        self._put(plugged.checked(state, self._expected(count)))
        for group in self.param_groups:
            group["count"] = count

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, back: torch's own would cast every slot to the parameter's dtype.

        Parameters are found by name where both sides have names, else by place. Raises UsageError, having changed
        nothing, where groups, rules, slots, shapes or dtypes differ.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        saved, groups = plugged.matched(state_dict, self.param_groups)
        self._put(plugged.checked(saved, self._expected(groups[0]["count"])))
        for group, new in zip(self.param_groups, groups, strict=True):
            group.update(new)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """All that is not made from it; what a parameter needs to be found again, if it was frozen, does not come."""
        own = {"_given": self._given, "_stagger": self._stagger, "_compile": self._compile, "_started": True}
        return {**super().__getstate__(), **own, "_wrap": self._wrap}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_left", {})
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
        called = [group["name"] for group in before]
        for group in groups:
            same = sum(name.partition("#")[0] == group["name"] for name in called)
            group["name"] += f"#{same + 1}" if same else ""
            called.append(group["name"])
            group["param_names"] = [name for name, _ in group["params"]]
            group["params"] = [p for _, p in group["params"]]
            group |= {"added": added, "count": 0}
        return groups

    def _assemble(self) -> None:
        """What is made from the groups: who owns what, when bases are due, and which of them are missing."""
        self._optimizers: dict[int, Optimizer] = {}
        self._missing: dict[int, Missing] = {}
        self._kernels: dict[object, Kernel] = self.__dict__.get("_kernels", {})
        self._hypers: dict[object, dict[str, Tensor]] = {}
        self._rules = [rule_of(group) for group in self.param_groups]
        pairs = [pair for group in self.param_groups for pair in _named(group)]
        self._shapes = {name: p.shape for name, p in pairs}
        if len(self._shapes) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise UsageError(f"params: two parameters are called {twice!r}; give each a name of its own")
        for added in sorted({group["added"] for group in self.param_groups}):
            owned, params = [], Params()
            for i, group in enumerate(self.param_groups):
                if group["added"] == added and group["params"]:
                    named = dict(_named(group))
                    params |= {name: p.detach() for name, p in named.items()}
                    only = "|".join(map(re.escape, named))
                    decay = float(group["weight_decay"])
                    owned.append(Group(str(i), self._rules[i], (f"^(?:{only})$",), 0.0, decay))
            optimizer = partition(params, owned, self._stagger)
            if self._wrap and added:
                raise UsageError("add_param_group: what is wrapped takes no more parameters; make a new optimizer")
            if self._wrap:
                optimizer = self._wrap(optimizer, params, fold(self.param_groups[0]["seed"], "optimizer"))
                self.param_groups[0]["wrapped"] = dict(optimizer.metadata)
            self._optimizers[added] = optimizer
            state = {name: self.state[p] for name, p in pairs if name in params and p in self.state}
            self._missing[added] = Missing(optimizer.owner, state)

    def _fill(self, added: int) -> None:
        """A fresh state for the parameters that came with this number."""
        plugged.check_groups(self.param_groups, self._rules, self._shapes, REFUSED)
        params = {n: p for group in self.param_groups if group["added"] == added for n, p in _named(group)}
        plain = {name: p.detach() for name, p in params.items()}
        state = self._optimizers[added].init(plain)
        if self._wrap:
            plugged.check_wrapped(self._optimizers[added], plain, state)
        for name, slots in state.items():
            self.state[params[name]] = slots
        self._missing[added].look(state)
        self._freeze()

    def _expected(self, count: int) -> State:
        """A state without memory, as it stands before step `count`: what a loaded one has to look like."""
        state: State = {}
        for added, optimizer in self._optimizers.items():
            pairs = [pair for group in self.param_groups if group["added"] == added for pair in _named(group)]
            state |= optimizer.init({name: torch.empty_like(p, device="meta") for name, p in pairs}, count + 1)
        return state

    def _put(self, state: Mapping[str, Slots]) -> None:
        """Take over a state that fits: into the tensors that are there, and where there are none, as copies."""
        for group in self.param_groups:
            for name, p in _named(group):
                if name not in state:
                    self.state.pop(p, None)
                elif p in self.state and plugged.form(self.state[p]) == plugged.form(state[name]):
                    plugged.copy_slots(self.state[p], state[name])
                else:
                    self.state[p] = {slot: t.to(p.device, copy=True) for slot, t in state[name].items()}
        for missing in self._missing.values():
            missing.look(self.named_state())
        self._freeze()

    def _switch(self) -> None:
        """What a wrapper changes for the next step: now, so that the next forward saves nothing for a frozen layer."""
        count = self.param_groups[0]["count"]
        if not self._wrap or not (optimizer := self._optimizers[0]).switches(count):
            return
        params = {name: p for group in self.param_groups for name, p in _named(group)}
        plain, key = {n: p.detach() for n, p in params.items()}, fold(self.param_groups[0]["seed"], "optimizer")
        moved, state = optimizer.switch(plain, self.named_state(), count, key)
        for name, p in params.items():
            if moved[name] is not plain[name]:
                plain[name].copy_(moved[name])
            self.state.pop(p, None)
            if name in state:
                self.state[p] = state[name]
        self._missing[0].look(state)
        self._freeze()

    def _freeze(self) -> None:
        """Ask for gradients of what trains now, and of nothing else that a wrapper holds."""
        for p in (p for group in self.param_groups for p in group["params"] if self._wrap):
            p.requires_grad_(p in self.state)
            if not p.requires_grad:
                p.grad = None

    def _check(self) -> None:
        """Raises UsageError where groups, parameters or state are not what they were when the optimizer was made."""
        plugged.check_groups(self.param_groups, self._rules, self._shapes, REFUSED)
        if self._wrap:
            plugged.check_decay(self.param_groups, self._optimizers[0].owner)
        names = {p: name for group in self.param_groups for name, p in _named(group)}
        plugged.check_owned(self.state, names, masked=self._wrap is not None)
        for name, ref in self._left.items():
            if (p := ref()) is not None and p.requires_grad and not any(p is q for q in self.state):
                raise UsageError(
                    f"{name}: was frozen when the optimizer was made, and requires a gradient now; train it too with "
                    f'add_param_group({{"params": [({name!r}, p)]}}), or freeze it'
                )

    def _idle(self) -> bool:
        """Is there nothing to do, as every rate and every gradient is 0, or there is no gradient?"""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        rates = [group["lr"] for group in self.param_groups]
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates) or any(map(bool, rates)):
            return not grads
        return not any(bool(g.any()) for g in grads)

    def _step(self, added: int, optimizer: Optimizer) -> None:
        """One step of the parameters that came together, a layer at a time."""
        groups = [(i, group) for i, group in enumerate(self.param_groups) if group["added"] == added]
        count = groups[0][1]["count"]
        layers: dict[Layer, list[Moving]] = {}
        for i, group in groups:
            key, rounding = fold(group["seed"], "optimizer"), bool(group["stochastic_rounding"])
            for name, p in _named(group):
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise UsageError(f"{name}: got a sparse gradient, expected a dense one; give sparse=False")
                plugged.follow(self.state[p], p)
                g, hyper = -p.grad if group["maximize"] else p.grad, self._hyper(i, group, p.device)
                g = optimizer.inward(name, g, self.state[p])
                layer = Layer(block(name), p.device, key, rounding)
                rule = optimizer.owner[name].rule
                layers.setdefault(layer, []).append(Moving(name, p.detach(), g, self.state[p], rule, hyper))
        due, missing = set(optimizer.due(count)), self._missing[added]
        absent = missing.names()
        for layer, moved in layers.items():
            for name, _, g, slots, rule, _ in moved:
                if name in due or name in absent:
                    rebuild_in_place(rule, name, g, slots, count, layer.key, name not in due)
                    if name in absent:
                        missing.watch(name, slots)
            seed = seeds(layer.key, [one.name for one in moved], count, layer.device) if layer.rounding else None
            hypers = [one.hyper for one in moved]
            self._kernel(moved)(
                [one.g for one in moved],
                [one.slots for one in moved],
                [one.p for one in moved],
                hypers,
                hypers[0]["lr"],  # the bound of a clipping that is not there: nothing reads it
                seed,
            )
        for _, group in groups:
            group["count"] = count + 1

    def _kernel(self, moved: Sequence[Moving]) -> Kernel:
        """The update of these parameters, shared by all layers with the same rules, shapes and dtypes."""
        kind = tuple((one.rule, one.p.shape, one.p.dtype) for one in moved)
        if kind not in self._kernels:
            kernel = make_kernel([one.rule for one in moved])
            self._kernels[kind] = compiled(kernel) if self._compile else kernel
        return self._kernels[kind]

    def _hyper(self, i: int, group: Mapping[str, Any], device: torch.device) -> Hyper:
        """lr and weight_decay of a group as 0-d tensors, which are filled and stay the same: nothing compiles anew."""
        if (i, device) not in self._hypers:
            made = {name: torch.zeros((), device=device) for name in ("lr", "weight_decay")}
            self._hypers[i, device] = made
        hyper = self._hypers[i, device]
        for name, t in hyper.items():
            t.copy_(group[name]) if isinstance(group[name], Tensor) else t.fill_(group[name])
        return hyper


def _named(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return zip(group["param_names"], group["params"], strict=True)
