"""Subset-Norm and Subspace-Momentum: the authors' trajectories, a float64 replay, what they reduce to, options."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.close import assert_follows
from helpers.grids import few
from helpers.matrices import decaying, hyper, randn
from reference.snsm import Picked, Snsm
from torch import Tensor

from optimizers import linalg
from optimizers.apply import add, refresh, update
from optimizers.clock import clock
from optimizers.contract import Group, Rule, Slots, UsageError
from optimizers.linalg import projections
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.snsm import (
    adagrad_sn,
    adagrad_snsm,
    adam_sm,
    adam_sn,
    adam_snsm,
    rmsprop_sn,
    sgd_sm,
    snsm,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "snsm"
KINDS = projections.KINDS
SHAPES = [(8, 12), (12, 8), (16, 16), (5, 3)]


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


RECORDED = sorted(f.stem for f in GOLDEN.glob("*.npz") if f.stem != "problem")
REPLAYED = ("adamsn_heur_wd0.1", "adamsnsm_svd_r3_g4_heur_overlap", "adamsnsm_uniform_r3_g4_heur", "rmspropsn_heur")
REPLAYED += ("adagradsn_heur_b0.9", "sgdsm_svd_r3_g4", "standalone_adamw_sng_wd0.1", "adam_ema")


@pytest.mark.parametrize("name", few(RECORDED, *REPLAYED))
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
        params, state = update(optimizer, grads, state, params, {"matrices": used, "rest": used})
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


def kept(slots: Slots) -> dict[str, np.ndarray]:
    return {name: t.numpy() for name, t in slots.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_picked_slices_stand_in_the_authors_order(shape, moments):
    rule, lr, p = snsm(3, 4, proj_type="topk", compat="sn-sm", moments=moments), 0.01, randn(*shape)
    replay = Picked(p.numpy(), 3, 4, overlap=moments == "keep")
    optimizer = partition({"w": p}, [Group("all", rule, ("",), lr)], staggered=False)
    params, state = {"w": p}, optimizer.init({"w": p})
    for t in range(1, 13):
        g = randn(*shape, seed=t)
        state, _ = refresh(optimizer, {"w": g}, state, t - 1, Key(0))
        params, state = update(optimizer, {"w": g}, state, params, {"all": hyper(lr)})
        replay.step(g.numpy(), lr)
        np.testing.assert_allclose(params["w"].numpy(), replay.w, rtol=0, atol=2e-6, err_msg=f"step {t}")


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


FAST = ("svd", "srht, rotate", "topk, first release", "uniform, keep", "gap 1", "gap 100, decay", "AdaGrad", "SGD")
FAST += ("complement uncorrected", "no bias correction", "coordinate", "subset sqrt", "subset -1", "subset 10")


@pytest.mark.parametrize("case", few(CASES, *FAST))
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
        n: Snsm(
            p.numpy(),
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
            replay.step(grads[n].numpy(), kept(state[n]), n in due, options["lr"], options["wd"])
            way[n] += np.abs(replay.p - before)
        params, state = update(optimizer, grads, state, params, {"all": hyper(options["lr"], options["wd"])})
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
