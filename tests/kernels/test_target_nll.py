"""target_nll: errors, layouts, gradients, what must not matter; broken kernels are found.

Its numbers at odd shapes, in every dtype, are in test_operations.py.
"""

from dataclasses import replace

import gate_b
import pytest
import torch

from rewire.bench.check import check, inputs_of, relative_error
from rewire.bench.operations.target_nll import SUBJECTS
from rewire.kernels import target_nll as folder
from rewire.kernels.dispatch import interpreting, recording, using
from rewire.kernels.errors import InputError
from rewire.kernels.target_nll import reference, target_nll

(SUBJECT,) = SUBJECTS
interpreter = pytest.mark.interpreter
needs_interpreter = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
each_impl = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=[interpreter, needs_interpreter])])


def data(m=7, k=3, d=20, vocab=60, facts=4, seed=0):
    """hidden, head, labels, fact, weight, facts; and first."""
    seed = torch.Generator().manual_seed(seed)
    hidden = torch.randn(m + k, d, generator=seed)
    head = torch.randn(vocab, d, generator=seed) * 3 / d**0.5
    labels = torch.randint(vocab, (m,), generator=seed)
    fact = torch.randint(facts, (m + k,), generator=seed)
    weight = torch.rand(m + k, generator=seed)
    return (hidden, head, labels, fact, weight, facts), hidden[m:] + 0.3 * torch.randn(k, d, generator=seed)


def close(found, exact, tolerance=5e-6):
    assert found.dtype == torch.float32
    assert relative_error(found, exact) < tolerance


def kernel_module():
    from rewire.kernels.target_nll import kernel

    return kernel


def in_small_parts(kernel, monkeypatch):
    monkeypatch.setattr(kernel, "CONFIGS", (kernel.Config(8, 64, 4),))


@each_impl
def test_rows_beyond_a_chunk(impl, monkeypatch):
    """Label and KL rows are cut anywhere, also in one chunk, and a vocabulary into parts."""
    args, first = data(m=21, k=13, vocab=300)
    exact = reference.target_nll(*args, first=first)
    if impl == "torch":
        monkeypatch.setattr(folder, "CHUNK", 8)
    else:
        in_small_parts(kernel_module(), monkeypatch)
    hidden = args[0].clone().requires_grad_()
    found = target_nll(hidden, *args[1:], first=first, impl=impl)
    (gradient,) = torch.autograd.grad(found[0].sum() + found[1].sum(), hidden)
    plain = args[0].clone().requires_grad_()
    nll, kl, _ = reference.target_nll(plain, *args[1:], first=first)
    (expected,) = torch.autograd.grad(nll.sum() + kl.sum(), plain)
    for one, other in zip((*found, gradient), (*exact, expected), strict=True):
        close(one.detach(), other.detach())


LAYOUTS = {
    "every second row": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2],
    "part of a row": lambda x: torch.cat([torch.full_like(x, torch.nan), x], -1)[:, x.shape[-1] :],
    "transposed": lambda x: x.T.contiguous().T,
}


@each_impl
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, impl):
    """What lies between the rows, NaN here, is not read."""
    args, first = data()
    hidden, head = LAYOUTS[layout](args[0]), LAYOUTS[layout](args[1])
    found = target_nll(hidden, head, *args[2:], first=LAYOUTS[layout](first), impl=impl)
    for one, other in zip(found, reference.target_nll(*args, first=first), strict=True):
        close(one, other)


@each_impl
def test_strided_vectors(impl):
    args, first = data()
    spread = [x.repeat_interleave(2)[::2] for x in args[2:5]]
    bias = torch.randn(60)
    found = target_nll(*args[:2], *spread, 4, first=first, bias=bias.repeat_interleave(3)[::3], impl=impl)
    for one, other in zip(found, reference.target_nll(*args, first=first, bias=bias), strict=True):
        close(one, other)


@each_impl
def test_gradient_of_hidden_alone_and_only_where_it_is_wanted(impl):
    args, first = data()
    hidden, head = args[0].clone().requires_grad_(), args[1].clone().requires_grad_()
    nll, kl, missed = target_nll(hidden, head, *args[2:], first=first, impl=impl)
    assert not missed.requires_grad
    (nll.sum() + kl.sum()).backward()
    assert hidden.grad is not None
    assert head.grad is None
    with torch.no_grad():
        again = target_nll(hidden, head, *args[2:], first=first, impl=impl)
    assert not any(part.requires_grad for part in again)
    assert not target_nll(args[0], head, *args[2:], first=first, impl=impl)[0].requires_grad
    for one, other in zip(again, (nll, kl, missed), strict=True):
        close(one, other.detach(), 1e-6)


@each_impl
def test_each_fact_has_its_own_gradient(impl):
    """The gradient of one fact's loss is zero at other facts' rows, and facts add up."""
    args, first = data()
    hidden = args[0].clone().requires_grad_()
    both = target_nll(hidden, *args[1:], first=first, impl=impl)
    whole = torch.autograd.grad(both[0].sum() + 2 * both[1].sum(), hidden, retain_graph=True)[0]
    parts = [torch.autograd.grad(both[0][f] + 2 * both[1][f], hidden, retain_graph=True)[0] for f in range(4)]
    for f, part in enumerate(parts):
        assert not part[args[3] != f].any()
    close(sum(parts), whole, 1e-6)


@each_impl
def test_no_second_derivative(impl):
    args, first = data()
    hidden = args[0].clone().requires_grad_()
    nll, *_ = target_nll(hidden, *args[1:], first=first, impl=impl)
    (gradient,) = torch.autograd.grad(nll.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@each_impl
def test_a_broken_row_leaves_other_facts_alone(impl):
    args, first = data(m=8, k=4)
    hidden, fact = args[0].clone(), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])
    args = (hidden, *args[1:3], fact, *args[4:])
    whole = target_nll(*args, first=first, impl=impl)
    hidden[2], hidden[9] = torch.nan, torch.inf
    hidden.requires_grad_()
    nll, kl, _ = target_nll(*args, first=first, impl=impl)
    (gradient,) = torch.autograd.grad(nll.sum() + kl.sum(), hidden)
    assert nll.isnan().tolist() == [False, False, True, False]
    assert kl.isnan().tolist() == [False, True, False, False]
    assert torch.equal(nll[[0, 1, 3]], whole[0][[0, 1, 3]])
    assert torch.equal(kl[[0, 2, 3]], whole[1][[0, 2, 3]])
    assert gradient.isnan().any(1).nonzero()[:, 0].tolist() == [2, 9]


@each_impl
def test_far_from_one_half(impl):
    """Labels that are all but certain, or so unlikely that their probability is no float32; logits of thousands."""
    head = torch.tensor([[1.0], [-1.0], [0.0]])
    hidden = torch.tensor([[5.0], [100.0], [100.0], [3000.0]], requires_grad=True)
    labels, fact = torch.tensor([0, 1, 0, 1]), torch.arange(4)
    nll, _, missed = target_nll(hidden, head, labels, fact, torch.ones(4), 4, impl=impl)
    assert missed.tolist() == [0, 1, 0, 1]
    (gradient,) = torch.autograd.grad(nll.sum(), hidden)
    logits = hidden.detach().double() @ head.double().T
    exact = -logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    slope = logits.softmax(1) @ head.double() - head[labels].double()
    assert torch.allclose(nll.double(), exact, atol=2e-7)
    assert torch.allclose(gradient.double(), slope, atol=2e-7)


@each_impl
def test_kl_with_itself_is_zero_without_a_slope(impl):
    """The first step of values: the rows are what they were."""
    args, _ = data(m=0, k=5, vocab=300)
    hidden = args[0].clone().requires_grad_()
    _, kl, _ = target_nll(hidden, *args[1:], first=args[0], impl=impl)
    (gradient,) = torch.autograd.grad(kl.sum(), hidden)
    assert kl.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@each_impl
def test_shifted_logits_are_no_difference(impl):
    """A bias direction moves all logits alike: KL stays, to rounding, though now - then is 40 everywhere."""
    args, first = data(m=0, k=6, vocab=300)
    hidden, head = (torch.cat([x, torch.full((len(x), 1), value)], 1) for x, value in ((args[0], 0.0), (args[1], 1.0)))
    first = torch.cat([first, torch.full((6, 1), -40.0)], 1)
    _, kl, _ = target_nll(hidden, head, *args[2:], first=first, impl=impl)
    _, exact, _ = reference.target_nll(
        *(args[0].double(), args[1].double(), *args[2:4], args[4].double(), 4), first=first[:, :-1].double()
    )
    assert torch.allclose(kl, exact.float(), rtol=1e-4, atol=1e-5)


@each_impl
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_missed_labels_are_counted(impl, grad, softcap, monkeypatch):
    """Whatever their weight; chunks and parts of the vocabulary have one maximum between them."""
    (hidden, head, labels, fact, weight, facts), first = data(m=40, k=5, vocab=300)
    if impl == "torch":
        monkeypatch.setattr(folder, "CHUNK", 8)
    else:
        in_small_parts(kernel_module(), monkeypatch)
    bias = torch.randn(300)
    ranks = (hidden[:40] @ head.T + bias).argsort(1, descending=True)
    labels = torch.where(torch.arange(40) % 3 == 0, ranks[:, 0], torch.where(fact[:40] == 3, labels, ranks[:, 1]))
    weight[::2] = 0
    hidden.requires_grad_(grad)
    args = (hidden, head, labels, fact, weight, facts)
    missed = target_nll(*args, first=first, bias=bias, softcap=softcap, impl=impl)[2]
    expected = torch.bincount(fact[:40][labels != ranks[:, 0]], minlength=facts).float()
    assert 0 < expected.sum() < 40
    assert torch.equal(missed, expected)
    assert not missed.requires_grad
    assert torch.equal(reference.target_nll(*args, first=first, bias=bias, softcap=softcap)[2], expected)


@each_impl
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_what_is_missed_at_the_edges(impl, softcap, monkeypatch):
    """A shared maximum is a hit, in other parts too; less, NaN and infinity (which a cap bounds) are missed."""
    if impl == "triton":
        in_small_parts(kernel_module(), monkeypatch)
    head = -torch.arange(1.0, 101.0)[:, None]
    head[[3, 70]] = 1.0
    hidden = torch.tensor([[4.0], [4.0], [4.0], [torch.nan], [torch.inf], [torch.nan], [-1.0]])
    labels = torch.tensor([3, 70, 0, 3, 3, 0, 99])
    found = target_nll(hidden, head, labels, torch.arange(7), torch.ones(7), 8, softcap=softcap, impl=impl)
    assert found[2].tolist() == [0, 0, 1, 1, softcap is None, 1, 0, 0]
    exact = reference.target_nll(hidden, head, labels, torch.arange(7), torch.ones(7), 8, softcap=softcap)
    assert torch.equal(found[2], exact[2])


@each_impl
def test_a_label_out_of_range_is_missed(impl):
    """Where indices are not looked at, as on CUDA."""
    hidden, head = torch.ones(3, 1), torch.tensor([[0.0], [2.0]])
    labels = torch.tensor([-1, 1, 2])
    loss, missed, _ = folder.operation(hidden, head, labels, None, None, None, False, impl=impl)
    assert missed.tolist() == [1, 0, 1]
    assert loss.isnan().tolist() == [True, False, True]


def test_no_head_wide_memory_is_kept():
    """What autograd keeps is as wide as hidden."""
    args, first = data(vocab=5000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        target_nll(args[0].clone().requires_grad_(), *args[1:], first=first)
    assert kept
    assert max(x.numel() for x in kept) == args[0].numel()


def test_served_by_what_is_asked_for():
    args, first = data()
    with recording() as served, using("torch"):
        target_nll(*args, first=first)
    assert served == {("target_nll", "torch"): 1}


WRONG = {
    "hidden is \\[10, 20\\] int32; expected \\[rows, d\\]": lambda a: a | {"hidden": a["hidden"].int()},
    "hidden is \\[200\\] float32": lambda a: a | {"hidden": a["hidden"].flatten()},
    "head is \\[60, 19\\] float32; expected \\[V, 20\\]": lambda a: a | {"head": a["head"][:, 1:]},
    "head is \\[0, 20\\] float32; expected \\[V, 20\\], V >= 1": lambda a: a | {"head": a["head"][:0]},
    "head is \\[60, 20\\] float16 on cpu; expected \\[60, 20\\] float32": lambda a: a | {"head": a["head"].half()},
    "head is .* on meta; expected .* on cpu": lambda a: a | {"head": a["head"].to("meta")},
    "labels is \\[7\\] int32": lambda a: a | {"labels": a["labels"].int()},
    "labels are \\[11\\] int64; expected \\[m\\], m <= 10": lambda a: a | {"labels": torch.zeros(11, dtype=torch.long)},
    "labels go from -1 to": lambda a: a | {"labels": torch.cat([a["labels"][1:], torch.tensor([-1])])},
    "labels go from .* to 60; expected 0 to 59": lambda a: (
        a | {"labels": torch.cat([a["labels"][1:], torch.tensor([60])])}
    ),
    "fact go from 0 to .*; expected 0 to 1": lambda a: a | {"facts": 2},
    "fact is \\[9\\] int64 on cpu; expected \\[10\\]": lambda a: a | {"fact": a["fact"][1:]},
    "weight is \\[10\\] float64": lambda a: a | {"weight": a["weight"].double()},
    "first is missing; expected \\[3, 20\\] for the 3 rows": lambda a: a | {"first": None},
    "first is \\[2, 20\\] float32": lambda a: a | {"first": a["first"][1:]},
    "bias is \\[59\\] float32 on cpu; expected \\[60\\] float32": lambda a: a | {"bias": torch.zeros(59)},
    "softcap is 0": lambda a: a | {"softcap": 0.0},
    "impl='cuda' is not one of": lambda a: a | {"impl": "cuda"},
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_input_is_named(says):
    args, first = data()
    names = ("hidden", "head", "labels", "fact", "weight", "facts")
    given = WRONG[says](dict(zip(names, args, strict=True)) | {"first": first})
    with pytest.raises(InputError, match=f"target_nll: {says}"):
        target_nll(**given)


# mutant -> (old, new) in kernel.py
MUTANTS = {
    "columns behind the vocabulary count": (
        'return tl.where(lanes < width, z, float("-inf"))',
        'return tl.where(lanes <= width, z, float("-inf"))',
    ),
    "a part's first column is lost": (
        'return tl.where(lanes < width, z, float("-inf"))',
        'return tl.where((lanes < width) & (lanes > 0), z, float("-inf"))',
    ),
    "earlier parts keep their maximum": ("tl.load(total_ptr) * scale", "tl.load(total_ptr)"),
    "the accumulator keeps its maximum": ("                    sums *= scale[:, None]\n", "                    pass\n"),
    "the label is looked for in the part": ("tl.load(label_ptr + row) - start", "tl.load(label_ptr + row)"),
    "the maximum is not written": ("    tl.store(top_ptr, top)\n", ""),
    "half of the exp is not written": (
        "        tl.debug_barrier()  # all threads have read the row that is now overwritten\n"
        "        tl.store(exp_ptr + row * exp_stride + lanes, e.to(exp_ptr.dtype.element_ty))",
        "        tl.store(exp_ptr + row * exp_stride + lanes, e.to(exp_ptr.dtype.element_ty), mask=lanes % 2 == 0)",
    ),
    "KL rows are written into the next row": (
        "tl.store(exp_ptr + other * exp_stride + lanes",
        "tl.store(exp_ptr + (other - 1) * exp_stride + lanes",
    ),
    "then is read at now": ("y = read(logits_ptr + other * BLOCK", "y = read(logits_ptr + row * BLOCK"),
    "the centre is not given back": ("sums[a:n] * (mean - centre)[:, None]", "sums[a:n] * mean[:, None]"),
    "the bias of the first part": ("tl.load(bias_ptr + start + lanes", "tl.load(bias_ptr + lanes"),
    "the cap's slope is not the label's": ("* (1 - (picked / softcap) ** 2)[:, None]", ""),
}
SHAPES = (
    {"rows": 12, "d": 30, "vocab": 300, "kl": 5, "bias": 1, "softcap": 5},
    {"rows": 9, "d": 20, "vocab": 100, "kl": 3},
)


def passes(shape):
    return check(SUBJECT, inputs_of(SUBJECT, shape, torch.float32, "cpu"), "triton").passed


@interpreter
@needs_interpreter
@pytest.mark.parametrize("mutant", MUTANTS)
def test_gate_a_finds_a_broken_kernel(mutant, mutate, monkeypatch):
    old, new = MUTANTS[mutant]
    in_small_parts(mutate("target_nll", old, new), monkeypatch)
    assert not all(passes(shape) for shape in SHAPES)


@interpreter
@needs_interpreter
def test_the_kernel_as_it_is_passes_where_the_mutants_fail(monkeypatch):
    in_small_parts(kernel_module(), monkeypatch)
    assert all(passes(shape) for shape in SHAPES)


@pytest.mark.compile
@pytest.mark.skipif(interpreting(), reason="an interpreted kernel cannot be compiled")
def test_gate_b_finds_a_tile_that_spills(tmp_path):
    kernel = pytest.importorskip("rewire.kernels.target_nll.kernel")
    whole = next(v for v in kernel.variants() if v.kernel is kernel.kl_kernel and v.default)
    wide = replace(whole, constants=dict(whole.constants) | {"BLOCK": 32768}, num_warps=8)
    assert any("spills" in line for line in gate_b.complaints(wide, 90, gate_b.compile_variant(wide, 90, tmp_path)))
