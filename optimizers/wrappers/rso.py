"""RSO: Chen, Zhang, Liu, Yuan & Wen, "A Memory Efficient Randomized Subspace Optimization Method for Training Large
Language Models", ICML 2025, arXiv 2502.07222. For every layer y = x Wᵀ under it, W (out, in):

    for k = 0, 1, ...                                               every `period` steps
        P ~ random (in, r), E P Pᵀ = I;     B <- 0 (out, r);     moments <- 0
        B ~ argmin_B f(W + B Pᵀ) + 1/(2 eta) ||B||²                 by `period` steps of an inner rule:
            dB = dYᵀ (x P) + B / eta                                = G P + B / eta, of x only x P (tokens, r) is kept
            B <- B + rule(dB)
        W <- W + B Pᵀ

P is N(0, 1/r), or sqrt(in/r) times a uniform (Haar) orthonormal basis or r coordinates. An entry of B Pᵀ is as large
as one of B, so learning rates of the inner rule carry over from W. Two forms of the same steps:

    merged      W holds W + B Pᵀ all along, the only copy of it: rule(dB) Pᵀ is added to it at each step, B itself is
                not stored, and nothing is left to do at the end of a period
    products    W stays as it is for a period (decay aside), the model computes x Wᵀ + (x P) Bᵀ

Where this differs. The body of the paper was not at hand: this follows its abstract, third parties that ran or
described it, and public code of the same group. That P stands on the input side of every layer follows from the claim
about activations; Gaussian P and no 1/eta are what public code does, Haar P and eta are the theory's. Weight decay
multiplies W, not B. Moments may also be kept, or carried over (m <- r/in m P_oldᵀ P_new, v and t as they are).
`share` gives layers that read the same x the same P, so that x P is kept once (ours). A reproduction (arXiv
2602.23111) found RSO 0.4 to 1.0 perplexity behind Adam in pre-training LLaMA of 130M to 1B.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..apply import add
from ..contract import Hyper, Kind, Optimizer, Params, Rule, Slot, Slots, State, UsageError, bare
from ..moments import Moments
from ..random import Key, fold, normal, permutation, word

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of a LLaMA: modules that read the same x


def draw(projection: str, key: Key, size: int, rank: int, device: torch.device | str = "cpu") -> Tensor:
    """P (size, rank), float32, contiguous, with E P Pᵀ = I; a pure function of its arguments."""
    if torch.device(device).type == "meta":
        return torch.empty(size, rank, device=device)
    p: Tensor
    if projection == "coordinate":
        p = torch.zeros(size, rank, device=device)
        p[permutation(key, size, device)[:rank].sort().values, torch.arange(rank, device=device)] = sqrt(size / rank)
        return p
    g = normal(key, (size, rank), device)
    if projection == "gaussian":
        return g / sqrt(rank)
    q, r = torch.linalg.qr(g)
    p = (sqrt(size / rank) * q * r.diagonal().sign()).contiguous()  # without the signs it would not be uniform
    return p


@dataclass(frozen=True)
class Subspace:
    """Of what size a random subspace is and how it is stepped in, over the options of the inner rule."""

    rank: int
    form: str
    prox: float
    warmup: int
    decay: bool
    over: Any


def subspace(
    inner: Rule, rank: int, form: str = "merged", prox: float = 0.0, warmup: int = 0, decay: bool = True
) -> Rule:
    """`inner` on B (out, r) as a rule for W (out, in), whose gradient is dB: it moves W by rule(dB) Pᵀ, or B.

    Slots: `P` (in, r) in W's dtype; `B` (out, r) float32 where the form is "products" or `prox` (1/eta) is not 0; `age`
    (0-d float32), the steps since P was drawn, where the learning rate warms up over `warmup` of them; and those of
    `inner` for a B. Without `decay` the weight decay is taken to be 0, which saves a pass over W.
    """
    holds, inner_gradient = form == "products" or prox > 0, inner.gradient

    def inside(slots: Slots) -> Slots:
        return {slot.name: slots[slot.name] for slot in inner.slots}

    def init(p: Tensor) -> Slots:
        b = p.new_zeros(p.shape[0], rank, dtype=torch.float32)
        apart = {"B": b} if holds else {}
        aged = {"age": p.new_zeros((), dtype=torch.float32)} if warmup else {}
        return {"P": p.new_zeros(p.shape[1], rank), **apart, **aged, **inner.init(b)}

    def inward(g: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        return (g.float() + prox * slots["B"] if prox else g), inside(slots)

    def refresh(g: Tensor, slots: Slots, key: Key, only_missing: bool = False) -> tuple[Slots, Tensor]:
        assert inner.refresh is not None
        new, ok = inner.refresh(*inward(g, slots), key, only_missing)
        return slots | new, ok

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor | None, Slots]:
        b = slots["B"] if holds else p.new_zeros(()).expand(p.shape[0], rank)
        still = {**hyper, "weight_decay": torch.zeros_like(hyper["weight_decay"])}
        aged = {}
        if warmup:
            aged = {"age": slots["age"] + 1}
            still["lr"] = hyper["lr"] * (aged["age"] / warmup).clamp(max=1)
        step, new = inner.update(*inward(g, slots), b, still)
        assert step is not None, f"{inner.name} moves its tensor"
        new = slots | new | aged | ({"B": b + step} if holds else {})
        delta = step @ slots["P"].float().T if form == "merged" else None
        if decay:
            shrink = -hyper["lr"] * hyper["weight_decay"] * p.float()
            delta = shrink if delta is None else delta + shrink
        return delta, new

    def export(slots: Slots, p: Tensor) -> Moments:
        assert inner.export is not None
        first, second, seen = inner.export(inside(slots), p.new_empty(p.shape[0], rank, dtype=torch.float32))
        basis = slots["P"].float()
        if first is not None:  # the least G with G P = M
            first = torch.linalg.solve(basis.T @ basis, first.T).T @ basis.T
        if second is not None:  # E (G P)² = E G² P²: of a row its mean is known, no more
            second = (second.mean(-1, keepdim=True) * (rank / p.shape[1])).expand(p.shape).contiguous()
        return Moments(first, second, seen)

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert inner.adopt is not None and moments.first is not None and moments.second is not None
        basis = slots["P"].float()
        given = Moments(moments.first @ basis, moments.second @ basis.square(), moments.seen)
        new, did = inner.adopt(given, inside(slots), p.new_empty(p.shape[0], rank, dtype=torch.float32), key)
        return slots | new, f"into a random subspace, {did}"

    apart = (Slot("B", Kind.WEIGHT),) if holds else ()
    aged = (Slot("age", Kind.COUNTER),) if warmup else ()
    return replace(
        inner,
        name=f"rso {inner.name}",
        options=Subspace(rank, form, prox, warmup, decay, inner.options),
        slots=(Slot("P", Kind.BASIS, given=True), *apart, *aged, *inner.slots),
        gradient=lambda g, slots: inner_gradient(g @ slots["P"].float(), slots),
        product=(lambda slots: slots["B"] @ slots["P"].float().T) if form == "products" else None,
        init=init,
        update=update,
        refresh=refresh if inner.refresh else None,
        export=export if inner.export else None,
        adopt=adopt if inner.adopt else None,
        elementwise=False,
    )


def rso(
    base: Optimizer,
    params: Params,
    names: Iterable[str],
    rank: int,
    period: int = 200,
    key: Key = Key(0),  # noqa: B008 (an int)
    form: str = "merged",
    projection: str = "gaussian",
    share: Sequence[Sequence[str]] = (),
    moments: str = "reset",
    prox: float = 0.0,
    warmup: int = 0,
) -> Optimizer:
    """`base`, from `partition`, with the weights `names` ("….weight") moved in subspaces by the rules they have.

    The model must have slots of the same names, rank and form (`models.layers.attach`): it sees ….P and ….weight
    frozen and ….B trainable, whose gradient moves the weight. P is drawn anew from (`key`, name, step) every `period`
    steps, one for the modules of a parent that `share` lists together. `moments`: what becomes of the inner rule's
    state then, "reset", "keep" or "transform". `prox` is 1/eta. `warmup` (ours): steps after a new P over which the
    inner rule's learning rate rises, as one that starts anew knows least at first. All that is not in `names` keeps its
    rule and state.

    Raises UsageError for names that are not owned or not weights, a rank above a layer's inputs, options it does not
    know, and a shared P of layers whose inputs have different sizes.
    """
    under = dict.fromkeys(names)
    for option, got, known in (
        ("form", form, ("merged", "products")),
        ("projection", projection, ("gaussian", "haar", "coordinate")),
        ("moments", moments, ("reset", "keep", "transform")),
    ):
        if got not in known:
            raise UsageError(f"rso: {option} must be one of {known}, got {got!r}")
    if period < 1 or not prox >= 0 or warmup < 0:
        raise UsageError(
            f"rso: period must be at least 1, prox and warmup at least 0, got {period}, {prox} and {warmup}"
        )
    rules: dict[tuple[Rule, bool], Rule] = {}  # one object a rule: by them kernels are compiled
    owner, place = dict(base.owner), dict[str, str]()
    inputs: dict[str, int] = {}
    for name in under:
        if name not in owner or name not in params or name.rpartition(".")[2] != "weight":
            raise UsageError(f"rso: got the name {name!r}, expected the weight of a layer, such as 'x.weight'; drop it")
        group, w = owner[name], params[name]
        if w.ndim != 2 or not 1 <= rank <= w.shape[1]:
            raise UsageError(
                f"{name}: rso needs a matrix (out, in) with 1 <= rank <= in, got rank {rank} and shape "
                f"{tuple(w.shape)}; lower the rank or leave this name out"
            )
        if any(slot.name == "P" for slot in group.rule.slots):
            raise UsageError(f"{name}: is moved in a random subspace already; leave this name out of the second one")
        if moments == "transform" and group.rule.refresh:
            raise UsageError(f"rso: moments of {group.rule.name} have a basis of their own; 'reset' or 'keep' them")
        kind = group.rule, group.weight_decay != 0
        owner[name] = group._replace(
            rule=rules.setdefault(kind, subspace(group.rule, rank, form, prox, warmup, kind[1]))
        )
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        place[name] = f"{parent}.{'+'.join(next((own for own in share if leaf in own), (leaf,)))}"
        if inputs.setdefault(place[name], w.shape[1]) != w.shape[1]:
            raise UsageError(f"rso: {name} cannot share {place[name]}'s P, its input has another size; do not share it")

    def bases(params: Params, step: int) -> Params:
        drawn: Params = {}
        for name in (name for name in params if name in under):
            if place[name] not in drawn:
                w, own = params[name], fold(key, place[name], step)
                drawn[place[name]] = draw(projection, own, w.shape[1], rank, w.device).to(w.dtype)
        return {name: drawn[place[name]] for name in params if name in under}

    def inner(params: Params) -> Params:
        """What `base` sees: a B, without values, in the place of each weight."""
        seen = dict(params)
        for name in params.keys() & under.keys():
            w = params[name]
            seen[name] = w.new_zeros((), dtype=torch.float32).expand(w.shape[0], rank)
        return seen

    def own(name: str) -> tuple[str, ...]:
        return tuple(slot.name for slot in owner[name].rule.slots if slot not in base.owner[name].rule.slots)

    def around(name: str, w: Tensor, p: Tensor, slots: Slots) -> Slots:
        """Slots of `base` for a B, with a P that is new, and B = 0."""
        sizes = {"P": p, "B": w.new_zeros(w.shape[0], rank, dtype=torch.float32)}
        return {slot: sizes.get(slot, w.new_zeros((), dtype=torch.float32)) for slot in own(name)} | slots

    def init(params: Params, step: int = 0) -> State:
        last = max(step - 1, 0)
        state, drawn = base.init(inner(params), step), bases(params, last - last % period)
        for key, slots in state.items():
            if (name := bare(key)) in under:
                state[key] = around(name, params[name], drawn[name], slots)
        return state

    def split(params: Params, state: State) -> tuple[Params, Params]:
        trainable, frozen = Params(), Params()
        for name, w in params.items():
            if name not in under:
                (trainable if name in state else frozen)[name] = w
                continue
            stem, zero = name.removesuffix("weight"), w.detach().new_zeros(())
            b = zero.expand(w.shape[0], rank)
            if name not in state:  # frozen by a mask, with its product merged
                frozen |= {name: w, f"{stem}P": zero.expand(w.shape[1], rank), f"{stem}B": b}
                continue
            slots = state[name]
            frozen |= {name: w, f"{stem}P": slots["P"]}
            b = slots["B"].detach() if form == "products" else b
            trainable[f"{stem}B"] = b.requires_grad_()  # always, or evaluation would be compiled apart
        return trainable, frozen

    def due(step: int) -> tuple[str, ...]:
        now = set(base.due(step))
        fresh = {name for name in under if owner[name].rule.refresh} if step % period == 0 else set()
        return tuple(name for name in owner if name in now | fresh)

    def anew(params: Params, state: State, step: int, key: Key) -> tuple[Params, State]:
        """A new P for everything, W += B Pᵀ."""
        params, state, drawn = dict(params), dict(state), bases(params, step)
        for where, old in state.items():
            if (name := bare(where)) not in under:
                continue
            w, p, rule = params[name], drawn[name], base.owner[name].rule
            if form == "products" and where == name:
                seed = torch.tensor(word(key, "merge", name, step), dtype=torch.int32, device=w.device)
                params[name] = add(w, old["B"] @ old["P"].float().T, seed)
            kept = {slot.name: old[slot.name] for slot in rule.slots if slot.given or moments != "reset"}
            if moments == "transform":
                turned = old["P"].float().T @ p.float() * (rank / len(p))
                kept |= {slot: old[slot] @ turned for slot in rule.names(Kind.FIRST)}
            blank = kept if len(kept) == len(rule.slots) else rule.init(inner({name: w})[name]) | kept
            state[where] = around(name, w, p, blank)
        return params, state

    def switch(params: Params, state: State, step: int, key: Key) -> tuple[Params, State]:
        if step % period == 0:
            params, state = anew(params, state, step, key)
        if not base.switches(step):
            return params, state
        params, drawn = dict(params), bases(params, step - step % period)
        held = {
            bare(where): {slot: slots[slot] for slot in own(bare(where))}
            for where, slots in state.items()
            if bare(where) in under
        }
        plain = {k: {n: t for n, t in slots.items() if n not in held.get(bare(k), {})} for k, slots in state.items()}
        _, switched = base.switch(inner(params), plain, step, key)
        for name in [name for name in params if name in under and name in state and name not in switched]:
            if form == "products":
                params |= merge({name: params[name]}, {name: state[name]})
            held[name] |= {slot: torch.zeros_like(held[name][slot]) for slot in ("B",) if slot in held[name]}
        for where, slots in switched.items():
            if (name := bare(where)) in under:
                known = held.get(name)
                switched[where] = known | slots if known else around(name, params[name], drawn[name], slots)
        return params, switched

    parameter_of = {**base.parameter_of, **{f"{name.removesuffix('weight')}B": name for name in under}}
    options = {"form": form, "rank": rank, "period": period, "projection": projection, "moments": moments, "prox": prox}
    options |= {"warmup": warmup} if warmup else {}
    return Optimizer(
        owner,
        init,
        due,
        split=split,
        switches=lambda step: (step > 0 and step % period == 0) or base.switches(step),
        switch=switch,
        parameter_of=parameter_of,
        batch=base.batch,
        metadata={**base.metadata, **{f"rso.{option}": str(value) for option, value in options.items()}},
        merge=(lambda params, state: base.merge(merge(params, state), state)) if form == "products" else base.merge,
    )


def merge(params: Params, state: State) -> Params:
    """The weights of the form "products" as plain ones: W + B Pᵀ, float32 rounded once. "merged" ones are plain."""
    return params | {
        name: add(params[name], slots["B"] @ slots["P"].float().T)
        for name, slots in state.items()
        if "B" in slots and name in params
    }
