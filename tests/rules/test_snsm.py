"""Subset-Norm and Subspace-Momentum: the authors' trajectories, a float64 replay, reductions, projections, bytes."""

import json
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.close import assert_follows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.memory import counted_peak
from engine.step.compile import compiled
from engine.step.kernel import make_kernel
from optimizers import linalg
from optimizers.apply import add, refresh
from optimizers.clock import clock
from optimizers.contract import Group, Rule, Slots, UsageError, state_bytes
from optimizers.linalg import projections
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.snsm import (
    adagrad_sn,
    adagrad_snsm,
    adam_sm,
    adam_sn,
    adam_snsm,
    grouped,
    rmsprop_sn,
    sgd_sm,
    snsm,
    sums,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "snsm"
KINDS = projections.KINDS
DENSE = ("auto", "svd", "range", "random")
SHAPES = [(8, 12), (12, 8), (16, 16), (5, 3)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hyper(lr: float, weight_decay: float = 0.0) -> dict[str, Tensor]:
    return {"lr": torch.tensor(lr), "weight_decay": torch.tensor(weight_decay)}


def decaying(m: int, n: int, power: float = 1.0, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall like i^-power."""
    u, _, vh = torch.linalg.svd(randn(m, n, seed=seed), full_matrices=False)
    return u @ torch.diag(torch.arange(1, min(m, n) + 1) ** -power) @ vh


# the authors' runs -------------------------------------------------------------------------------------------------


def released(meta: dict) -> tuple[Rule, Rule]:
    """(rule of the matrices, rule of the rest) of a recorded run of the authors' first release."""
    common = dict(betas=(meta["beta1"], meta["beta2"]), eps=meta["eps"], correct_bias=meta["correct_bias"])
    numerator = {"ema": "ema", "sm": "subspace", "none": "gradient"}[meta.get("momentum_type", "ema")]
    second = {"ema": "coordinate", "sn": "subset", "none": "none"}[meta.get("second_moment_type", "sn")]
    rest = snsm(
        numerator="gradient" if numerator == "gradient" else "ema",
        second="none" if second == "none" else "coordinate",
        **common,
    )
    subset = meta["subset_size"] if isinstance(meta["subset_size"], int) else "heuristic"
    if numerator == "subspace":
        kept = "keep" if meta["extra"].get("overlap_state") else "reset"
        common |= dict(rank=meta["rank"], update_proj_gap=meta["update_proj_gap"], proj_type=meta["proj_type"])
        common |= dict(compat="sn-sm", moments=kept)
    return snsm(numerator=numerator, second=second, subset=subset, **common), rest


@pytest.mark.parametrize("name", sorted(f.stem for f in GOLDEN.glob("*.npz") if f.stem != "problem"))
def test_the_authors_trajectory(name):
    problem, run = (np.load(GOLDEN / f"{n}.npz") for n in ("problem", name))
    meta = json.loads(str(run["meta_json"]))
    params = {n: torch.from_numpy(problem[f"p0__{n}"]) for n in meta["shapes"]}
    main, rest = released(meta)
    groups = [Group("matrices", main, (r"^W",), 0.0), Group("rest", rest, (r"^E", r"^b"), 0.0)]
    optimizer = partition(params, groups, staggered=False)
    state, way = optimizer.init(params), {n: np.zeros(p.shape) for n, p in params.items()}
    for t in range(meta["steps"]):
        grads = {n: torch.from_numpy(problem[f"g__{n}"][t]) for n in params}
        due = optimizer.due(t)
        state, oks = refresh(optimizer, grads, state, t, Key(0))
        assert all(oks)
        for n in params:
            if f"idx__{n}" in run:
                state[n] = state[n] | {"index": torch.from_numpy(run[f"idx__{n}"][t])}
            elif f"basis__{n}" in run:
                state[n] = state[n] | {"basis": recorded(state[n]["basis"], run[f"basis__{n}"][t], params[n])}
        used = hyper(float(run["lr"][t]), meta.get("weight_decay", 0.0))
        params, state = optimizer.update(grads, state, params, {"matrices": used, "rest": used})
        for n, p in params.items():
            theirs = run[f"p__{n}"][t]
            way[n] += np.abs(theirs - (run[f"p__{n}"][t - 1] if t else problem[f"p0__{n}"]))
            assert_follows(p, theirs, way[n], atol=5e-6, said=f"{n} at step {t + 1} (bases due: {due})")


def recorded(ours: Tensor, theirs: np.ndarray, p: Tensor) -> Tensor:
    """Their basis, kept as (r, n) where m >= n. Ours has the same columns but for signs, up to how well a float32 SVD
    of another CPU determines them; where it is used, that error would be multiplied by 1 / sqrt(v)."""
    other = torch.from_numpy(theirs)
    other = (other.mT if linalg.tall(p) else other).contiguous()
    assert torch.allclose(ours * (ours * other).sum(0).sign(), other, atol=1e-4)
    return other


# a replay of the specification in float64 ---------------------------------------------------------------------------


def dense(slots: Slots, p: Tensor) -> tuple[np.ndarray, bool]:
    """(P as a matrix with orthonormal rows, whether it acts on the columns of p), built apart from the code."""
    m, n = p.shape
    if "basis" in slots:
        return slots["basis"].double().numpy().T, m >= n
    index = slots["index"].numpy()
    if "signs" not in slots:
        return np.eye(max(m, n))[index], m < n
    h = np.ones((1, 1))
    while len(h) < min(m, n):
        h = np.block([[h, h], [h, -h]]) / np.sqrt(2)
    return h[index] * slots["signs"].numpy(), m >= n


def subset_sums(g: np.ndarray, subset: int | str) -> np.ndarray:
    """||G_Psi||^2 at every entry."""
    if subset == "heuristic":
        return np.broadcast_to((g**2).sum(1 if g.shape[0] >= g.shape[1] else 0, keepdims=True), g.shape)
    bound = np.sqrt(g.size) if subset == "sqrt" else subset if subset > 0 else np.sqrt(g.size) / -subset
    k = max(d for d in range(1, g.size + 1) if g.size % d == 0 and d <= max(1, bound))
    return np.repeat((g.reshape(-1, k) ** 2).sum(1), k).reshape(g.shape)


class Replay:
    """Section by section what the paper's template does to one matrix."""

    def __init__(self, p, *, b1, b2, eps, bias, complement, second, subset, moments, stale):
        self.p, self.t, self.v, self.m = p.double().numpy().copy(), 0, 0.0, None
        self.b1, self.b2, self.eps, self.bias, self.complement = b1, b2, eps, bias, complement
        self.second, self.subset, self.moments, self.stale = second, subset, moments, stale
        self.projection = None

    def step(self, g, slots, p, due, lr, wd):
        g = g.double().numpy()
        self.t += 1
        c1, c2 = 1 - self.b1**self.t, 1 - self.b2**self.t
        gain, s = 1.0, lr
        if self.bias:
            s = lr * np.sqrt(c2) / c1
            if not self.complement:
                gain, s = 1 / c1, lr * np.sqrt(c2)
        matrix, columns = dense(slots, p)
        down = (lambda x: x @ matrix.T) if columns else (lambda x: matrix @ x)
        up = (lambda c: c @ matrix) if columns else (lambda c: matrix.T @ c)
        c = down(g)
        old = np.zeros_like(c) if self.m is None else self.m
        if due and self.t > 1:
            if self.moments == "rotate":
                before = self.projection
                old = down(old @ before if columns else before.T @ old)
            elif self.moments == "reset" and not self.stale:
                old = np.zeros_like(c)
        used = self.b1 * old + (1 - self.b1) * c
        self.m = np.zeros_like(c) if due and self.t > 1 and self.stale and self.moments == "reset" else used
        self.projection = matrix
        u = gain * up(used) + g - up(c)
        if self.second != "none":
            w = g**2 if self.second == "coordinate" else subset_sums(g, self.subset)
            self.v = self.v + w if self.b2 == 1 else self.b2 * self.v + (1 - self.b2) * w
            u = u / (np.sqrt(self.v) + self.eps)
        self.p = (1 - lr * wd) * (self.p - s * u)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_picked_slices_stand_in_the_authors_order(shape, moments):
    """Their first release keeps slices in order of their norm, and uses coordinates of the old ones by position: once,
    or for good with `overlap_state`."""
    rank, gap, lr, (b1, b2) = 3, 4, 0.01, (0.9, 0.999)
    rule = snsm(rank, gap, proj_type="topk", compat="sn-sm", moments=moments)
    p, tall = randn(*shape), shape[0] >= shape[1]
    w, m, v, index = p.double().numpy().copy(), np.zeros((rank, min(shape))), np.zeros(max(shape)), None
    optimizer = partition({"w": p}, [Group("all", rule, ("",), lr)], staggered=False)
    params, state = {"w": p}, optimizer.init({"w": p})
    for t in range(1, 13):
        g = randn(*shape, seed=t)
        state, _ = refresh(optimizer, {"w": g}, state, t - 1, Key(0))
        params, state = optimizer.update({"w": g}, state, params, {"all": hyper(lr)})
        d = g.double().numpy() if tall else g.double().numpy().T  # slices are rows
        fresh = t == 1 or t % gap == 0
        if fresh:
            index = np.argsort(-np.linalg.norm(d, axis=1))[:rank]
        used = b1 * m + (1 - b1) * d[index]
        m = np.zeros_like(m) if fresh and t > 1 and moments == "reset" else used
        u = d.copy()
        u[index] = used
        v = b2 * v + (1 - b2) * (d**2).sum(1)
        u = u / (np.sqrt(v)[:, None] + 1e-6) * np.sqrt(1 - b2**t) / (1 - b1**t)
        w = w - lr * (u if tall else u.T)
        np.testing.assert_allclose(params["w"].numpy(), w, rtol=0, atol=2e-6, err_msg=f"step {t}")


DEFAULTS = dict(b1=0.9, b2=0.999, eps=1e-6, bias=True, complement=True, second="subset", subset="heuristic")
CASES = {
    **{f"{kind}": dict(kind=kind) for kind in KINDS},
    **{f"{kind}, {moments}": dict(kind=kind, moments=moments) for kind in KINDS for moments in ("keep", "rotate")},
    **{f"{kind}, first release": dict(kind=kind, compat="sn-sm") for kind in ("svd", "srht", "topk")},
    "first release, overlap": dict(kind="svd", compat="sn-sm", moments="keep"),
    "gap 1": dict(kind="svd", gap=1),
    "gap 1, first release": dict(kind="svd", gap=1, compat="sn-sm"),
    "gap 100, decay": dict(kind="svd", gap=100, wd=0.1),
    "complement uncorrected": dict(kind="svd", complement=False),
    "complement uncorrected, topk": dict(kind="topk", complement=False, moments="rotate"),
    "no bias correction": dict(kind="svd", bias=False, eps=1e-3),
    "AdaGrad": dict(kind="svd", b2=1.0, bias=False, lr=0.05),
    "SGD": dict(kind="uniform", b2=0.0, bias=False, second="none", wd=0.1),
    "coordinate": dict(kind="svd", second="coordinate"),
    **{f"subset {k}": dict(kind="svd", subset=k) for k in ("sqrt", -1, -2, -3, 1, 10, 10**6)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_replay_in_float64(case):
    options = DEFAULTS | dict(gap=4, moments="reset", compat="", wd=0.0, lr=0.01) | CASES[case]
    rule = snsm(
        3,
        options["gap"],
        second=options["second"],
        subset=options["subset"],
        proj_type=options["kind"],
        betas=(options["b1"], options["b2"]),
        eps=options["eps"],
        correct_bias=options["bias"],
        correct_complement=options["complement"],
        moments=options["moments"],
        compat=options["compat"],
    )
    shapes = [(8, 12), (12, 8), (16, 16)] + [(5, 3)] * (options["kind"] != "srht")
    params = {f"w{i}": randn(*s, seed=i) for i, s in enumerate(shapes)}
    optimizer = partition(params, [Group("all", rule, ("",), 0.0)], staggered=False)
    state, names = optimizer.init(params), DEFAULTS.keys()
    replays = {
        n: Replay(
            p,
            **{k: options[k] for k in names},
            moments=options["moments"],
            stale=options["compat"] == "sn-sm",
        )
        for n, p in params.items()
    }
    schedule, way = [], {n: np.zeros(p.shape) for n, p in params.items()}
    for t in range(12):
        grads = {n: decaying(*p.shape, seed=100 * t + i) for i, (n, p) in enumerate(params.items())}
        due = optimizer.due(t)
        schedule += [t] * bool(due)
        state, _ = refresh(optimizer, grads, state, t, Key(1))
        for n, replay in replays.items():
            before = replay.p
            replay.step(grads[n], state[n], params[n], n in due, options["lr"], options["wd"])
            way[n] += np.abs(replay.p - before)
        params, state = optimizer.update(grads, state, params, {"all": hyper(options["lr"], options["wd"])})
        for n, replay in replays.items():
            assert_follows(params[n], replay.p, way[n], said=f"{n} at step {t}")
    gap = options["gap"]
    assert schedule == [t for t in range(12) if t == 0 or (t + bool(options["compat"])) % gap == 0]


# what it reduces to -------------------------------------------------------------------------------------------------


def train(rule: Rule, p: Tensor, steps: int = 10, lr: float = 0.01, wd: float = 0.0) -> Tensor:
    slots = rule.init(p)
    for t in range(steps):
        g = randn(*p.shape, seed=50 + t)
        if rule.refresh and t % rule.gap == 0:
            slots, _ = rule.refresh(g, slots, Key(t))
        delta, slots = rule.update(g, slots, p, hyper(lr, wd))
        p = add(p, delta)
    return p


@pytest.mark.parametrize("shape", [*SHAPES, (7,), (2, 3, 4)])
def test_subsets_of_one_entry_are_adam(shape):
    p = randn(*shape)
    one = train(adam_sn(subset=1), p, wd=0.1)
    assert torch.equal(one, train(snsm(numerator="ema", second="coordinate"), p, wd=0.1))


def test_subsets_of_one_entry_are_torch_adamw_where_eps_does_not_matter():
    p = randn(8, 12)
    q = p.clone().requires_grad_()
    library = torch.optim.AdamW([q], lr=0.01, eps=1e-30, weight_decay=0)
    for t in range(10):
        q.grad = randn(8, 12, seed=50 + t)
        library.step()
    assert torch.allclose(train(adam_sn(subset=1, eps=1e-30), p), q, rtol=0, atol=5e-7)


SQUARE = ("topk", "uniform")  # slices of the longer side are bounded by the shorter one


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(k, s) for k in KINDS for s in [(6, 6), (8, 8), (12, 8), (5, 9)] if k not in SQUARE or s[0] == s[1]],
)
def test_the_whole_space_is_plain_momentum(kind, shape):
    p = randn(*shape)
    full = train(snsm(min(shape), 4, proj_type=kind, moments="rotate"), p)
    assert torch.allclose(full, train(adam_sn(), p), rtol=0, atol=5e-6)


def test_names_have_the_papers_settings():
    p = randn(8, 12)
    slots = {make.name: set(make(**r).init(p)) - set(clock(p)) for make, r in NAMES.items()}
    momentum, size, basis = {"exp_avg"}, {"exp_avg_sq"}, {"basis"}
    assert slots == {
        "adam_sn": momentum | size,
        "adagrad_sn": momentum | size,
        "rmsprop_sn": size,
        "adam_snsm": momentum | size | basis,
        "adagrad_snsm": momentum | size | basis,
        "sgd_sm": momentum | basis,
        "adam_sm": momentum | size | basis,
    }
    assert adam_sm(rank=3).init(p)["exp_avg_sq"].shape == p.shape
    recommended = snsm().init(p)
    assert recommended["exp_avg"].shape == (2, 12), "a quarter of the shorter side"
    assert recommended["exp_avg_sq"].shape == (1, 12)


NAMES = {adam_sn: {}, adagrad_sn: {}, rmsprop_sn: {}} | {
    make: {"rank": 3} for make in (adam_snsm, adagrad_snsm, sgd_sm, adam_sm)
}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(numerator="momentum"), "numerator .* got 'momentum'"),
        (dict(second="full"), "second .* got 'full'"),
        (dict(subset="rows"), "subset .* got 'rows'"),
        (dict(subset=0), "size 0"),
        (dict(proj_type="gaussian"), "proj_type .* got 'gaussian'"),
        (dict(moments="drop"), "moments .* got 'drop'"),
        (dict(compat="v1"), "compat .* got 'v1'"),
        (dict(betas=(0.9, 1.0)), "correct_bias=False"),
        (dict(update_proj_gap=0), "update_proj_gap .* got 0"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(UsageError, match=named):
        snsm(**options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_subspace_needs_a_matrix_and_a_rank_that_fits(kind):
    for shape, rank in (((8, 3), 4), ((3, 8), 4), ((8, 8), 0), ((8,), 1), ((), 1)):
        with pytest.raises(UsageError, match="rank must lie|needs a matrix"):
            snsm(rank, proj_type=kind).init(torch.zeros(shape))


# subsets ------------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 12), max_size=4).map(tuple)
subsets = st.one_of(st.sampled_from(["heuristic", "sqrt", "coordinate"]), st.integers(1, 60), st.integers(-9, -1))


@given(shapes, subsets)
def test_subsets_partition_the_entries_of_any_tensor(shape, subset):
    g = randn(*shape) + 0.1
    w = sums(g, subset)
    torch.testing.assert_close(w.sum(), g.square().sum())
    view = grouped(g, subset)
    assert torch.broadcast_shapes(w.shape, view.shape) == view.shape, "it must divide the numerator as it is"
    if subset == "coordinate" or (subset == "heuristic" and len(shape) < 2):
        assert w.shape == g.shape
    elif subset == "heuristic":
        assert w.numel() * min(shape[-2:]) == g.numel()
    else:
        bound = g.numel() ** 0.5 if subset == "sqrt" else subset if subset > 0 else g.numel() ** 0.5 / -subset
        k = g.numel() // w.numel()
        assert k == max(d for d in range(1, g.numel() + 1) if g.numel() % d == 0 and d <= max(1, bound))


@given(shapes, subsets.filter(lambda s: s != "coordinate"), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=50)
def test_any_tensor_can_be_moved(shape, subset, dtype):
    p = randn(*shape).to(dtype)
    rule = adam_sn(subset=subset)
    delta, slots = rule.update(p, rule.init(p), p, hyper(0.01, 0.1))
    assert delta.shape == p.shape and delta.dtype == torch.float32 and delta.isfinite().all()
    assert all(s.dtype in (torch.float32, torch.float64) and s.is_contiguous() for s in slots.values())
    assert (delta.sign() == -p.sign()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_matrices_moves_as_its_matrices_do(kind):
    """Expert stacks: leading dimensions are a batch, for the subsets and for the projections."""
    stack = torch.stack([decaying(9, 6, seed=i) for i in range(3)]).to(torch.bfloat16)
    rule = snsm(2, proj_type=kind)
    slots, ok = rule.refresh(stack, rule.init(stack), Key(5))
    assert ok
    delta, new = rule.update(stack, slots, stack, hyper(0.01))
    assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in slots.items()}
    for i in range(3):
        one = {k: v if v.ndim < 2 else v[i] for k, v in slots.items()}
        torch.testing.assert_close(rule.update(stack[i], one, stack[i], hyper(0.01))[0], delta[i])


@pytest.mark.parametrize("kind", KINDS)
def test_an_idle_expert_does_not_stop_a_refresh(kind):
    """A stack in which one matrix got no token, hence no gradient."""
    stack = torch.stack([decaying(140, 150), torch.zeros(140, 150)])
    slots, ok = snsm(4, proj_type=kind).refresh(stack, snsm(4, proj_type=kind).init(stack), Key(5))
    assert ok and all(s.isfinite().all() for s in slots.values())
    if "basis" in slots:
        assert torch.allclose(slots["basis"][0].mT @ slots["basis"][0], torch.eye(4), atol=1e-5)
        waits = kind != "random"  # that one has the same for both
        assert linalg.missing(slots["basis"]).flatten().tolist() == [False, waits]


# projections --------------------------------------------------------------------------------------------------------


def drawn(kind: str, g: Tensor, rank: int, seed: int = 0) -> Slots:
    q, ok = projections.draw(kind, g, rank, Key(seed))
    assert ok and all(x.is_contiguous() for x in q.values())
    return q


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8, 8), (40, 24), (24, 40), (7, 11), (192, 160), (2, 9, 6)])
def test_projections_are_orthogonal(kind, shape):
    g, c = randn(*shape), None
    q = drawn(kind, g, 5)
    assert {k: (v.shape, v.dtype) for k, v in q.items()} == {
        k: (v.shape, v.dtype) for k, v in projections.blank(kind, g, 5).items()
    }
    c = randn(*projections.down(g, q).shape, seed=1)
    torch.testing.assert_close(projections.down(projections.up(c, q, g), q), c, rtol=0, atol=1e-5)
    inner = (projections.down(g, q) * c).sum()
    torch.testing.assert_close(inner, (g * projections.up(c, q, g)).sum(), rtol=1e-4, atol=1e-4)
    if "basis" in q:
        eye = q["basis"].mT @ q["basis"]
        torch.testing.assert_close(eye, torch.eye(5).expand_as(eye), rtol=0, atol=1e-5)
    assert projections.down(g, q).shape[projections.compressed(kind, g)] == 5


@pytest.mark.parametrize("kind", ["random", "srht", "uniform"])
@pytest.mark.parametrize("shape", [(16, 32), (40, 24), (12, 12)])
def test_random_projections_hold_their_share_of_energy(kind, shape):
    """r / m on average, also of a matrix with all its energy in one entry."""
    spike = torch.zeros(shape)
    spike[1, 2] = 1
    for g in (randn(*shape), decaying(*shape), spike):
        shares = [(projections.down(g, drawn(kind, g, 6, s)).square().sum() / g.square().sum()) for s in range(400)]
        side = shape[0] if projections.compressed(kind, g) == -2 else shape[1]
        error = torch.stack(shares).std() / 20
        assert abs(torch.stack(shares).mean() - 6 / side) < 4 * error + 1e-6


def test_draws_depend_on_the_key_alone():
    for kind in ("random", "srht", "uniform", "range"):
        g = decaying(200, 144)
        a, b, c = (drawn(kind, g, 4, seed) for seed in (1, 1, 2))
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_topk_takes_the_largest_slices(shape):
    g = randn(*shape)
    norms = (g.numpy() ** 2).sum(1 if shape[0] >= shape[1] else 0)
    assert drawn("topk", g, 3)["index"].tolist() == np.argsort(-norms)[:3].tolist(), "largest first"


@pytest.mark.parametrize("shape", [(160, 130), (130, 300), (512, 256), (3, 140, 132)])
@pytest.mark.parametrize("rank", [8, 33, 100])
def test_the_range_finder_captures_what_the_exact_basis_does(shape, rank):
    g = torch.stack([decaying(*shape[-2:], power=0.7, seed=i) for i in range(3)])[: shape[0] if len(shape) > 2 else 1]
    g = g.reshape(shape)
    exact, found = (linalg.project(g, q).square().sum() for q in (
        linalg.svd_basis(g, rank), linalg.range_basis(g, rank, Key(1))
    ))  # fmt: skip
    assert found > 0.99 * exact
    assert torch.equal(drawn("auto", g, rank)["basis"], linalg.range_basis(g, rank, Key(0))), "g is large"


def test_passes_over_g_and_its_gram_matrix_find_the_same():
    g = decaying(300, 200)
    assert torch.allclose(linalg.gram(g), g.mT @ g, atol=1e-6)
    shares = [
        (
            linalg.project(g, linalg.range_basis(g, rank, Key(1))).square().sum()
            / linalg.project(g, linalg.svd_basis(g, rank)).square().sum()
        )
        for rank in (4, 60)
    ]
    assert all(share > 0.99 for share in shares), "4 directions are found by passes, 60 in the Gram matrix"


def test_scale_does_not_matter_to_the_range_finder():
    g = decaying(200, 150)
    for scale in (1e-12, 1e8):
        q = linalg.range_basis(g * scale, 20, Key(1))
        assert torch.allclose(q.mT @ q, torch.eye(20), atol=1e-5)
        assert linalg.project(g, q).square().sum() > 0.99 * linalg.project(g, linalg.svd_basis(g, 20)).square().sum()


@given(st.integers(1, 300))
@settings(max_examples=40)
def test_the_transform_is_flat_orthogonal_and_its_own_inverse(n):
    eye = torch.eye(n)
    h = linalg.transform(eye, -1)
    torch.testing.assert_close(h @ h.mT, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(linalg.transform(h, -1), eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(linalg.transform(eye, -2), h, rtol=0, atol=1e-5)
    assert h.abs().max() < 2.001 / n**0.5
    if n & (n - 1) == 0:
        assert torch.equal(h.abs(), torch.full((n, n), 1.0).div(n**0.5)) or h.abs().sub(n**-0.5).abs().max() < 1e-6


@given(st.integers(1, 5000), st.integers(-3, 6000))
def test_the_largest_divisor(n, bound):
    assert linalg.largest_divisor(n, bound) == max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, bound))


# refresh ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (150, 140)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_a_useless_gradient_changes_nothing_at_a_refresh(kind, shape, bad):
    for moments, compat in (("reset", ""), ("rotate", ""), ("keep", ""), ("reset", "sn-sm")):
        rule = snsm(3, proj_type=kind, moments=moments, compat=compat)
        p, g = randn(*shape), decaying(*shape)
        slots, _ = rule.refresh(g, rule.init(p), Key(1))
        _, slots = rule.update(g, slots, p, hyper(0.1))
        poisoned = g.clone()
        poisoned[2, 3] = bad
        kept, ok = rule.refresh(poisoned if bad else torch.zeros_like(g), slots, Key(2))
        assert not ok
        assert all(torch.equal(kept[k], slots[k]) for k in slots) and kept.keys() == slots.keys()
        after, ok = rule.refresh(g, kept, Key(3))
        assert ok and all(v.isfinite().all() for v in after.values())


def test_a_refresh_clears_keeps_or_carries_the_momentum():
    g, h = decaying(9, 6, seed=1), decaying(9, 6, seed=2)
    after = {}
    for moments, compat in (("reset", ""), ("keep", ""), ("rotate", ""), ("reset", "sn-sm")):
        rule = snsm(3, proj_type="svd", moments=moments, compat=compat)
        slots, _ = rule.refresh(g, rule.init(g), Key(1))
        _, before = rule.update(g, slots, g, hyper(0.1))
        after[moments + compat], _ = rule.refresh(h, before, Key(2))
    assert not after["reset"]["exp_avg"].any()
    assert torch.equal(after["keep"]["exp_avg"], before["exp_avg"])
    r = after["rotate"]["basis"].mT @ before["basis"]
    torch.testing.assert_close(after["rotate"]["exp_avg"], before["exp_avg"] @ r.mT)
    stale = after["resetsn-sm"]
    assert torch.equal(stale["exp_avg"], before["exp_avg"]), "used once more"
    _, used = rule.update(h, stale, g, hyper(0.1))
    assert not used["exp_avg"].any()
    _, used = rule.update(h, used, g, hyper(0.1))
    assert used["exp_avg"].any()


# bytes --------------------------------------------------------------------------------------------------------------

MODELS = {  # hidden, intermediate, layers; vocabulary 32000, untied, no biases
    "60M": (512, 1376, 8),
    "130M": (768, 2048, 12),
    "350M": (1024, 2736, 24),
    "1B": (2048, 5461, 24),
    "3B": (2560, 6848, 32),
    "7B": (4096, 11008, 32),
}
RANKS = {"60M": 128, "130M": 256, "350M": 256, "1B": 512, "7B": 1024}
GIB = {  # of bf16, as the specification prints or computes them
    "adam_sn": dict(zip(MODELS, (0.139, 0.296, 0.747, 2.618, 5.158, 12.799), strict=True)),
    "rmsprop_sn": dict(zip(MODELS, (0.031, 0.046, 0.062, 0.123, 0.155, 0.248), strict=True)),
    "svd": dict(zip(RANKS, (0.088, 0.191, 0.361, 1.169, 5.327), strict=True)),
    "topk": dict(zip(RANKS, (0.068, 0.123, 0.205, 0.576, 2.250), strict=True)),
}


@cache
def inventory(model: str) -> tuple[list[tuple[int, int]], int]:
    """(shapes of the Linear weights, elements of everything else)."""
    d, f, layers = MODELS[model]
    block = [(d, d)] * 4 + [(f, d)] * 2 + [(d, f)]
    return block * layers + [(32000, d)], 32000 * d + (2 * layers + 1) * d


def held(rule: Rule, model: str) -> int:
    """State bytes of the Linear weights under `rule`, without the scalars of `clock`."""
    total = 0
    for shape in inventory(model)[0]:
        p = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        slots = rule.init(p)
        assert all(s.device.type == "meta" for s in slots.values())
        total += state_bytes(slots) - state_bytes(clock(p))
    return total


@pytest.mark.parametrize("model", MODELS)
def test_state_bytes_equal_the_formulas(model):
    linear, rest = inventory(model)
    elements = sum(m * n for m, n in linear)
    longer, shorter = sum(max(s) for s in linear), sum(min(s) for s in linear)
    counts = {"adam_sn": (held(adam_sn(), model), elements + longer, rest)}
    counts["rmsprop_sn"] = held(rmsprop_sn(), model), longer, 0
    for name in ("adam_sn", "rmsprop_sn"):
        got, formula, other = counts[name]
        assert got == 4 * formula
        assert abs(2 * (formula + other + rest) / 2**30 - GIB[name][model]) < 6e-4
    if model in RANKS:
        r, count = RANKS[model], len(linear)
        both = r * (longer + shorter)
        for kind in DENSE:
            assert held(snsm(r, proj_type=kind), model) == 4 * (both + longer)
        for kind in ("topk", "uniform"):
            assert held(snsm(r, proj_type=kind), model) == 4 * (r * shorter + longer) + 8 * r * count
        assert held(snsm(r, proj_type="srht"), model) == 4 * (r + 1) * longer + 8 * r * count + shorter
        assert held(adam_sm(r), model) == 4 * (both + elements)
        assert held(sgd_sm(r), model) == 4 * both
        assert held(adagrad_snsm(r), model) == held(adam_snsm(r), model) == 4 * (both + longer)
        assert abs(2 * (both + longer + 2 * rest) / 2**30 - GIB["svd"][model]) < 6e-4
        assert abs(2 * (r * shorter + longer + 2 * rest) / 2**30 - GIB["topk"][model]) < 6e-4
    assert held(adam_sn(subset=-2), model) == pytest.approx(held(adam_sn(), model), rel=1e-3)


# compiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.compiles
def test_compiled_kernels_do_as_eager_ones():
    """One graph with every kind of projection, subsets that straddle rows, and the first release's refresh."""
    cases = [(snsm(4, proj_type=kind), (12, 16)) for kind in ("svd", "topk", "srht")]
    cases += [(snsm(4, proj_type="uniform", subset=-2), (18, 16)), (adam_snsm(4, compat="sn-sm"), (18, 16))]
    cases += [(snsm(4, proj_type="srht", correct_complement=False), (18, 12)), (snsm(2, proj_type="topk"), (2, 9, 6))]
    rules = [rule for rule, _ in cases]
    results = []
    for make in (compiled, lambda kernel: kernel):
        kernel = make(make_kernel(rules))
        params = [
            randn(*shape, seed=i).to(torch.bfloat16 if i == 1 else torch.float32) for i, (_, shape) in enumerate(cases)
        ]
        slots = [rule.init(p) for rule, p in zip(rules, params, strict=True)]
        for t in range(3):
            grads = [randn(*p.shape, seed=10 * t + i) for i, p in enumerate(params)]
            if t != 1:
                for i, rule in enumerate(rules):
                    for k, v in rule.refresh(grads[i], slots[i], Key(t))[0].items():
                        slots[i][k] = v
            kernel(grads, slots, params, [hyper(0.01 / (1 + t), 0.1)] * len(rules), torch.tensor(1.0), None)
        results.append((params, slots))
    for (rule, shape), a, b, s, r in zip(cases, *(x for pair in zip(*results, strict=True) for x in pair), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=(rule.name, shape): f"{n}: {m}")
        for k in s:
            torch.testing.assert_close(s[k], r[k], rtol=1e-5, atol=1e-6)


@pytest.mark.compiles
def test_slices_need_no_buffer_of_full_size():
    """Rows and columns alike: not the zero-filled scatters of the authors' code."""
    rule = snsm(8, proj_type="topk")
    params = [randn(512, 256), randn(256, 512)]
    slots = [rule.init(p) for p in params]
    kernel = compiled(make_kernel([rule] * 2))
    run = partial(kernel, params, slots, params, [hyper(0.0)] * 2, torch.tensor(1.0), None)
    run()
    assert counted_peak(run) < params[0].numel() * 4 / 8
