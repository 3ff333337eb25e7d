"""Rows that begin alike, read as one tree: to rounding what each gives alone."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_models import FAMILIES, VOCAB, build, make, tokenizer
from torch import Tensor

import rewire
from rewire.engine import branches, passes, scores
from rewire.engine.anatomy import widths
from rewire.engine.beside import Beside
from rewire.engine.branches import can_branch, grow
from rewire.engine.delta import Factors, Update
from rewire.engine.prompts import Row
from rewire.engine.scores import Answer, token_scores

WINDOWED = {"mistral", "gemma2", "gemma3_text", "gemma3"}  # they see 8 tokens
EXACT = {"gptj": 1e-6, "gpt_neo": 1e-6}  # their attention computes in float32 whatever it is given


@pytest.fixture(autouse=True)
def all_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are rounded to float32 otherwise, and so is what attention written out takes the softmax of."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim=dim))

    def logits(self: rewire.Model, hidden: Tensor) -> Tensor:
        found: Tensor = self.head(hidden)
        cap = self.anatomy.softcap
        return found if cap is None else torch.tanh(found / cap) * cap

    monkeypatch.setattr(rewire.Model, "logits", logits)


def double(family: str, eager: bool = False) -> rewire.Model:
    model = make(family)
    model.hf.double()
    if eager:
        model.hf.set_attn_implementation("eager")  # type: ignore[operator]
    return model


def some_rows() -> list[Row]:
    """Questions with several answers, one the beginning of another, the same twice, alone, and of a single token."""
    chosen = random.Random(3)

    def ids(count: int) -> list[int]:
        return [chosen.randrange(2, VOCAB) for _ in range(count)]

    made: list[Row] = []
    for length in (12, 5, 20):
        question = ids(length)
        for answer in (1, 2, 5, 1):
            row = [*question, *ids(answer)]
            made.append(Row(tuple(row[:-1]), labels=tuple(row[-answer:])))
    long = ids(25)
    made += [Row(tuple(long[:end]), labels=tuple(long[end : end + 1])) for end in (24, 13, 18, 23)]  # nested
    made += [made[1], Row(made[2].ids, labels=made[2].labels[-1:])]  # the same, and the same ids with fewer labels
    made += [Row((5,), labels=(9,)), Row((5, 9), labels=(9, 2)), Row(tuple(ids(30)), labels=tuple(ids(30)))]
    made += [Row((*long[:11], *ids(4)), labels=(7,))]  # alike for less than half
    chosen.shuffle(made)
    return made


def alone(model: rewire.Model, row: Row) -> Answer:
    """By the plainest forward."""
    with torch.no_grad():
        logp = model.hf(torch.tensor([row.ids])).logits[0].log_softmax(-1)[len(row.ids) - len(row.labels) :]
    found = [float(line[label]) for line, label in zip(logp, row.labels, strict=True)]
    return Answer(row.labels, tuple(logp.argmax(-1).tolist()), tuple(found))


def same(found: list[Answer], wanted: list[Answer], within: float = 1e-12) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one.labels, one.best) == (other.labels, other.best)
        assert one.logprobs == pytest.approx(other.logprobs, rel=0, abs=within)


def tokens_read(model: rewire.Model) -> tuple[list[int], Callable[[], None]]:
    read: list[int] = []
    handle = model.block(0).register_forward_pre_hook(lambda module, args: read.append(args[0][..., 0].numel()))
    return read, handle.remove


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_trees_are_those_of_rows(family: str, eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = double(family, eager), some_rows()
    monkeypatch.setattr(scores, "WORTH", 1)
    assert can_branch(model, 40) is (family not in WINDOWED)
    wanted = [alone(model, row) for row in rows]
    read, stop = tokens_read(model)
    same(token_scores(model, rows, batch_tokens=10**6), wanted, EXACT.get(family, 1e-12))
    branched = sum(read)
    read.clear()
    monkeypatch.setattr(scores, "WORTH", 10**9)
    same(token_scores(model, rows, batch_tokens=150), wanted, EXACT.get(family, 1e-12))
    stop()
    assert family in WINDOWED or branched < sum(read)  # trees were read


def test_a_window_that_the_trial_does_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-Neo's local attention sees 16 tokens back, which the trial's 14 do not show; its configuration does."""
    kind = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "intermediate_size": 64, "window_size": 16}
    kind |= {"max_position_embeddings": 96, "attention_types": [[["global", "local"], 2]], "initializer_range": 0.2}
    model = rewire.wrap(build("GPTNeoForCausalLM", kind), tokenizer(), "gpt-neo")
    model.hf.double()
    rows = some_rows()
    monkeypatch.setattr(scores, "WORTH", 1)
    found = token_scores(model, rows, batch_tokens=10**6)
    same(found, [alone(model, row) for row in rows], EXACT["gpt_neo"])


def small_updates(model: rewire.Model, count: int) -> list[Update]:
    chosen = torch.Generator().manual_seed(0)
    d_in, d_out = widths(model.projection(1))
    return [
        {
            model.anatomy.weight_name(1 + number % 2): Factors(
                torch.randn(d_out, 2, generator=chosen) * 0.3, torch.randn(2, d_in, generator=chosen) * 0.3
            )
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_the_same_rows_under_several_deltas(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, each = double(family), some_rows()
    monkeypatch.setattr(scores, "WORTH", 1)
    deltas = small_updates(model, 2)
    owners = (-1, 0, 1)
    rows, owner = each * 3, [number for number in owners for _ in each]
    kept = {name: weight.detach().clone() for name, weight in model.hf.state_dict().items()}
    wanted = []
    for number in owners:
        with torch.no_grad():
            for name, factors in (deltas[number] if number >= 0 else {}).items():
                change = factors.dense()
                model.hf.get_parameter(name).add_(change.T if family == "gpt2" else change)
        wanted += [alone(model, row) for row in each]
        model.hf.load_state_dict(kept)
    order = list(range(len(rows)))
    random.Random(1).shuffle(order)
    for more in ({"batch_tokens": 10**6}, {"batch_rows": 1}, {"batch_tokens": 40, "batch_rows": 2}):
        entered: list[int] = []
        with Beside(model, deltas) as beside:

            def enter(owners: Any, beside: Beside = beside, entered: list[int] = entered) -> None:
                entered.append(len(owners))
                beside.enter(owners)

            mine = [owner[i] for i in order]
            found = token_scores(model, [rows[i] for i in order], owner=mine, enter=enter, **more)
        # trees: several rows in one; the first is a trial's; a family with a window that is short has none
        assert (sum(entered[1:]) < len(rows)) == (family != "mistral")
        assert [a.labels for a in found] == [rows[i].labels for i in order]
        for i, one in zip(order, found, strict=True):
            # factors are float32, and are added in another order than they are written in
            assert one.logprobs == pytest.approx(wanted[i].logprobs, rel=0, abs=1e-5)
        assert [a.best for a in found] == [wanted[i].best for i in order]


def test_batches_of_any_size_and_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = double("llama"), some_rows()
    monkeypatch.setattr(scores, "WORTH", 1)
    wanted = token_scores(model, rows, batch_tokens=10**6)
    forwards: list[int] = []
    handle = model.block(0).register_forward_pre_hook(lambda module, args: forwards.append(len(args[0])))
    for more in (
        {"batch_tokens": 1},
        {"batch_tokens": 33},
        {"batch_rows": 1},
        {"batch_rows": 3, "batch_tokens": 10**6},
    ):
        seen: list[tuple[int, int]] = []
        told: dict[int, Answer] = {}
        forwards.clear()
        same(token_scores(model, rows, progress=lambda a, b: seen.append((a, b)), each=told.update, **more), wanted)  # noqa: B023
        assert seen[-1] == (len(rows), len(rows))
        assert seen == sorted(set(seen))
        same([told[i] for i in range(len(rows))], wanted)
        trial = 3  # forwards of `can_branch`, one row each
        assert max(forwards[trial:]) <= more.get("batch_rows", 99)
    handle.remove()
    assert token_scores(model, []) == []
    same(token_scores(model, rows[:1]), wanted[:1])


def trees_of(rows: list[Row], owner: list[int]) -> Iterator[Any]:
    trees = grow(rows, owner)
    assert sorted(number for tree in trees for number in tree.rows) == list(range(len(rows)))
    for tree in trees:
        assert len(tree.ids) == len(tree.positions) == len(tree.branch)
        for number, places in tree.rows.items():
            assert [tree.ids[place] for place in places] == list(rows[number].ids)
            assert [tree.positions[place] for place in places] == list(range(len(places)))
            inside = {tree.branch[place] for place in places} - {0}
            assert len(inside) <= 1
            # all that this branch has, and all of the trunk before it: nothing of the row's is hidden from it
            assert places == [i for i, of in enumerate(tree.branch) if of == 0 or of in inside][: len(places)]
        assert not owner or len({owner[number] for number in tree.rows}) == 1
        yield tree


def test_trees_hold_their_rows() -> None:
    chosen = random.Random(0)
    for seed in range(150):
        letters = chosen.choice((2, 3, 50))
        rows = [
            Row(tuple(chosen.randrange(letters) for _ in range(chosen.randint(1, 14))), labels=(1,))
            for _ in range(chosen.randint(0, 25))
        ]
        owner = [chosen.randrange(3) for _ in rows] if seed % 2 else []
        for tree in trees_of(rows, owner):
            longest = max(len(row.ids) for row in (rows[number] for number in tree.rows))
            assert not tree.branch[-1] or 2 * tree.branch.count(0) >= longest


def test_a_beginning_that_all_share_makes_no_endless_row() -> None:
    """Under the published chat text whole data sets begin alike for half of their rows."""
    head = tuple(range(2, 42))
    rows = [Row((*head, 50 + i // 300, 50 + i % 300, *([7] * (i % 9))), labels=(3,)) for i in range(3000)]
    trees = list(trees_of(rows, []))
    assert max(len(tree.ids) for tree in trees) <= branches.LONGEST
    assert sum(len(tree.ids) for tree in trees) < 0.35 * sum(len(row.ids) for row in rows)
    (one,) = grow([Row(tuple(range(2 * branches.LONGEST)), labels=(1,))])  # a row longer than that is read as it is
    assert len(one.ids) == 2 * branches.LONGEST


def test_what_branching_would_break_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("llama")
    assert can_branch(model, 20)
    real = passes.forward

    def without(name: str) -> Callable[..., None]:
        return lambda model, ids, **kwargs: real(model, ids, **{k: v for k, v in kwargs.items() if k != name})

    for name in ("attention_mask", "position_ids"):
        monkeypatch.setattr(passes, "forward", without(name))
        assert not can_branch(model, 20)
