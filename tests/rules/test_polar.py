"""The polar factor: accuracy over condition numbers, spectra, shapes and methods; degenerate matrices; batches."""

from math import log10

import pytest
import torch
from helpers.grids import covering
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from optimizers.compile import compiled
from optimizers.contract import UsageError
from optimizers.linalg import polar as module
from optimizers.linalg.polar import EXPRESS, METHODS, newton_schulz, polar

EXACT = [method for method in METHODS if method != "newton_schulz"]
GRID = [(r, n) for r in (4, 32, 128, 256) for n in (768, 4096)]
KAPPAS = [10.0**k for k in range(9)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(n: int, r: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(n, r, seed=seed).double())[0]


def matrix(r: int, n: int, kappa: float, spectrum: str, seed: int = 0) -> Tensor:
    """r x n, float32, with singular values 1 to 1 / kappa: evenly in their logarithms, or one above all others."""
    s = torch.logspace(0, -log10(kappa), r, dtype=torch.float64)
    if spectrum == "spike":
        s[1:] = 1 / kappa
    return (orthonormal(r, r, seed) * s @ orthonormal(n, r, seed + 1).T).float()


def errors(o: Tensor, x: Tensor) -> tuple[float, float]:
    """(||O O^T - I||_F, distance to the float64 factor of x), over sqrt(r)."""
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    r, o = min(x.shape), o.double()
    square = o @ o.T if x.shape[0] == r else o.T @ o
    return float((square - torch.eye(r)).norm()) / r**0.5, float((o - u @ vh).norm()) / r**0.5


def check(r: int, n: int, kappa: float, spectrum: str, method: str) -> None:
    """Required are 2e-5, and 1e-5 up to a condition number of 1e6; all methods do a hundred times better."""
    x = matrix(r, n, kappa, spectrum)
    for given in (x, x.T.contiguous()):
        orthogonality, distance = errors(polar(given, method), given)
        assert orthogonality <= 1e-7, (r, n, kappa, spectrum, method)
        assert distance <= 1e-7, (r, n, kappa, spectrum, method)


@pytest.mark.parametrize(
    ("kappa", "spectrum", "method"), covering([1.0, 1e3, 3e4, 1e6, 1e8], ["log", "spike"], ["auto", *EXACT])
)
def test_accuracy(kappa, spectrum, method):
    for r, n in ((4, 768), (32, 768), (1, 5), (6, 6)):
        check(r, n, kappa, spectrum, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", *EXACT])
@pytest.mark.parametrize(("r", "n"), GRID)
def test_accuracy_over_the_whole_grid(r, n, method):
    for kappa in KAPPAS:
        for spectrum in ("log", "spike"):
            check(r, n, kappa, spectrum, method)


def test_a_float32_svd_is_not_enough():
    """What float64 is for: in float32 an exact SVD is orthogonal, and off by the condition number."""
    x = matrix(32, 768, 1e5, "log")
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    orthogonality, distance = errors(u @ vh, x)
    assert orthogonality < 1e-5 and distance > 1e-4


@pytest.mark.parametrize("method", EXACT)
def test_scale_does_not_matter(method):
    x = matrix(6, 20, 10.0, "log")
    expected = polar(x, method)
    for scale in (2.0**-100, 2.0**100):
        torch.testing.assert_close(polar(x * scale, method), expected, rtol=0, atol=1e-6)
    tiny = polar(x * 1e-42, method)  # subnormal, with few digits left
    assert errors(tiny, x * 1e-42)[0] < 1e-6


@pytest.mark.parametrize("method", ["svd", "lq", "gram"])
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_null_directions_are_completed(method, shape):
    """O is orthonormal and one of the maximizers of <O, X>: their value is the sum of the singular values."""
    x = randn(shape[0], 3) @ randn(3, shape[1], seed=1)
    x[2] = 0
    orthogonality, _ = errors(o := polar(x, method), x)
    assert orthogonality < 1e-6
    torch.testing.assert_close((o * x).sum(), torch.linalg.svdvals(x).sum(), rtol=1e-6, atol=0)


def test_products_leave_null_directions_zero():
    x = torch.zeros(8, 20)
    x[:3] = randn(3, 20)
    o = polar(x, "polar_express")
    torch.testing.assert_close(o[:3], polar(x[:3], "svd"), rtol=0, atol=1e-6)
    assert not o[3:].any()


@pytest.mark.parametrize("method", METHODS)
def test_matrices_of_a_batch_do_not_affect_each_other(method):
    regular = [matrix(6, 20, kappa, "log", seed=i) for i, kappa in enumerate((3.0, 1e3, 1e6, 1e8))]
    low = torch.zeros(6, 20)
    low[:2] = randn(2, 20)
    nan, inf = randn(6, 20), randn(6, 20)
    nan[3, 4], inf[0, 0] = torch.nan, -torch.inf
    stack = torch.stack([regular[0], torch.zeros(6, 20), nan, regular[1], low, inf, regular[2], regular[3]])
    for given in (stack, stack.mT):
        o = polar(given.reshape(2, 4, *given.shape[1:]), method).flatten(0, 1)
        assert o.shape == given.shape and o.is_contiguous()
        assert not o[1].any() and o[2].isnan().all() and o[5].isnan().all()
        for i in (0, 3, 4, 6, 7):
            torch.testing.assert_close(o[i], polar(given[i], method), rtol=0, atol=1e-6)
        assert not polar(given[1], method).any() and polar(given[2], method).isnan().all()


def test_gram_takes_the_dearer_ways_only_where_it_must(monkeypatch):
    taken = []
    for name in ("by_lq", "by_gram"):
        real = getattr(module, name)

        def spy(x: Tensor, *lifts: int, name: str = name, real=real) -> Tensor:
            taken.append((name, len(x)))
            return real(x, *lifts)

        monkeypatch.setattr(module, name, spy)
    stack = torch.stack([matrix(6, 20, kappa, "log") for kappa in (10.0, 1e6, 1e3, 1e5, 1e3)]).double().mT
    module.by_gram(stack)
    assert taken == [("by_gram", 5), ("by_gram", 2)], "a second decomposition for two"
    taken.clear()
    stack[2, :, 0] = 0
    module.by_gram(stack)
    assert taken == [("by_gram", 5), ("by_gram", 3), ("by_lq", 1)], "QR for what has no full rank"


def test_coefficients_keep_singular_values_bounded_and_bring_them_to_one():
    x = torch.logspace(-9, 0, 20001, dtype=torch.float64)
    for a, b, c in EXPRESS:
        x = a * x + b * x**3 + c * x**5
        assert float(x.max()) < 2 and float(x.min()) > 0
    torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=1e-6)


def test_products_never_ask_the_device_for_a_value():
    """A tensor without data has none to give: what reads one on the host raises."""
    with FakeTensorMode():
        x = torch.empty(2, 20, 6, dtype=torch.float64)
        assert METHODS["polar_express"](x).shape == x.shape
        with pytest.raises(DataDependentOutputException):
            METHODS["gram"](x)


@pytest.mark.compiles
def test_inside_a_compiled_function():
    def function(*xs: Tensor) -> list[Tensor]:
        return [polar(2 * x) + polar(x, "polar_express") for x in xs]

    xs = [randn(*shape) for shape in ((6, 20), (20, 6), (2, 6, 20), (2, 20, 6))]
    assert all(map(torch.equal, compiled(function)(*xs), function(*xs)))


def test_the_operator_is_what_it_says():
    for x in (randn(6, 20), randn(3, 20, 6), randn(20, 6).T):
        torch.library.opcheck(module._polar, (x, "gram"), test_utils=("test_schema", "test_faketensor"))


def test_newton_schulz_is_muons():
    x = randn(6, 20)
    torch.testing.assert_close(polar(x, "newton_schulz"), newton_schulz(x, dtype=torch.float32), rtol=0, atol=1e-5)
    values = torch.linalg.svdvals(polar(x, "newton_schulz"))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3 and errors(polar(x, "newton_schulz"), x)[1] > 0.05


def test_kinds():
    x = randn(6, 20).to(torch.bfloat16)
    assert polar(x).dtype == torch.float32 and torch.equal(polar(x), polar(x.float()))
    assert polar(torch.empty(6, 20, device="meta")).shape == (6, 20)
    assert polar(torch.zeros(0, 6, 20)).shape == (0, 6, 20)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: polar(randn(3, 4), "qr"), r"method must be one of \('auto', 'svd', .* got 'qr'"),
        (lambda: polar(randn(3)), r"polar needs a matrix, got shape \(3,\)"),
    ],
)
def test_what_cannot_be_done_is_named(call, named):
    with pytest.raises(UsageError, match=named):
        call()
