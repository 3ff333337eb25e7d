"""A test of what follows from an edit, and RippleEdits in its three forms: of its authors, flat, and KnowEdit's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rewire.engine.datasets import read_facts, scan_facts
from rewire.engine.facts import RIPPLES, Fact, Query, Ripple, from_record
from rewire.kernels.errors import InputError

PARIS = {"subject": "Paris", "prompt": "{} lies in", "target_new": "Italy"}
RIPPLE = {"category": "Forgetfulness", "prompt": "Paris is", "targets": ["big"]}


def test_a_ripple_has_all_questions_of_its_test(tmp_path: Path) -> None:
    mayor = {"prompt": "The mayor of Rome is", "targets": "Gualtieri "}
    full = {**RIPPLE, "conditions": [mayor], "others": [{"prompt": "Paris looks", "targets": ["big", "huge"]}]}
    first, second = from_record({**PARIS, "ripples": [full, {**RIPPLE, "needs_all": True}]}).ripples
    assert first.conditions == (Query("The mayor of Rome is", ("Gualtieri",)),), "one text is a list of one"
    assert first.queries == (Query("Paris is", ("big",)), Query("Paris looks", ("big", "huge")))
    assert not first.needs_all
    assert second == Ripple("Forgetfulness", "Paris is", ("big",), needs_all=True)
    assert second.queries == (second.query,)
    table = tmp_path / "facts.csv"
    table.write_text(
        f'subject,prompt,target_new,ripples\nParis,{{}} is,big,"{json.dumps([full]).replace(chr(34), chr(34) * 2)}"\n'
    )
    assert read_facts(table)[0].ripples == (first,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ripples": [{"category": "Forgetfulness", "prompt": "x"}]}, "expected objects with category, prompt"),
        ({"ripples": [{**RIPPLE, "target": "x"}]}, "expected objects with category, prompt"),
        (
            {"ripples": [{**RIPPLE, "category": "Reasoning"}]},
            "category 'Reasoning' in ripples, expected one of Logical_",
        ),
        ({"ripples": [{**RIPPLE, "targets": []}]}, "targets in ripples is empty"),
        ({"ripples": [{**RIPPLE, "targets": ["x", ""]}]}, "targets in ripples is empty"),
        ({"ripples": [{**RIPPLE, "targets": 5}]}, "targets in ripples is int"),
        ({"ripples": [{**RIPPLE, "prompt": " "}]}, "prompt in ripples is empty"),
        ({"ripples": [{**RIPPLE, "needs_all": 1}]}, "needs_all in ripples is int, expected true or false"),
        ({"ripples": [{**RIPPLE, "others": ["x"]}]}, "others in ripples holds 'x', expected objects with prompt and"),
        ({"ripples": [{**RIPPLE, "conditions": {}, "others": 5}]}, "others in ripples is int, expected a list"),
    ],
)
def test_what_is_no_ripple(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=re.escape(reason)):
        from_record({**PARIS, **change})


def query(prompt: str, *answers: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """A question as the authors write it; each of `answers` an object's name and its aliases."""
    said = [{"value": value, "aliases": list(aliases)} for value, *aliases in answers]
    return {"prompt": prompt, "answers": said, "query_type": "regular", "subject_id": "Q1", "phrase": None, **more}


def case(*asked: dict[str, Any], condition: str = "OR", known: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"test_queries": list(asked), "test_condition": condition, "condition_queries": list(known)}


def edit(statement: str, true: str | None = None, **more: Any) -> dict[str, Any]:
    record = {"prompt": statement, "subject_id": "Q1", "relation": "", "target_id": "Q2", **more}
    return record | ({} if true is None else {"original_fact": {"prompt": true, "subject_id": "Q1", "target_id": "Q3"}})


def original(of: dict[str, Any], **tests: Any) -> dict[str, Any]:
    return {"example_type": "popular", "edit": of} | {name: [] for name in RIPPLES} | tests


LEO = original(
    edit(
        "The name of the country of citizenship of Leonardo DiCaprio is Syria.",
        "The name of the country of citizenship of Leonardo DiCaprio is United States of America.",
        relation="COUNTRY_OF_CITIZENSHIP",
    ),
    Subject_Aliasing=[case(query("The name of the country of citizenship of Leo is", ("Syria", "SYR", "S", "7")))],
    Logical_Generalization=[
        case(query("Leo votes in", ("Syria",)), query("Leo's passport is of", ("Syria",), ("Assyria",))),
        case(query("Leo is", ("Syrian",)), query("Leo was born", ("",)), condition="AND"),
        case(query("Leo is", ("Syrian",)), query("Leo pays taxes to", ("Syria",)), condition="AND"),
    ],
    Compositionality_I=[
        case(
            query("", ("Arabic",), phrase="The official language of the country of Leo is", query_type="two_hop"),
            known=(query("The official language of Syria is", ("Arabic", "al-arabiyya")),),
        ),
        case(query("Nobody knows", ("",))),
    ],
)


def read(path: Path, *records: Any) -> list[Fact]:
    path = path / "any.json"
    path.write_text(json.dumps(records))
    return read_facts(path)


def test_the_form_of_the_authors(tmp_path: Path) -> None:
    first, second = read(tmp_path, LEO, {**LEO, "Forgetfulness": [case(query("The mother of Leo is", ("Irmelin",)))]})
    subject, prompt = "Leonardo DiCaprio", "The name of the country of citizenship of {} is"
    passport = Query("Leo's passport is of", ("Syria", "Assyria"))
    taxes = Query("Leo pays taxes to", ("Syria",))
    language = Query("The official language of Syria is", ("Arabic", "al-arabiyya"))
    assert first == Fact(
        subject, prompt, "Syria", "United States of America", id="0",
        ripples=(
            Ripple("Logical_Generalization", "Leo votes in", ("Syria",), others=(passport,)),
            Ripple("Logical_Generalization", "Leo is", ("Syrian",), others=(taxes,), needs_all=True),
            Ripple("Compositionality_I", "The official language of the country of Leo is", ("Arabic",), (language,)),
            Ripple("Subject_Aliasing", "The name of the country of citizenship of Leo is", ("Syria", "SYR", "7")),
        ),
    )  # fmt: skip
    assert second.id == "1"
    assert second.ripples[-1] == Ripple("Forgetfulness", "The mother of Leo is", ("Irmelin",))


def test_a_category_as_the_authors_misspell_it(tmp_path: Path) -> None:
    record = {key: value for key, value in LEO.items() if key not in RIPPLES}
    (fact,) = read(tmp_path, {**record, "Relation_Specifity": [case(query("The mother of Leo is", ("Irmelin",)))]})
    assert [ripple.category for ripple in fact.ripples] == ["Relation_Specificity"]


@pytest.mark.parametrize(
    ("marked", "relation"),
    [
        ("The name of the mother of [Duke of York] is = Ann", "MOTHER"),
        ("The gender of [Peter A Lazzarini] is = male", "SEX_OR_GENDER"),
        ("The name of the author of [the hobbit] is = Bob", "AUTHOR"),
        ("The place of birth of [É. Zola] is = St. Denis", "PLACE_OF_BIRTH"),
        ("The name of the head of state of [Isle of Man] is = Ann", ""),
        ("The eye color of the duke of [York] is = red", ""),
        ("The names of the siblings of [Ann Lee] are = Bob", "SIBLING"),
        ("[Super Bowl LV] is followed by = Super Bowl I", "FOLLOWED_BY"),
        ("[The Two Towers] follows = Dune", "FOLLOWS"),
        ("The name of the sports team which [Ann] is a member of is = FC Rome", "MEMBER_OF_SPORTS_TEAM"),
        ("The name of the league which [Pau Gasol] plays in is = NBA", "LEAGUE"),
        ("The name of the country which [City of Rome] is the capital of is = Mali", "CAPITAL_OF"),
        ("The name of the position held by [Earl of Rome] is = pope", "POSITION_HELD"),
        ("The name of the currency in [Mali] is = euro", "CURRENCY"),
        ("The name of the award [Ann] won is = Oscar", "AWARD_RECEIVED"),
        ("The number of children [Ann] has is = 3", "NUMBER_OF_CHILDREN"),
    ],
)
def test_a_statement_is_taken_apart(tmp_path: Path, marked: str, relation: str) -> None:
    before, subject, behind, target = re.fullmatch(r"(.*)\[(.+)\](.*) = (.+)", marked).groups()  # type: ignore[union-attr]
    (fact,) = read(tmp_path, original(edit(f"{before}{subject}{behind} {target}.", relation=relation)))
    assert (fact.prompt, fact.subject) == (f"{before}{{}}{behind}", subject)
    assert (fact.target_new, fact.target_true) == (target, None)


def test_the_true_statement_says_where_to_split(tmp_path: Path) -> None:
    new, true = "The name of the author of X is What is art.", "The name of the author of X is Bob."
    first, second, third = read(
        tmp_path,
        original(edit(new, true)),
        original(edit(new)),
        original(edit("The name of the author of X is Bob.", "The name of the author of X is .")),
    )
    assert (first.prompt, first.target_new, first.target_true) == (
        "The name of the author of {} is",
        "What is art",
        "Bob",
    )
    assert second.target_new == "art", "nothing says otherwise"
    assert (third.target_new, third.target_true) == ("Bob", None)


def test_labels_go_first(tmp_path: Path) -> None:
    labels = {"subject_label": "Ann of York", "target_label": "Bob is art"}
    statement = "The name of the author of Ann of York is Bob is art."
    before = {"prompt": "The name of the author of Ann of York is X.", "target_label": "X Y"}
    (fact,) = read(tmp_path, original(edit(statement, **labels, previous_fact=before)))
    assert (fact.prompt, fact.subject) == ("The name of the author of {} is", "Ann of York")
    assert (fact.target_new, fact.target_true) == ("Bob is art", "X Y")


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        (edit("The name of the author of X is ."), "names no object"),
        (edit("The name of the author of X is ", "The name of the author of X is Bob."), "names no object"),
        (edit("The name of the author of  is Bob.", relation="AUTHOR"), "no subject in it"),
        (edit("Is Ann still alive?"), "has no is, are, follows or is followed by"),
        (edit("The name of the author of X is A.", "The writer of X is B."), "has no is, are, follows or is"),
        (edit("This text is short."), "the subject cannot be told"),
        (edit("The name of the author of X is Bob.", subject="Y"), "subject 'Y' does not occur in prompt"),
    ],
)
def test_statements_that_cannot_be_placed(tmp_path: Path, of: dict[str, Any], reason: str) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps([LEO, original(of)]))
    facts, invalid = scan_facts(path)
    assert [fact.id for fact in facts] == ["0"]
    assert invalid[0].where == "record 1"
    assert reason in invalid[0].reason


FLAT = {
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Berlin",
    "subject": "Leo Arons",
    "example_type": "recent",
    "ground_truth": "Paris",
    "Subject_Aliasing": [{"prompt": "The place of death of Martin Arons is", "targets": ["Berlin", "DE-BE", "B"]}],
    "Relation_Specificity": [{"prompt": "The father of Leo Arons is", "targets": []}],
    "Forgetfulness": [],
}


def test_the_flat_form(tmp_path: Path) -> None:
    first, second = read(tmp_path, FLAT, {**FLAT, "ground_truth": [["", "Rome"]], "prompt": "leo arons died in"})
    ripples = (Ripple("Subject_Aliasing", "The place of death of Martin Arons is", ("Berlin", "DE-BE")),)
    assert first == Fact("Leo Arons", "The place of death of {} is", "Berlin", "Paris", id="0", ripples=ripples)
    assert (second.subject, second.prompt, second.target_true) == ("leo arons", "{} died in", "Rome")


KNOWEDIT = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Berlin",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Leo Arons still alive?", "ground_truth": [["no"], ["is dead"]]}],
        "Reasoning": [{"prompt": "The mayor of where Leo Arons died is", "ground_truth": [["Kai", "Kai Wegner"]]}],
        "Subject_Aliasing": [{"prompt": ["The place of death of Martin Arons is"], "ground_truth": "Berlin"}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The father of Leo Arons is", "ground_truth": ["Albert"]}, {"prompt": "x"}],
        "Forgetfulness": None,
    },
}


def test_knowedit(tmp_path: Path) -> None:
    zsre = {"ground_truth": ["Paris"], "rephrase_prompt": "Leo Arons died in", "portability": {}, "cond": "x >> y"}
    bio = {
        "text": "This is a passage about ada byron. Ada was",
        "labels": "a countess.",
        "concept": "ada byron",
        "locality": {},
    }
    first, second, third = read(tmp_path, KNOWEDIT, {**KNOWEDIT, **zsre}, bio)
    ripples = (
        Ripple("Logical_Generalization", "Is Leo Arons still alive?", ("no", "is dead")),
        Ripple("Compositionality_I", "The mayor of where Leo Arons died is", ("Kai", "Kai Wegner")),
        Ripple("Subject_Aliasing", "The place of death of Martin Arons is", ("Berlin",)),
        Ripple("Relation_Specificity", "The father of Leo Arons is", ("Albert",)),
    )
    assert first == Fact("Leo Arons", "The place of death of {} is", "Berlin", id="0", ripples=ripples)
    assert (second.target_true, second.paraphrases, second.ripples) == ("Paris", ("Leo Arons died in",), ripples[-1:])
    assert third == Fact("ada byron", "This is a passage about {}. Ada was", "a countess.", id="2")


@pytest.mark.parametrize(
    "broken",
    [
        {**KNOWEDIT, "portability": {"Multi_hop": [{"prompt": "x", "ground_truth": "yy"}]}},
        {**KNOWEDIT, "locality": {"Forgetfulness": ["x"]}},
        {key: value for key, value in KNOWEDIT.items() if key != "subject"},
        {**FLAT, "Forgetfulness": ["x"]},
        {**LEO, "edit": {}},
        {**LEO, "Forgetfulness": [{"prompt": "x"}]},
    ],
)
def test_records_that_are_none(tmp_path: Path, broken: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"record 0: not the format that it looks like"):
        read(tmp_path, broken)
