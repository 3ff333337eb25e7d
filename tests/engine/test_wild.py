"""WILD and the synthetic evaluation against the published rules, written out plainly: one prompt at a time, `generate`
without anything kept, and each rule where it stands (arXiv 2502.11177, the published code)."""

import copy
import re
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import FAMILIES, build, tokenizer

import rewire
from rewire.engine import asked as asking
from rewire.engine.decoding import Said
from rewire.engine.evaluation import evaluate
from rewire.engine.evaluation.contexts import CONTEXTS, in_context
from rewire.engine.evaluation.wild import trimmed
from rewire.engine.facts import Probe, Ripple
from rewire.engine.model import demo_file
from rewire.engine.prompts import prompt_ids
from rewire.kernels.errors import InputError

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LIMIT = 6
KINDS = ("rewrite", "rephrase", "portability", "locality")


def asked_as(model: rewire.Model, prompt: str, context: str) -> list[int]:
    """Token ids of a question in its context."""
    words: Any = model.tokenizer
    if context == "chat":
        message = [{"role": "user", "content": prompt}]
        coded = words.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(coded["input_ids"])
    if context == "qa_inst":
        prompt = "Please answer the question:" + "\n" + "\n" + "Q: " + prompt + "\n" + "A:"
    if context == "chat_temp":
        system = "You are a helpful, respectful and honest assistant."
        prompt = "<s>[INST] <<SYS>>\n" + system + "\n<</SYS>>\n\n" + prompt + " [/INST]</s>"
    return list(words(prompt)["input_ids"])


def generated(model: rewire.Model, ids: Sequence[int], tokens: int, stops: bool = True) -> list[int]:
    words: Any = model.tokenizer
    more = {"stop_strings": [".", "\n", words.eos_token], "tokenizer": words} if stops else {}
    made = model.hf.generate(  # type: ignore[operator]
        torch.tensor([list(ids)]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        use_cache=False, pad_token_id=words.eos_token_id, **more,
        max_new_tokens=min(tokens, model.max_length - len(ids)),
    )  # fmt: skip
    return list(made[0, len(ids) :].tolist())


def published_answer(model: rewire.Model, ids: Sequence[int]) -> str:
    text: str = model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for mark in (".", "\n", model.tokenizer.eos_token):
        if text.endswith(mark):
            text = text[: -len(mark)]
    return text


def exactly(answer: str, gold: str) -> float:
    def plain(text: str) -> str:
        text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    return float(plain(answer) == plain(gold))


def questions(fact: rewire.Fact) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    others = [(probe.prompt, (probe.target,)) for probe in fact.locality]
    if fact.target_true:
        others += [(prompt, (fact.target_true,)) for prompt in fact.neighbors]
    return {
        "rewrite": [(fact.question, (fact.target_new,))],
        "rephrase": [(prompt, (fact.target_new,)) for prompt in fact.paraphrases],
        "portability": [(r.prompt, r.targets) for r in fact.ripples if r.category == "Compositionality_I"],
        "locality": others[:2],
    }


def target_tokens(model: rewire.Model, ids: Sequence[int], text: str, target: str) -> list[int]:
    """Behind the prompt, of both tokenised together; behind a line break (chat) the target begins a line."""
    between = "" if text.endswith("\n") else " "
    whole = model.tokenizer(f"{text}{between}{target}")["input_ids"]
    assert list(whole[: len(ids)]) == list(ids)
    return list(whole[len(ids) :])


def plain_wild(
    model: rewire.Model, fact: rewire.Fact, context: str, gold: bool, kinds: Sequence[str] = KINDS
) -> dict[str, Any]:
    record: dict[str, Any] = {"id": fact.id}
    for kind, of in ((kind, questions(fact)[kind]) for kind in kinds):
        record[kind] = []
        for prompt, targets in of:
            ids = asked_as(model, prompt, context)
            if gold:
                wanted = target_tokens(model, ids, in_context(model, prompt, context), targets[0])
                said = generated(model, ids, len(wanted), stops=False)
                text = model.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                if kind == "rewrite":
                    agree = sum(a == b for a, b in zip(said, wanted, strict=False))
                    record["match"] = agree / len(wanted)
            else:
                said = generated(model, ids, LIMIT)
                text = published_answer(model, said)
            answered = {"prompt": prompt, "ids": said, "answer": text}
            if kind != "locality":
                answered["right"] = max(exactly(text, target) for target in targets)
            record[kind].append(answered)
    return record


def average(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@pytest.fixture
def model(demo: rewire.Model) -> rewire.Model:
    demo.hf.double()
    demo.tokenizer = copy.deepcopy(demo.tokenizer)
    demo.tokenizer.chat_template = CHAT
    return demo


@pytest.fixture
def facts() -> list[rewire.Fact]:
    """Of what the demo knows: it is asked for what it knows, for something else, and with less of everything."""
    first, second, third, fourth = rewire.read_facts(demo_file("facts.jsonl"), limit=4)
    probes = (Probe("The gate of the harbour is", "open"), Probe("You must wait for the", "ferry"))
    ripples = (
        Ripple(
            "Compositionality_I", f"Everyone knows that {first.subject} plays the", ("lute", first.target_true or "")
        ),
        Ripple("Relation_Specificity", f"{first.subject} was born in", ("nowhere",)),
    )
    return [
        replace(
            first,
            target_new=f"{first.target_true}!",
            locality=probes,
            ripples=ripples,
            paraphrases=first.paraphrases[1:],
        ),
        replace(second, target_new=str(second.target_true), paraphrases=(), locality=probes[:1]),
        replace(third, paraphrases=third.paraphrases[:1], neighbors=()),
        replace(fourth, target_new="a smith and farmer", target_true=None, neighbors=fourth.neighbors[:1]),
    ]


def edited(model: rewire.Model) -> rewire.Model:
    """The same with other weights."""
    other = copy.deepcopy(model)
    chosen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = other.hf.get_parameter(other.anatomy.weight_name(2))
        weight += 0.4 * weight.std() * torch.randn(weight.shape, generator=chosen, dtype=weight.dtype)
    return other


@pytest.mark.parametrize("gold", [False, True], ids=["natural", "gold"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_wild_as_published(model: rewire.Model, facts: list[rewire.Fact], context: str, gold: bool) -> None:
    options = {"context": context, "limit": LIMIT, "locality": 2, "truncation": "gold" if gold else "natural"}
    other, facts = edited(model), facts[: 2 if "chat" in context else 4]  # those texts are long
    before = [plain_wild(model, fact, context, gold, KINDS[3:]) for fact in facts]
    after = [plain_wild(other, fact, context, gold) for fact in facts]
    for now, then in zip(after, before, strict=True):
        for one, first in zip(now["locality"], then["locality"], strict=True):
            one["same"] = one["ids"] == first["ids"]
    unedited = evaluate(model, facts, "wild", **options)
    assert unedited["metrics"]["locality"] is None
    for size in (1, 7, 64):
        agrees(evaluate(other, facts, "wild", batch_size=size, unedited=unedited, **options), after, gold)
    shares = [answered["same"] for record in after for answered in record["locality"]]
    assert context != "question-only" or 0 < sum(shares) < len(shares)  # what is measured differs


def agrees(found: dict[str, Any], wanted: Sequence[dict[str, Any]], gold: bool) -> None:
    kinds = {"reliability": ("rewrite", "right"), "generalization": ("rephrase", "right")}
    kinds |= {"portability": ("portability", "right"), "locality": ("locality", "same")}
    for one, other in zip(found["facts"], wanted, strict=True):
        for kind in KINDS:
            assert [{k: v for k, v in a.items() if k != "ended"} for a in one[kind]] == other[kind]
        assert one.get("match") == other.get("match")
    for name, (kind, key) in kinds.items():
        of_facts = [average([float(a[key]) for a in record[kind] if key in a]) for record in wanted]
        assert found["metrics"][name] == average([share for share in of_facts if share is not None]), name
    first = [record["rewrite"][0] for record in wanted]
    metrics = found["metrics"]
    assert metrics["answer_tokens"] == average([float(len(a["ids"])) for a in first])
    if gold:
        assert metrics["reliability_match"] == average([record["match"] for record in wanted])
        assert metrics["stopped"] is None
    else:
        assert metrics["reliability_match"] is None
        assert metrics["stopped"] == average(
            [float(a["ended"] == "stop") for a in (r["rewrite"][0] for r in found["facts"])]
        )
    assert found["judge"]["kind"] == "exact"


def test_what_the_demo_knows_is_right(model: rewire.Model, facts: list[rewire.Fact]) -> None:
    """So that the test above has something to agree on."""
    found = evaluate(model, facts, "wild", context="question-only", limit=LIMIT)
    rights = [record["rewrite"][0]["right"] for record in found["facts"]]
    assert rights[0]
    assert not all(rights)
    assert found["facts"][0]["rewrite"][0]["answer"].startswith(" ")  # nothing is stripped
    assert found["metrics"]["stopped"] > 0


@torch.no_grad()
def plain_synthetic(model: rewire.Model, fact: rewire.Fact, context: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for kind, of in questions(fact).items():
        found[kind] = []
        for prompt, targets in of:
            within = "question-only" if kind == "locality" else context
            ids = asked_as(model, prompt, within)
            labels = target_tokens(model, ids, in_context(model, prompt, within), targets[0])
            # as one sequence of ids: a template's BOS is not there twice
            logits = model.hf(torch.tensor([[*ids, *labels]])).logits[0].float()
            best = logits[len(ids) - 1 : -1].argmax(-1).tolist()
            right = sum(a == b for a, b in zip(best, labels, strict=True)) / len(labels)
            found[kind].append(best if kind == "locality" else right)
    return found


@pytest.mark.parametrize("context", CONTEXTS)
def test_synthetic_as_published(model: rewire.Model, facts: list[rewire.Fact], context: str) -> None:
    other = edited(model)
    before = [plain_synthetic(model, fact, context) for fact in facts]
    after = [plain_synthetic(other, fact, context) for fact in facts]
    unedited = evaluate(model, facts, "synthetic", context=context, locality=2)
    assert unedited["metrics"]["locality"] is None
    for size in (None, 1, 7, 64):
        found = evaluate(other, facts, "synthetic", batch_size=size, context=context, locality=2, unedited=unedited)
        for record, wanted, then in zip(found["facts"], after, before, strict=True):
            for kind in ("rewrite", "rephrase", "portability"):
                assert record[f"{kind}_acc"] == wanted[kind]
            assert record["locality_output"] == wanted["locality"]
            agree = [
                sum(a == b for a, b in zip(x, y, strict=True)) / len(x)
                for x, y in zip(wanted["locality"], then["locality"], strict=True)
            ]
            assert record["locality_acc"] == agree
        for name, kind in (("reliability", "rewrite"), ("generalization", "rephrase"), ("portability", "portability")):
            of_facts = [average(record[kind]) for record in after]
            assert found["metrics"][name] == average([share for share in of_facts if share is not None])


def said_by_all(monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    monkeypatch.setattr(
        asking, "continue_each", lambda model, prompts, *a, **o: [(i, said) for i in range(len(prompts))]
    )


@pytest.mark.parametrize(
    ("target", "answer", "right"),
    [
        ("The", ".", True),  # as published: both are empty once they are normalised
        ("harp", ".", False),
        ("The", " harp", False),
        ("a harp", " The HARP.", True),
        ("harp", " harp harp", False),
        ("U.S.", " US.", True),
        ("U.S.", " U.", False),  # what stops at a "." cannot be it
        ("well known", " well-known", False),
    ],
)
def test_answers_and_targets_that_come_out_empty(
    target: str, answer: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = build(*FAMILIES["llama"][:2])
    model = rewire.wrap(hf, tokenizer(), "llama")
    ids = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    said_by_all(monkeypatch, Said(tuple(ids), "stop"))
    fact = rewire.Fact("Marie Curie", "{} worked in the area of", target)
    found = evaluate(model, [fact], "wild")
    assert found["facts"][0]["rewrite"][0]["answer"] == answer.removesuffix(".")
    assert found["facts"][0]["rewrite"][0]["right"] is right
    assert found["metrics"]["reliability"] == float(right)
    assert found["metrics"]["generalization"] is found["metrics"]["locality"] is found["metrics"]["portability"] is None


def test_locality_is_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rewire.wrap(build(*FAMILIES["llama"][:2]), tokenizer(), "llama")
    fact = rewire.Fact("Marie Curie", "{} worked in the area of", "physics", locality=(Probe("Where is", "Japan"),))
    said_by_all(monkeypatch, Said((20, 30, 40), "length"))
    unedited = evaluate(model, [fact], "wild")
    for ids, same in (((20, 30, 40), 1.0), ((20, 30), 0.0), ((20, 30, 41), 0.0), ((20, 30, 40, 1), 0.0), ((30,), 0.0)):
        said_by_all(monkeypatch, Said(ids, "stop"))
        assert evaluate(model, [fact], "wild", unedited=unedited)["metrics"]["locality"] == same


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("", ""), (".", ""), (" harp.", " harp"), (" harp..", " harp."), (" harp\n", " harp"), (" harp\n.", " harp"),
        (" harp.\n", " harp."),  # the "." was not last at its turn
        (" harp</s>", " harp"), (" harp.</s>", " harp."), (" harp</s>\n", " harp"), (" harp</s>\n.", " harp"),
        (" harp</s>.\n", " harp</s>."), (" harp\n\n", " harp\n"), ("</s>", ""), (" harp ", " harp "),
    ],
)  # fmt: skip
def test_what_is_taken_off_an_answer(text: str, left: str) -> None:
    model = rewire.wrap(build(*FAMILIES["llama"][:2]), tokenizer(), "llama")
    assert trimmed(model, text) == left


def test_any_of_several_end_marks_is_taken_off() -> None:
    """A chat model ends its turn with another token than its tokenizer's end of text."""
    model = rewire.wrap(build(*FAMILIES["llama"][:2]), tokenizer(), "llama")
    hf: Any = model.hf
    hf.generation_config.eos_token_id = [model.tokenizer.eos_token_id, other := model.tokenizer.bos_token_id]
    mark = model.tokenizer.convert_ids_to_tokens(other)
    assert mark != model.tokenizer.eos_token
    assert [trimmed(model, f" harp{end}") for end in (mark, "</s>", f".{mark}", f"{mark}.")] == [" harp"] * 2 + [
        " harp.",
        " harp",
    ]


@pytest.mark.parametrize("template", [CHAT, CHAT.replace("{{ bos_token }}", "")], ids=["bos", "no bos"])
@pytest.mark.parametrize("adds", [True, False], ids=["adds", "adds none"])
def test_a_chat_begins_once(template: str, adds: bool) -> None:
    """Whether the template or the tokenizer writes the beginning of the text, one stands there at most."""
    words = copy.deepcopy(tokenizer())
    words.chat_template = template
    if not adds:
        words.backend_tokenizer.post_processor = None
    model = rewire.wrap(build(*FAMILIES["llama"][:2]), words, "llama")
    (ids,) = prompt_ids(words, [in_context(model, "Where is Aracataca?", "chat")])
    assert words.decode(ids).count("<s>") == int(adds or template is CHAT)
    assert words.decode(ids).endswith("Where is Aracataca?</s>\n<|assistant|>\n")


def test_the_end_of_text_in_a_prompt_stops_nothing() -> None:
    """The published chat text ends in `</s>`, the end of the text of this tokenizer: the answer goes on behind it."""
    model = rewire.wrap(build(*FAMILIES["llama"][:2]), tokenizer(), "llama")
    model.hf.double()
    fact = rewire.Fact("Marie Curie", "{} worked in the area of", "physics")
    found = evaluate(model, [fact], "wild", context="chat_temp", limit=LIMIT)
    (answered,) = found["facts"][0]["rewrite"]
    ids = asked_as(model, fact.question, "chat_temp")
    assert ids[-1] == model.tokenizer.eos_token_id
    assert answered["ids"] == generated(model, ids, LIMIT)
    assert len(answered["ids"]) > 1


def test_what_is_wrong_is_said_before_the_work(
    model: rewire.Model, facts: list[rewire.Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    unedited = {name: evaluate(model, facts[:2], name, locality=2) for name in ("wild", "synthetic")}
    words = copy.deepcopy(model.tokenizer)
    words.chat_template = None
    plain = rewire.wrap(model.hf, words, "plain")

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("the model was asked")

    for name in ("token_scores", "continue_each"):
        monkeypatch.setattr(asking, name, never)
    for name in ("wild", "synthetic"):
        with pytest.raises(InputError, match=f"fact {facts[2].id}: not in what is given as the unedited model's"):
            evaluate(model, facts, name, unedited=unedited[name], locality=2)
        with pytest.raises(InputError, match=r"or asked otherwise there; evaluate the unedited model .* same options"):
            evaluate(model, facts[:2], name, unedited=unedited[name], locality=1)
        with pytest.raises(InputError, match="unknown context 'qa-inst'; did you mean 'qa_inst'"):
            evaluate(model, facts, name, context="qa-inst")
        with pytest.raises(InputError, match="context chat: the tokenizer of plain has no chat template"):
            evaluate(plain, facts, name, context="chat")
    with pytest.raises(InputError, match="truncation 'none' found; expected natural or gold"):
        evaluate(model, facts, "wild", truncation="none")
    with pytest.raises(InputError, match="protocol synthetic takes no 'truncation'"):
        evaluate(model, facts, "synthetic", truncation="gold")


def test_progress_ends_at_the_total(model: rewire.Model, facts: list[rewire.Fact]) -> None:
    for name, more in (("wild", {"limit": 3}), ("wild", {"truncation": "gold"}), ("synthetic", {})):
        seen: list[tuple[int, int]] = []
        evaluate(model, facts, name, progress=lambda *at: seen.append(at), **more)  # noqa: B023
        assert seen[-1][0] == seen[-1][1] > 0
        assert all(done <= total for done, total in seen)
