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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..apply import add
from ..contract import Kind, Optimizer, Params, Rule, Slots, State, UsageError
from ..random import Key, fold, word
from ..state import parked_by, place, trains, with_status
from ..storage.slots import decoded, encoded
from .subspace import B, P, draw, subspace
from .wrapper import Wrapper

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of a LLaMA: modules that read the same x


@dataclass(frozen=True, eq=False)
class Rso(Wrapper):
    """`base`, with some weights moved in random subspaces; see `rso`, which makes it.

    `subspaces` says of each such weight which P it has: those of the same place share one. `stands` gives the weight
    that a trainable B stands for.
    """

    subspaces: Mapping[str, str]
    stands: Mapping[str, str]
    rank: int
    period: int
    key: Key
    form: str
    projection: str
    moments: str
    blanks: dict[object, Tensor] = field(default_factory=dict, repr=False)  # made once, and seen in every step

    def init(self, params: Params, step: int = 0, shared: State | None = None) -> State:
        last = max(step - 1, 0)
        drawn = self._bases(params, last - last % self.period)
        state = self.base.init(self._inner(params), step, shared)
        return {n: self._around(n, params[n], drawn[n], s) if n in drawn else s for n, s in state.items()}

    def split(self, params: Params, state: State) -> tuple[Params, Params]:
        trainable, frozen = Params(), Params()
        for name, w in params.items():
            if name not in self.subspaces:
                (trainable if trains(state, name) else frozen)[name] = w
                continue
            stem = name.removesuffix("weight")
            if not trains(state, name):  # frozen by a mask, with its product merged
                laid_out = name in self.base.singly  # beside others that train: as they are, or compiled apart
                p = self._blank(w, w.shape[1], laid_out)
                frozen |= {name: w, f"{stem}P": p}
                frozen[f"{stem}B"] = self._blank(w, w.shape[0], laid_out and self.form == "products")
                continue
            slots = state[name]
            frozen |= {name: w, f"{stem}P": slots[P]}
            b = slots[B].detach() if self.form == "products" else self._blank(w, w.shape[0]).detach()
            trainable[f"{stem}B"] = b.requires_grad_()  # always, or evaluation would be compiled apart
        return trainable, frozen

    def parameter_of(self, trained: str) -> str:
        return self.stands.get(trained) or self.base.parameter_of(trained)

    def inward(self, name: str, g: Tensor, slots: Slots) -> Tensor:
        """dB = G P, float32, with 1/eta aside, which the rule adds."""
        g = self.base.inward(name, g, slots)
        return g.float() @ slots["P"].float() if name in self.subspaces else g

    def due(self, step: int, state: State | None = None) -> tuple[str, ...]:
        now = set(self.base.due(step, state))
        if step % self.period == 0:
            now |= {name for name in self.subspaces if self.owner[name].rule.refresh}
        return tuple(name for name in self.owner if name in now)

    def switches(self, step: int) -> bool:
        return (step > 0 and step % self.period == 0) or self.base.switches(step)

    def switch(self, params: Params, state: State, step: int, key: Key) -> tuple[Params, State]:
        if step % self.period == 0:
            params, state = self._renewed(params, state, step, key)
        if not self.base.switches(step):
            return params, state
        params, drawn = dict(params), self._bases(params, step - step % self.period)
        below, held = State(), State()
        for name, slots in state.items():
            own = self._own(name) if name in self.subspaces else ()
            held[name] = {slot: slots[slot] for slot in own}
            below[name] = with_status(parked_by(slots), {slot: t for slot, t in slots.items() if slot not in own})
        _, after = self.base.switch(self._inner(params), below, step, key)
        for name in [n for n in self.subspaces if n in params and trains(state, n) and not trains(after, n)]:
            if self.form == "products":
                params |= merge({name: params[name]}, {name: state[name]})
            held[name] |= {slot: torch.zeros_like(held[name][slot]) for slot in (B,) if slot in held[name]}
        for name in [n for n in after if n in self.subspaces]:
            whole = {**held[name], **after[name]} if name in held else {}
            kept = place(with_status(parked_by(after[name]), whole), params[name].device)
            after[name] = kept if whole else self._around(name, params[name], drawn[name], after[name])
        return params, after

    def merge(self, params: Params, state: State) -> Params:
        return self.base.merge(merge(params, state) if self.form == "products" else params, state)

    def _renewed(self, params: Params, state: State, step: int, key: Key) -> tuple[Params, State]:
        """A new P for everything, W += B Pᵀ."""
        params, state, drawn = dict(params), dict(state), self._bases(params, step)
        for name in [name for name in state if name in self.subspaces]:
            w, p, rule, parked = params[name], drawn[name], self.base.owner[name].rule, parked_by(state[name])
            old = place(with_status({}, state[name]), w.device)
            if self.form == "products" and not parked:
                seed = torch.tensor(word(key, "merge", name, step), dtype=torch.int32, device=w.device)
                params[name] = add(w, old[B] @ old[P].float().T, seed)
            kept = {slot.name: old[slot.name] for slot in rule.slots if slot.given or self.moments != "reset"}
            if self.moments == "transform":
                turned, seen = old[P].float().T @ p.float() * (self.rank / len(p)), decoded(kept)
                moved = {slot: seen[slot] @ turned for slot in seen.keys() & set(rule.names(Kind.FIRST))}
                kept = encoded(seen | moved, seen, kept)
            blank = kept if len(kept) == len(rule.slots) else rule.init(self._inner({name: w})[name]) | kept
            state[name] = self._around(name, w, p, with_status(parked, blank))
        return params, state

    def _bases(self, params: Params, step: int) -> Params:
        """The P of each weight here, as drawn at `step`."""
        drawn: Params = {}
        for name in (name for name in params if name in self.subspaces):
            where = self.subspaces[name]
            if where not in drawn:
                w, own = params[name], fold(self.key, where, step)
                drawn[where] = draw(self.projection, own, w.shape[1], self.rank, w.device).to(w.dtype)
        return {name: drawn[self.subspaces[name]] for name in params if name in self.subspaces}

    def _inner(self, params: Params) -> Params:
        """What `base` sees: a B, without values, in the place of each weight."""
        seen = dict(params)
        for name in params.keys() & self.subspaces.keys():
            w = params[name]
            seen[name] = w.new_zeros((), dtype=torch.float32).expand(w.shape[0], self.rank)
        return seen

    def _blank(self, w: Tensor, rows: int, laid_out: bool = False) -> Tensor:
        """Zeros (rows, r) that stand where nothing is read; those that are not `laid_out` are one number."""
        kind = rows, laid_out, w.dtype, w.device, type(w)
        if kind not in self.blanks:
            zero = w.detach().new_zeros(()).expand(rows, self.rank)
            self.blanks[kind] = zero.contiguous() if laid_out else zero
        return self.blanks[kind]

    def _own(self, name: str) -> tuple[str, ...]:
        """The slots that are not those of `base`."""
        return tuple(s.name for s in self.owner[name].rule.slots if s not in self.base.owner[name].rule.slots)

    def _around(self, name: str, w: Tensor, p: Tensor, slots: Slots) -> Slots:
        """Slots of `base` for a B, with a P that is new, and B = 0."""
        sizes = {P: p, B: w.new_zeros(w.shape[0], self.rank, dtype=torch.float32)}
        made = {slot: sizes.get(slot, w.new_zeros((), dtype=torch.float32)) for slot in self._own(name)} | slots
        return place(with_status(parked_by(slots), made), w.device)


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
) -> Rso:
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
    owner, shared = dict(base.owner), dict[str, str]()
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
        if group.rule.names(Kind.BITS):
            raise UsageError(
                f"{name}: rso moves a B, and last bits (precision bf16+8) are of weights; train it in bf16-sr, or "
                "leave this name out"
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
        shared[name] = f"{parent}.{'+'.join(next((own for own in share if leaf in own), (leaf,)))}"
        if inputs.setdefault(shared[name], w.shape[1]) != w.shape[1]:
            raise UsageError(
                f"rso: {name} cannot share {shared[name]}'s P, its input has another size; do not share it"
            )

    own = {"form": form, "rank": rank, "period": period, "projection": projection, "moments": moments, "prox": prox}
    own |= {"warmup": warmup} if warmup else {}
    return Rso(
        base,
        owner,
        {**base.metadata, **{f"rso.{option}": str(value) for option, value in own.items()}},
        shared,
        {f"{name.removesuffix('weight')}B": name for name in under},
        rank,
        period,
        key,
        form,
        projection,
        moments,
    )


def merge(params: Params, state: State) -> Params:
    """The weights of the form "products" as plain ones: W + B Pᵀ, float32 rounded once. "merged" ones are plain."""
    return params | {
        name: add(params[name], slots[B] @ slots[P].float().T)
        for name, slots in state.items()
        if "B" in slots and name in params and trains(state, name)
    }
