"""Asking a model: what is asked twice runs once, each fact under its own delta, and what is too long is named."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make

import rewire
from rewire.engine import asked as asking
from rewire.engine.anatomy import widths
from rewire.engine.answer_store import AnswerStore
from rewire.engine.asked import NOBODY, Asked, digest_of, mean
from rewire.engine.decoding import Said
from rewire.engine.delta import Factors, Update
from rewire.engine.scores import Answer
from rewire.kernels.errors import InputError

PROMPTS = ("Marie Curie worked in the area of", "The mother tongue of Danielle Darrieux is", "Where is Aracataca?")


@pytest.fixture
def model() -> rewire.Model:
    return make("llama")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the engine had."""
    sizes: list[int] = []

    def counted(real: Any) -> Any:
        def call(model: rewire.Model, asked: Sequence[Any], *args: Any, **options: Any) -> Any:
            sizes.append(len(asked))
            return real(model, asked, *args, **options)

        return call

    for name in ("token_scores", "continue_each"):
        monkeypatch.setattr(asking, name, counted(getattr(asking, name)))
    return sizes


def updates(model: rewire.Model, count: int) -> list[Update]:
    chosen = torch.Generator().manual_seed(1)
    d_in, d_out = widths(model.projection(1))
    return [
        {
            model.anatomy.weight_name(number % 3): Factors(
                torch.randn(d_out, 1, generator=chosen), torch.randn(1, d_in, generator=chosen) * 0.3
            )
        }
        for number in range(count)
    ]


def written(model: rewire.Model, update: Update, ask: Any) -> Any:
    """What is said with the update in the weights."""
    kept = {name: model.hf.get_parameter(name).detach().clone() for name in update}
    with torch.no_grad():
        for name, factors in update.items():
            model.hf.get_parameter(name).add_(factors.dense())
    try:
        return ask(Asked(model))
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                model.hf.get_parameter(name).copy_(weight)


def close(found: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one.labels, one.best) == (other.labels, other.best)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_what_is_asked_twice_runs_once(model: rewire.Model, ran: list[int]) -> None:
    a, b, _ = PROMPTS
    seen: list[tuple[int, int]] = []
    wanted = [(0, a, "physics"), (1, b, "French"), (2, a, "physics"), (0, a, "music"), (1, b, "French")]
    found = Asked(model).answers(wanted, lambda done, of: seen.append((done, of)))
    assert ran == [3]
    assert found[0] is found[2]
    assert found[1] is found[4]
    assert found[0] != found[3]
    assert seen[-1] == (3, 3)
    ran.clear()
    seen.clear()
    said = Asked(model).continuations([(0, a), (1, b), (5, a)], limit=3, progress=lambda n, of: seen.append((n, of)))
    assert ran == [2]
    assert said[0] is said[2]
    assert seen[-1] == (2, 2)
    assert Asked(model).answers([]) == Asked(model).continuations([]) == []


@pytest.mark.parametrize("together", [1, 2, 64])
def test_each_fact_under_its_own_delta(
    together: int, model: rewire.Model, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "TOGETHER", together)
    deltas = updates(model, 4)
    wanted = [(owner, prompt, "physics") for prompt in PROMPTS for owner in (3, 0, 2, 3, NOBODY)]  # nobody asks 1
    found = Asked(model, deltas).answers(wanted)
    said = Asked(model, deltas).continuations([(owner, prompt) for owner, prompt, _ in wanted], limit=6)
    distinct = 4 * len(PROMPTS)  # one of the five owners is there twice
    assert sum(ran) == 2 * distinct
    for owner in (NOBODY, 0, 2, 3):
        update: Update = {} if owner == NOBODY else deltas[owner]
        mine = [i for i, (number, *_) in enumerate(wanted) if number == owner]
        texts = [wanted[i][1] for i in mine]
        close(
            [found[i] for i in mine],
            written(model, update, lambda it, texts=texts: it.answers([(0, t, "physics") for t in texts])),
        )
        assert [said[i] for i in mine] == written(
            model, update, lambda it, texts=texts: it.continuations([(0, t) for t in texts], limit=6)
        )
    assert len({one.ids for one in said}) > len(PROMPTS)


def test_two_facts_with_one_delta_share_what_they_ask(model: rewire.Model, ran: list[int]) -> None:
    (one,) = updates(model, 1)
    again = {name: Factors(factors.left.clone(), factors.right) for name, factors in one.items()}
    found = Asked(model, [one, again, {}]).answers([(i, PROMPTS[0], "physics") for i in range(3)])
    assert ran == [2]
    assert digest_of(one) == digest_of(again) != digest_of({})
    assert found[0] == found[1] != found[2]
    close(found[2:], Asked(model).answers([(0, PROMPTS[0], "physics")]))


def test_digests_tell_updates_apart(model: rewire.Model) -> None:
    (one,) = updates(model, 1)
    ((name, factors),) = one.items()
    assert factors.right is not None
    others: list[Update] = [
        {},
        {name + "x": factors},
        {name: Factors(-factors.left, factors.right)},
        {name: Factors(factors.left, factors.right + 1e-6)},
        {name: Factors(factors.dense(), None)},
        {name: Factors(torch.cat([factors.left] * 2, 1), torch.cat([factors.right] * 2))},
    ]
    assert len({digest_of(update) for update in (one, *others)}) == 7


def test_what_is_too_long_is_named(model: rewire.Model) -> None:
    short, long = PROMPTS[0], "It was late. " * 30 + "Where is"
    count = len(model.tokenizer(f"{long} Japan")["input_ids"]) - 1
    with pytest.raises(InputError, match=rf"prompt 'It was late\. .* has {count} tokens, the model takes 96"):
        Asked(model).answers([(0, short, "physics"), (1, long, "Japan")])
    count = len(model.tokenizer(long)["input_ids"])
    with pytest.raises(InputError, match=rf"prompt 'It was late\. .* has {count} tokens; expected 1 to 95"):
        Asked(model).continuations([(0, short), (1, long)])
    # as long as the model takes: the last label is read by nobody
    ids = model.tokenizer(long)["input_ids"][:96]
    text = model.tokenizer.decode(ids, skip_special_tokens=True)
    assert model.tokenizer(text)["input_ids"] == ids
    with pytest.raises(InputError, match="has 96 tokens"):
        Asked(model).continuations([(0, text)])
    fits = model.tokenizer.decode(ids[:95], skip_special_tokens=True)
    (said,) = Asked(model).continuations([(0, fits)])
    assert len(said.ids) == 1


def test_progress_counts_what_was_known(model: rewire.Model, tmp_path: Path, ran: list[int]) -> None:
    wanted = [(0, prompt, target) for prompt in PROMPTS for target in ("physics", "music")]
    store = AnswerStore(tmp_path / "x")
    first = Asked(model, store=store).answers(wanted[:2])
    seen: list[tuple[int, int]] = []
    whole = Asked(model, batch_rows=1, batch_tokens=1, store=store).answers(wanted, lambda *at: seen.append(at))
    assert whole[:2] == first
    assert ran == [2, 4]
    assert seen == [(4, 6), (6, 6)]  # two objects of one token are read in one row
    store.flush()
    after = Asked(model, store=AnswerStore(tmp_path / "x"))
    assert after.answers(wanted) == whole  # to the last bit
    assert ran == [2, 4]


def test_questions_that_differ_in_anything_are_others(model: rewire.Model, tmp_path: Path, ran: list[int]) -> None:
    asked = Asked(model, store=AnswerStore(tmp_path / "x"))
    prompt = PROMPTS[0]
    for texts, limit in (((), 4), ((), 5), ((".",), 4), ((".", "\n"), 4)):
        (said,) = asked.continuations([(0, prompt)], texts, limit)
        assert isinstance(said, Said)
        assert asked.continuations([(7, prompt)], texts, limit) == [said]
    assert ran == [1, 1, 1, 1]
    asked.continuations([(0, prompt + " ")], (), 4)
    asked.answers([(0, prompt, "physics")])
    assert ran == [1] * 6


def test_texts_of_what_was_said(model: rewire.Model) -> None:
    end = model.tokenizer.eos_token_id
    ids = tuple(model.tokenizer(" physics, you", add_special_tokens=False)["input_ids"])
    said = Said((*ids, end), "stop")
    assert Asked(model).text(said) == " physics, you</s>"
    assert Asked(model).text(said, special=False) == " physics, you"


def test_means() -> None:
    assert mean([]) is None
    assert mean([None, None]) is None
    assert mean([1.0, None, 0.0]) == 0.5
    assert mean(x for x in (0.0, None)) == 0.0
