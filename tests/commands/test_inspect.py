"""What is said of an optimizer's state is true: measured against formulas, against the rules, against the files."""

import io
import json
import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY, corpus, here
from rich.console import Console

from engine import checkpoint
from engine.checkpoint import CheckpointError
from engine.checkpoint.rules import RuleRecord, described, read_rules, rules_head
from engine.checkpoint.tensorfile import TensorFile
from engine.inspection import matrices, summary
from engine.inspection import slots as by_kind
from engine.inspection.matrices import spectrum
from engine.inspection.measures import MEASURES, adamw_update, compared, look, overlap
from optimizers import linalg
from optimizers.clock import CORRECTION, STEP
from optimizers.contract import Group
from optimizers.linalg import projections
from optimizers.random import Key, normal
from optimizers.registry import RULES
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.snsm import snsm
from optimizers.rules.sumo import sumo
from optimizers.state import Parked
from optimizers.wrappers.masked import ENTRIES, gathered, scaled
from optimizers.wrappers.subspace import B, P, subspace
from tools import inspect as tool
from tools.inspect_report import plain, write_rich

GALORE = f"baseline --optimizer galore --rank 4 --update-proj-gap 5 {TINY} --precision bf16 --weight-decay 0.1"

NOBODY = RuleRecord()


def gaussian(*shape: int, key: int = 0) -> torch.Tensor:
    return normal(Key(key), shape, torch.device("cpu"))


def basis(side: int, rank: int, key: int = 0) -> torch.Tensor:
    return torch.linalg.qr(gaussian(side, rank, key=key))[0]


# Measures.


def test_stable_rank_and_leading_share_of_a_known_spectrum():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    m = basis(12, 8) @ values.diag() @ basis(8, 8, key=1).T
    seen = look("w", gaussian(12, 8), {"exp_avg": m}, RuleRecord())
    assert seen.measures["first_stable_rank"] == pytest.approx((16 + 4 + 1 + 1) / 16, rel=1e-4)
    assert seen.measures["first_leading"] == pytest.approx((16 + 4) / 22, rel=1e-4), "two of eight directions"
    assert seen.measures["first_rms"] == pytest.approx(math.sqrt(22 / 96), rel=1e-4)
    assert seen.spectra["exp_avg"][:4] == pytest.approx(values[:4].tolist(), rel=1e-4)
    batch = look("w", gaussian(3, 12, 8), {"exp_avg": m.expand(3, 12, 8)}, RuleRecord())
    assert batch.measures["first_stable_rank"] == pytest.approx(22 / 16, rel=1e-4), "of experts: the mean"


def test_the_leading_values_of_a_large_matrix_are_close():
    values = 1 / torch.arange(1, 601.0)
    m = basis(600, 600) @ values.diag() @ basis(600, 600, key=1).T
    assert m.shape[0] > matrices.EXACT
    assert spectrum(m).shape == (matrices.LEADING,)
    assert torch.allclose(spectrum(m)[:32], values[:32], rtol=0.02)


def test_what_cannot_be_told_is_nan_and_never_an_error():
    for m in (torch.zeros(6, 4), torch.full((6, 4), math.inf), torch.full((6, 4), math.nan)):
        seen = look("w", torch.zeros(6, 4), {"exp_avg": m, "exp_avg_sq": m}, RuleRecord())
        assert math.isnan(seen.measures["first_stable_rank"])
        assert not [name for name in summary.summary([seen]) if "stable_rank" in name], "left out of the mean"
    for shape in ((), (0,), (0, 3), (1, 3), (5,)):
        p = torch.ones(shape)
        look("w", p, adamw().init(p), RuleRecord(rule="adamw", options={"eps": 1e-8}))


def test_the_error_of_a_basis():
    q = basis(20, 5)
    assert look("w", gaussian(30, 20), {"basis": q}, RuleRecord()).measures["basis_error"] < 1e-5
    assert look("w", gaussian(30, 20), {"basis": 2 * q}, RuleRecord()).measures["basis_error"] == pytest.approx(
        3 * math.sqrt(5)
    )
    assert look("w", gaussian(30, 20), {"basis": q}, RuleRecord()).rank == 5


def test_overlap_of_subspaces():
    p, eye = gaussian(30, 20), torch.eye(20)
    first, second, half = ({"basis": q} for q in (eye[:, :4], eye[:, 4:8], eye[:, 2:6]))
    turned = {"basis": eye[:, :4] @ basis(4, 4)}
    got = [overlap(first, other, p, NOBODY, NOBODY) for other in (first, turned, second, half)]
    assert got == pytest.approx([1, 1, 0, 0.5], abs=1e-6)
    random = [
        overlap({"basis": basis(20, 4, key=k)}, {"basis": basis(20, 4, key=k + 99)}, p, NOBODY, NOBODY)
        for k in range(50)
    ]
    assert sum(random) / 50 == pytest.approx(4 / 20, rel=0.15), "r / side, on average"
    picked = [{"index": torch.tensor(rows)} for rows in ([0, 1, 2], [2, 7, 1])]
    assert overlap(*picked, p, NOBODY, NOBODY) == pytest.approx(2 / 3)
    assert overlap(first, {"basis": eye[:, :5]}, p, NOBODY, NOBODY) is None, "of another rank"


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_a_transformed_basis_is_the_one_that_the_rule_projects_on(shape):
    g = gaussian(*shape)
    slots, _ = projections.draw("srht", g, 5, Key(3))
    found = by_kind.subspace(slots, g, RuleRecord())
    assert found is not None and found[1] is False
    assert torch.allclose(linalg.project(g, found[0]), projections.down(g, slots), atol=1e-5)
    assert overlap(slots, slots, g, NOBODY, NOBODY) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["adamw", "galore", "sumo", "muon", "adam_sn", "srht", "topk", "masked", "rso"])
def test_a_rule_is_measured_by_the_kinds_of_its_slots_whatever_their_names(name):
    """The same rule with other names for what is its own: no measure is lost."""
    usual = {"srht": snsm(4, proj_type="srht"), "topk": snsm(4, proj_type="topk"), "sumo": sumo(4), "galore": galore(4)}
    usual |= {"masked": gathered(adamw(), 2), "rso": subspace(sumo(4), 8, "products")}
    rule, p = usual.get(name) or RULES[name](), gaussian(24, 16)
    before = learned(rule, p, 0)
    after, who = learned(rule, p, 1, before), described(Group("g", rule, ("",), 1e-3))
    names = {slot: slot if slot in (ENTRIES, P, B, STEP, CORRECTION) else f"own_{slot}" for slot in before}
    renamed = who._replace(kinds={names[slot]: kind for slot, kind in who.kinds.items()})
    first, second = ({names[slot]: t for slot, t in slots.items()} for slots in (before, after))
    usually, otherwise = look("w", p, after, who), look("w", p, second, renamed)
    assert usually.measures == otherwise.measures and len(usually.measures) > 1
    assert (usually.rank, list(usually.spectra.values())) == (otherwise.rank, list(otherwise.spectra.values()))
    moved = p + gaussian(24, 16, key=5)
    told = [
        compared((p, old, by), (moved, new, by), 1) for old, new, by in ((before, after, who), (first, second, renamed))
    ]
    assert told[0] == told[1]


def learned(rule, p, key, slots=None):
    """The slots after a step, the first of all or another."""
    slots, g = dict(slots or rule.init(p)), gaussian(*p.shape, key=key)
    slots |= {P: gaussian(16, 8, key=key + 7)} if P in slots else {}
    g = rule.gradient(g, slots)
    slots |= rule.refresh(g, slots, Key(key))[0] if rule.refresh else {}
    hyper = {"lr": torch.tensor(1e-3), "weight_decay": torch.tensor(0.0)}
    return {**slots, **rule.update(g, slots, p, hyper)[1]}


def test_captured_shares():
    """Of the change, and of the older moment, in the newer basis; and of a full moment in its own."""
    p, q, other = gaussian(30, 20), torch.eye(20)[:, :4], torch.eye(20)[:, 2:6]
    m = gaussian(30, 4, key=2)
    change = torch.zeros(30, 20)
    change[:, 3], change[:, 10] = 3.0, 4.0
    new = ({"basis": other, "exp_avg": m}, RuleRecord())
    got = compared((p, {"basis": q, "exp_avg": m}, RuleRecord()), (p + change, *new), 5)
    assert got["change_captured"] == pytest.approx(9 / 25, rel=1e-4)
    assert got["moment_captured"] == pytest.approx(float(m[:, 2:].square().sum() / m.square().sum()), rel=1e-4)
    assert got["change"] == pytest.approx(float(change.norm() / p.norm()), rel=1e-4)
    assert got["change_rms"] == pytest.approx(math.sqrt(25 * 30 / 600) / 5, rel=1e-4)
    full = look("w", p, {"basis": other, "momentum_buffer": change}, RuleRecord())
    assert full.measures["first_captured"] == pytest.approx(9 / 25, rel=1e-4)


def test_a_weight_with_a_product_beside_it_is_compared_with_it():
    p, slots = gaussian(6, 5), {"P": gaussian(5, 2), "B": gaussian(6, 2, key=1)}
    who = RuleRecord(options={"form": "products"})
    got = compared((p, {**slots, "B": torch.zeros(6, 2)}, who), (p, slots, who), 1)
    assert got["change"] == pytest.approx(float((slots["B"] @ slots["P"].T).norm() / p.norm()), rel=1e-4)
    assert got["change_captured"] == pytest.approx(1, abs=1e-5) and got["overlap"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_the_update_of_adamw_is_the_one_it_made(eps):
    rule, p = adamw(eps=eps), gaussian(8, 6)
    slots, hyper = rule.init(p), {"lr": torch.tensor(0.01), "weight_decay": torch.tensor(0.1)}
    who = RuleRecord("g", "adamw", 0.01, 0.1, rule.settings())
    assert "update_rms" not in look("w", p, slots, who).measures, "there was none yet"
    for k in range(3):
        delta, slots = rule.update(gaussian(8, 6, key=k), slots, p, hyper)
    found = adamw_update(slots, p, who)
    assert torch.allclose(found, delta, rtol=1e-4, atol=1e-8)
    assert look("w", p, slots, who).measures["update_rms"] == pytest.approx(
        float(delta.square().mean().sqrt()), rel=1e-4
    )
    assert "update_rms" not in look("w", p, slots, who._replace(rule="snsm")).measures


def test_updates_that_bf16_loses():
    """1 + 2^-8 is half an ulp above 1: a little less is lost, a little more is not."""
    ones = torch.ones(4, 4)
    slots = {**adamw().init(ones), "exp_avg": -ones, "exp_avg_sq": ones}
    slots["bias_correction"] = torch.ones(2, dtype=torch.float64)
    for lr, lost in ((0.9 * 2**-8, 1.0), (1.1 * 2**-8, 0.0)):
        who = RuleRecord("g", "adamw", lr, 0.0, {"eps": 0.0})
        assert look("w", ones.bfloat16(), slots, who).measures["update_lost"] == lost
        assert "update_lost" not in look("w", ones, slots, who).measures, "of float32 weights nothing to speak of"
        assert "update_lost" not in look("w", ones.bfloat16(), slots, who, rounded=False).measures, "stochastic"
    half = torch.ones(4, 4).bfloat16()
    half[:2] = 100
    assert look("w", half, slots, RuleRecord("g", "adamw", 0.01, 0.0, {"eps": 0.0})).measures["update_lost"] == 0.5


def test_a_coordinate_mask_is_measured_on_what_it_keeps():
    p = gaussian(4, 5).bfloat16()
    entries = torch.tensor([0, 7, 19], dtype=torch.int32)
    slots = {**adamw().init(p.flatten()[:3]), "entries": entries, "scale": torch.tensor(2.0)}
    seen = look("w", p, slots, RuleRecord("g", "adamw", 1e-3, 0.0, {"eps": 1e-8}))
    assert (seen.active, seen.status) == (3, "active")
    assert {slot.name: slot.kind for slot in seen.slots} == {
        "step": "scalars", "bias_correction": "scalars", "exp_avg": "first moments", "exp_avg_sq": "second moments",
        "entries": "indices", "scale": "scalars",
    }  # fmt: skip


MISFITS = {
    "a basis of another side": {"basis": torch.zeros(7, 2)},
    "a basis with more columns than rows": {"basis": torch.zeros(5, 6)},
    "a moment larger than its weight": {"exp_avg": torch.zeros(6, 6)},
    "a moment of whole numbers": {"exp_avg": torch.zeros(6, 5, dtype=torch.int32)},
    "an index out of range": {"index": torch.tensor([0, 6])},
    "an index of numbers": {"index": torch.zeros(2)},
    "too few signs": {"index": torch.tensor([0]), "signs": torch.ones(3, dtype=torch.int8)},
    "one bias correction": {"bias_correction": torch.zeros(1, dtype=torch.float64)},
    "entries out of range": {"entries": torch.tensor([30], dtype=torch.int32)},
    "a P of another width": {"P": torch.zeros(6, 2)},
    "a B that does not go with P": {"P": torch.zeros(5, 2), "B": torch.zeros(6, 3)},
}


@pytest.mark.parametrize("case", MISFITS)
def test_slots_that_cannot_belong_to_a_weight_are_named(case):
    slots = MISFITS[case]
    with pytest.raises(CheckpointError, match=r"state of w \(6, 5\): .* expected"):
        look("w", torch.zeros(6, 5), slots, RuleRecord())


# RuleRecord owns what.


def test_the_settings_of_a_rule_are_found():
    assert adamw((0.8, 0.9), 1e-5).settings() == {"betas": (0.8, 0.9), "eps": 1e-5}
    found = galore(rank=7, moments="rotate").settings()
    assert (found["rank"], found["moments"], found["scale"]) == (7, "rotate", 0.25)
    wrapped = subspace(scaled(snsm(rank=3, subset=5), "update"), 8).settings()
    assert wrapped["rank"] == 8 and wrapped["subset"] == 5 and wrapped["mode"] == "update", "the outer one's is told"


def test_the_head_says_who_owns_what(tmp_path):
    owner = {"a": Group("fast", adamw(), ("a",), 0.5, 0.1), "b": Group("slow", galore(rank=2), ("b",), 0.25)}
    state = {"a": {}, "b": {}}
    path = checkpoint.save(tmp_path, 1, {}, state, {}, {}, rules_head(owner, 0.5))
    found = read_rules(checkpoint.read(path).state)
    assert found["a"][:4] == ("fast", "adamw", 0.25, 0.1) and found["b"][:3] == ("slow", "galore", 0.125)
    assert found["b"].options["rank"] == 2
    assert checkpoint.read(path).header["optimizer"] == "adamw,galore"


# The tool.


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = corpus(tmp_path_factory.mktemp("inspect"))
    done = here(folder, f"{GALORE} --save-every 12 --out run")
    assert done.code == 0, done.err
    return folder / "run"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = tool.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_what_is_printed_into_a_pipe_can_be_cut(run, capsys):
    code, out, err = call(capsys, run)
    assert (code, err) == (0, "")
    comments, rows = (
        [line for line in out.splitlines() if line.startswith("# ") == is_comment] for is_comment in (True, False)
    )
    table = [row.split("\t") for row in rows]
    assert {len(row) for row in table} == {len(table[0])}
    names = [row[0] for row in table[1:]]
    assert names == list(checkpoint.load(run / "step-00000020").params)
    column = {heading: [row[i] for row in table[1:]] for i, heading in enumerate(table[0])}
    for heading, file in (("bytes", "model.safetensors"), ("state_bytes", "optimizer.safetensors")):
        stored = sum(
            t.numel() * t.element_size() for t in TensorFile(run / "step-00000020" / file).everything().values()
        )
        assert sum(map(int, column[heading])) == stored
    assert set(column["rule"]) == {"adamw", "galore"} and set(column["status"]) == {"active"}
    assert all((rank == "4") == (rule == "galore") for rank, rule in zip(column["rank"], column["rule"], strict=True))
    assert all(float(value) < 1e-5 for value in column["basis_error"] if value)
    assert any("% of AdamW's in float32" in line for line in comments)
    assert "\x1b" not in out


def test_the_json_is_what_it_says(run, capsys):
    code, out, _ = call(capsys, run, "--json", "--compare", run / "step-00000012")
    content = json.loads(out)
    assert code == 0 and content["schema"] == 1 and content["step"] == 20 and content["compared"]["step"] == 12
    parameters = content["parameters"]
    keys = {
        "name",
        "group",
        "rule",
        "lr",
        "weight_decay",
        "options",
        "status",
        "shape",
        "dtype",
        "bytes",
        "active",
        "rank",
    }
    assert all(one.keys() == keys | {"slots", "measures", "spectra"} for one in parameters)
    assert content["measures"].keys() == {measure for one in parameters for measure in one["measures"]}
    assert content["measures"].items() <= MEASURES.items()
    held = sum(slot["bytes"] for one in parameters for slot in one["slots"])
    assert sum(content["bytes"].values()) == held + sum(one["bytes"] for one in parameters)
    assert content["adamw_bytes"] == 8 * sum(math.prod(one["shape"]) for one in parameters)
    assert content["rules"]["galore"]["tensors"] == 14
    (lm_head,) = (one for one in parameters if one["name"] == "lm_head.weight")
    assert lm_head["weight_decay"] == 0.1 and 0 < lm_head["lr"] < 1e-3, "the rate of the last step"
    assert 0 < lm_head["measures"]["update_lost"] < 1
    before, after = (checkpoint.load(run / f"step-{step:08d}").params["lm_head.weight"].float() for step in (12, 20))
    assert lm_head["measures"]["change"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    q = next(one for one in parameters if one["name"].endswith("q_proj.weight"))
    assert 0 < q["measures"]["overlap"] <= 1 + 1e-5 and 0 < q["measures"]["change_captured"] <= 1 + 1e-5
    older = json.loads(call(capsys, run / "step-00000012", "--json", "--compare", run)[1])
    assert older == content, "the newer is what is looked at, whichever is named first"


def test_a_match_keeps_what_it_finds(run, capsys):
    content = json.loads(call(capsys, run, "--json", "--match", r"layers\.1\..*q_proj")[1])
    assert [one["name"] for one in content["parameters"]] == ["model.layers.1.self_attn.q_proj.weight"]


@pytest.mark.parametrize("width", [70, 110, 200])
def test_tables_fit_the_terminal(run, width):
    file = io.StringIO()
    report = tool.inspect(run, run / "step-00000012")
    write_rich(report, Console(file=file, force_terminal=True, width=width, color_system=None))
    said = file.getvalue()
    assert "…" not in said, "nothing is cut"
    rows = [line for line in said.splitlines() if line.startswith(" 1 q_proj")]
    assert all(len(row) <= width and "galore" in row for row in rows)
    assert len(rows) == {70: 5, 110: 3, 200: 2}[width]
    values = " ".join(rows).replace("galore", "").split()
    (one,) = (one for one in report.looks if one.name == "model.layers.1.self_attn.q_proj.weight")
    assert len(values) == 2 * len(rows) + 3 + len(one.measures), "each once"


@pytest.mark.run
def test_a_page_is_drawn(run, capsys, tmp_path):
    code, out, _ = call(capsys, run, "--png", tmp_path / "page.png", "--compare", run / "step-00000012")
    assert code == 0 and out.endswith("page.png\n")
    plainer = tmp_path / "plain.png"
    assert call(capsys, run, "--png", plainer, "--match", "norm")[0] == 0, "no matrix, and still a page"
    sizes = [(tmp_path / name).stat().st_size for name in ("page.png", "plain.png")]
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG") and sizes[0] > 2 * sizes[1] > 2000


def test_what_no_rule_moves_is_frozen_and_no_damage(tmp_path, capsys):
    """What --freeze names, and buffers of batch norm, lie in the model's file and have no owner."""
    model = {
        "a": gaussian(4, 3),
        "bn.weight": gaussian(4),
        "bn.running_mean": gaussian(4),
        "bn.num_batches_tracked": torch.tensor(7),
    }
    group = Group("all", adamw(), ("a",), 0.5, 0.0)
    path = checkpoint.save(tmp_path, 1, model, {"a": adamw().init(model["a"])}, {}, {}, rules_head({"a": group}, 1.0))
    code, out, err = call(capsys, path)
    assert code == 0, err
    lines = {line.split("\t")[0]: line.split("\t")[1:4] for line in out.splitlines() if "\t" in line}
    assert lines["a"] == ["adamw", "all", "active"]
    assert lines["bn.weight"] == lines["bn.running_mean"] == ["frozen", "frozen", "frozen"]
    assert "bn.num_batches_tracked" not in lines
    assert call(capsys, path, "--compare", path)[0] == 0
    state = {"a": adamw().init(model["a"]), "bn.weight": adamw().init(model["bn.weight"])}
    odd = checkpoint.save(tmp_path / "odd", 1, model, state, {}, {}, rules_head({"a": group}, 1.0))
    assert "disagree on ['bn.weight']" in refused(capsys, 5, odd), "a state that no rule owns"
    stray = checkpoint.save(tmp_path / "stray", 1, model, {}, {}, {}, rules_head({"a": group, "b": group}, 1.0))
    assert "disagree on ['b']" in refused(capsys, 5, stray)


def test_tensors_are_read_one_parameter_at_a_time(run, monkeypatch):
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = TensorFile.read

    def watched(self, name):
        nonlocal most
        t = read(self, name)
        alive.append(weakref.ref(t))
        most = max(most, sum(one() is not None for one in alive))
        return t

    monkeypatch.setattr(TensorFile, "read", watched)
    tool.inspect(run)
    assert len(alive) > 60 and most <= 2 * 6, "one parameter and its slots, and those of the one before"


def test_state_that_waits_and_state_that_is_gone(tmp_path, capsys):
    """Parked and frozen parameters, and a checkpoint whose head names no rules."""
    params = {
        name: gaussian(6, 5) for name in ("model.layers.0.a.weight", "model.layers.1.a.weight", "model.norm.weight")
    }
    names = list(params)
    state = {names[0]: adamw().init(params[names[0]]), names[1]: Parked(adamw().init(params[names[1]]), {1: False})}
    path = checkpoint.save(tmp_path / "run", 3, params, state, {}, {})
    content = json.loads(call(capsys, path, "--json")[1])
    assert [one["status"] for one in content["parameters"]] == ["active", "parked", "frozen"]
    assert content["rules"] == {
        "?": {**content["rules"]["?"], "elements": 90, "active": 30, "parked": 30, "tensors": 3, "active_tensors": 1}
    }
    assert "33.3% trained now (1 tensors), 1 tensors parked" in call(capsys, path)[1]


def test_where_a_traversal_stands(tmp_path, capsys):
    done = here(corpus(tmp_path), f"omgd pretrain --active 1 --period 2step {TINY} --steps 7 --out run")
    assert done.code == 0, done.err
    content = json.loads(call(capsys, tmp_path / "run", "--json")[1])
    visits = content["traversal"]["visits"]
    assert sum(visits.values()) == 7 and sorted(visits.values()) == [3, 4]
    assert {one["status"] for one in content["parameters"]} == {"active", "frozen"}
    out = call(capsys, tmp_path / "run")[1]
    assert "# steps that each has trained: " in out and "# the next step trains mask " in out


def test_what_masks_by_norm_have_seen(tmp_path, capsys):
    line = f"omgd pretrain --choose norms --active 1 --period 2step {TINY}"
    assert here(corpus(tmp_path), f"{line} --steps 3 --out run").code == 0
    where = json.loads(call(capsys, tmp_path / "run", "--json")[1])["traversal"]
    assert sorted(where["visits"].values()) == [1, 2], "the third step is the second layer's first"
    never = [layer for layer, score in where["scores"].items() if score is None]
    assert where["active"] == never and where["visits"][never[0]] == 1
    out = call(capsys, tmp_path / "run")[1]
    assert f"# the next step trains, chosen by gradient norm: {never[0]}" in out and f"{never[0]}:never" in out
    assert tool.main(["--fresh", line]) == 0
    assert out.count("chosen by gradient norm") == capsys.readouterr().out.count("chosen by gradient norm") == 1


# What a run would save.


@pytest.mark.run
@pytest.mark.parametrize(
    "line",
    [
        "snsm demo --rank 4 --precision bf16-sr",
        "sumo demo --rank 4",
        "omgd pretrain --active 1 --period 2step --state-policy keep",
        "omgd pretrain --choose norms --active 1 --period 2step",
        "rso demo --rank 4 --form products",
    ],
)
def test_a_fresh_state_is_that_of_the_first_checkpoint(line, tmp_path, capsys):
    folder = corpus(tmp_path)
    assert here(folder, f"{line} {TINY} --steps 1 --out run").code == 0
    whole = f"{line} {TINY}"
    assert tool.main(["--fresh", whole, "--json", "--png", str(tmp_path / "page.png")]) == 0
    fresh, saved = json.loads(capsys.readouterr().out), plain(tool.inspect(tmp_path / "run"))
    assert fresh["path"] == f"recipes.{whole}" and fresh["step"] == 0 and fresh["measures"] == {}
    first = "model.embed_tokens.weight"  # one row a token: without data that is the preset's number of them
    same = ("name", "group", "rule", "weight_decay", "options", "status", "dtype", "active", "rank", "slots")
    for one, other in zip(fresh["parameters"], saved["parameters"], strict=True):
        if one["name"] not in (first, "lm_head.weight"):
            assert {key: one[key] for key in same} == {key: other[key] for key in same}
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capfd):
    assert tool.main(["--fresh", "snsm demo --rank 4", "--png", str(tmp_path / "nowhere" / "x.png")]) == 2
    err = capfd.readouterr().err
    assert "error: " in err and "nowhere" in err and "Traceback" not in err


@pytest.mark.run
def test_the_command_asks_the_recipe(capfd):
    line = "snsm 1b --model 7b --rank 1024 --precision bf16-sr"
    assert tool.main(["--fresh", line, "--match", "layers.31"]) == 0
    out = capfd.readouterr().out
    assert f"# recipes.{line}, step 0, 9 of 291 tensors" in out
    assert "# bases: 117,440,512 bytes" in out
    assert "exp_avg_sq:4096×1:float32" in out


# What it refuses.


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    got, out, err = call(capsys, *arguments)
    assert (got, out) == (code, "") and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err, err
    return err


def test_arguments_that_mean_nothing(run, capsys, tmp_path):
    assert "nowhere" in refused(capsys, 2, tmp_path / "nowhere")
    assert "regular expression" in refused(capsys, 2, run, "--match", "(")
    assert "finds none" in refused(capsys, 2, run, "--match", "conv")
    assert "PATH" in refused(capsys, 2, tmp_path)
    assert "one of the two" in refused(capsys, 2)
    assert "one of the two" in refused(capsys, 2, run, "--fresh", "snsm demo")
    assert "a recipe and its flags" in refused(capsys, 2, "--fresh", "../x")
    assert "not moved yet" in refused(capsys, 2, "--fresh", "snsm demo", "--compare", run)
    assert call(capsys, run, "--png", tmp_path / "nowhere" / "x.png")[0] == 2


def test_checkpoints_that_cannot_be_used(run, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "step-00000020" / "config.json").write_text("{}")
    code, out, err = call(capsys, copy)
    assert code == 0 and "step 12" in out, "the newest whole one"
    assert err.startswith("skipped step-00000020: ") and "config.json" in err
    assert "config.json: " in refused(capsys, 5, copy / "step-00000020")
    (copy / "step-00000012" / "model.safetensors").unlink()
    assert "missing" in refused(capsys, 5, copy / "step-00000012")
    assert "none of its 2 checkpoints is whole" in refused(capsys, 5, copy)
    for gone in (copy / "step-00000099", tmp_path / "nowhere"):
        assert "which is not there" in refused(capsys, 2, gone)
        assert "--compare: got" in refused(capsys, 2, run, "--compare", gone)
    other = checkpoint.save(tmp_path / "other", 1, {"w": torch.zeros(2)}, {}, {}, {})
    assert "compare checkpoints of the same model" in refused(capsys, 5, run, "--compare", other)
    stray = checkpoint.save(tmp_path / "stray", 1, {"w": torch.zeros(2)}, {"v": {}}, {}, {})
    assert "no parameters of its model" in refused(capsys, 5, stray)
