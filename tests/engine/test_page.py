"""The page of a folder: of an edit, an experiment, an evaluation or a run; what it says, and that it is safe."""

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rewire.engine import page
from rewire.engine.page.reasons import of_record
from rewire.kernels.errors import InputError

HOSTILE = '</script><script>alert(1)</script><img src="https://example.org/x" onerror=alert(2)>'


class Parsed(HTMLParser):
    """What a browser would load, run and show of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)
            if tag == "script":
                self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data + " "
        elif self._inside[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)

    @property
    def data(self) -> dict[str, Any]:
        """The table's: a list of dicts under "rows"."""
        (text,) = [text for kind, text in self.scripts if kind == "application/json"]
        content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        keys = [key for key, *_ in content["columns"]]
        return content | {"rows": [dict(zip(keys, row, strict=True)) for row in content["rows"]]}

    @property
    def shown(self) -> str:
        return " ".join(self.text.split())


def read(path: Path) -> Parsed:
    return Parsed(path.read_text(encoding="utf-8"))


def made(folder: Path) -> Parsed:
    path, _ = page.write(folder)
    return read(path)


def scores(accuracy: float, success: float, paraphrase: float, neighborhood: float, said: str) -> dict[str, Any]:
    lists = {"new_logprob": [-1.0, -1.0], "true_logprob": [-2.0, -2.0]}
    return {
        "efficacy": {"new_logprob": [-0.5], "true_logprob": [-2.0], "accuracy": accuracy, "success": success},
        "paraphrase": lists | {"accuracy": 0.0, "success": paraphrase},
        "neighborhood": lists | {"accuracy": 1.0, "success": neighborhood},
        "said": said,
    }


BEFORE = scores(0.0, 0.0, 0.0, 1.0, " Rome")


def fact(place: int, after: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": f"f{place}",
        "subject": f"Tower {place}",
        "prompt": "{} stands in",
        "target_new": "Oslo",
        "target_true": "Rome",
        "paraphrases": ["Where?"],
        "neighbors": ["The other tower stands in"],
        "steps": 10 + place % 3,
        "loss": 0.04,
        "losses": [8.0, 1.0, 0.04],
        "probability_with_delta": 0.97,
        "achieved": 0.96 + 0.001 * place,
    }
    return found | ({"before": BEFORE, "after": after} if after else {}) | more


def edit(facts: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    rates = {f"{kind}_success": 0.0 for kind in ("efficacy", "paraphrase", "neighborhood")}
    return {
        "date": "2025-01-02T03:04:05+00:00",
        "model": "models/tiny",
        "fingerprint": "0123456789abcdef",
        "method": "memit",
        "preset": "some.yaml",
        "fact_count": len(facts),
        "hparams": {"layers": [1, 2]},
        "versions": {"rewire": "0", "git": None},
        "seconds": {"values": 2.0, "evaluate_after": 0.5},
        "before": {**rates, "efficacy_magnitude": -0.5},
        "after": {**rates, "efficacy_success": 0.75, "paraphrase_success": 0.5, "efficacy_magnitude": 0.25},
        "layers": [{"weight": "w.1", "residual": 1e-9, "relative_change": 0.25}],
        "iterations": [{"initial": 90.0, "optimization": 1.5, "spread": 2.5}],
        "facts": facts,
        "skipped": [{"where": "line 7", "reason": "no subject"}],
    } | more


FACTS = [
    fact(0, scores(1.0, 1.0, 1.0, 1.0, " Oslo")),
    fact(1, scores(0.0, 0.0, 0.0, 1.0, HOSTILE), probability_with_delta=0.2, loss=1.5),
    fact(2, scores(0.0, 1.0, 1.0, 1.0, " Paris"), achieved=0.4),
    fact(3, scores(1.0, 1.0, 0.5, 0.5, " Oslo")),
]


def save(folder: Path, **files: Any) -> Path:
    """Files by name, `_` for the dot; a list of lines for jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        lines = suffix == "jsonl"
        text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
        (folder / f"{stem}.{suffix}").write_text(text)
    return folder


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    return save(tmp_path / "edit", report_json={"edits": [edit(FACTS)]})


def record(place: int, answer: str, efficacy: float, **more: Any) -> dict[str, Any]:
    return {
        "id": f"r{place}",
        "protocol": "wild",
        "subject": f"Tower {place}",
        "prompt": f"Where is Tower {place}?",
        "target_new": "the Oslo harbour",
        "reliability": efficacy,
        "reliability_unedited": 0.0,
        "generalization": 1.0,
        "locality": 1.0,
        "locality_unedited": None,
        "answer": answer,
        "answer_unedited": "Rome",
    } | more


RECORDS = [
    record(0, "Oslo harbour.", 1.0, odd={"a": 1}),
    record(1, "The Oslo harbour, which is a harbour in", 0.0),
    record(2, " ", 0.0),
    record(3, "rome", 0.0),
    record(4, "It is in the Oslo harbour", 0.0),
    record(5, "Bergen", 0.0),
    record(6, "Oslo harbour", 1.0, generalization=0.0, paraphrase_answer="Turku"),
    record(7, "Oslo harbour", 1.0, locality=0.0, locality_answer="Turku", locality_answer_unedited="Graz"),
    record(8, "Oslo harbour", 1.0, portability=0.5, locality=0.5, locality_unedited=0.5),
]


def evaluation(**more: Any) -> dict[str, Any]:
    return {
        "format": "rewire-evaluation-1",
        "protocol": "wild",
        "metrics": {
            "reliability": 0.375,
            "generalization": 0.875,
            "locality": 0.875,
            "portability": 0.5,
            "Subject_Aliasing": 0.5,
            "ngram_entropy": 5.5,
        },
        "definitions": {"reliability": "share of answers that are right"},
        "unedited": {"reliability": 0.0, "generalization": 0.0, "Subject_Aliasing": None, "ngram_entropy": 6.0},
        "judge": {"name": "exact match"},
        "model": "models/tiny",
        "fingerprint": "0123456789abcdef",
        "delta": "edits/first",
        "facts": len(RECORDS),
        "seconds": {"generate": 3.0},
        "versions": {"rewire": "0"},
        "errors": [{"id": "r9", "reason": "too long"}],
    } | more


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    return save(tmp_path / "evaluation", evaluation_json=evaluation(), records_jsonl=RECORDS)


def outcomes(parsed: Parsed) -> dict[str, tuple[str, str]]:
    return {row["id"]: (row["outcome"], row["why"]) for row in parsed.data["rows"]}


def test_an_edit_says_what_worked_and_why_not(edited: Path) -> None:
    parsed = made(edited)
    assert outcomes(parsed) == {
        "f0": ("worked", ""),
        "f1": ("failed", "old object wins; no target value found; loss above the stop; paraphrase failed"),
        "f2": ("failed", "not the first choice; residual left"),
        "f3": ("partly", "paraphrase failed; neighbour changed"),
    }
    for text in (
        "4 facts edited into tiny",
        "right for 2 of 4 facts. Most frequent trouble: paraphrase failed (2); neighbour changed (1)",
        "the model says “Paris”, though the new object beats the old one.",
        "Even with its target value put in by hand the new object has a probability of 20.0 %.",
        "Behind 11 steps the loss still was 1.5; it stops below 0.05.",
        "The weights give 40.0 % of the change that was asked for.",
        "1 of 2 paraphrases prefer the new object.",
        "With 1 of 2 neighbours the true object wins, before with 2 of 2.",
        "some.yaml",
        "0123456789abcdef",
        "line 7 no subject",
        "changed by 25.0 % of its norm",
    ):
        assert text in parsed.shown, text
    assert re.search(r"efficacy, success 0\.0 % 75\.0 %", parsed.shown)
    assert re.search(r"efficacy, magnitude -0\.5 0\.25", parsed.shown)  # below zero, no share
    assert re.search(r"new object, SPREAD 90 2\.5", parsed.shown)


def test_what_a_model_says_is_text(edited: Path) -> None:
    parsed = made(edited)
    assert HOSTILE in parsed.shown
    assert parsed.data["rows"][1]["said_after"] == HOSTILE
    assert [kind for kind, _ in parsed.scripts] == ["application/json", None]
    assert not any(tag in ("img", "iframe", "object", "embed", "link", "base") for tag, _ in parsed.tags)
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert "alert(1)</script>" not in (edited / "report.html").read_text()


def test_nothing_outside_the_page_is_needed(edited: Path, evaluated: Path) -> None:
    for folder in (edited, evaluated):
        parsed = made(folder)
        links = [a[name] for _, a in parsed.tags for name in ("src", "href", "xlink:href", "action") if name in a]
        assert links
        assert all((link or "").startswith("#") for link in links)
        (policy,) = [a["content"] for tag, a in parsed.tags if tag == "meta" and "http-equiv" in a]
        script = parsed.scripts[-1][1]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert policy is not None
        assert "default-src 'none'" in policy
        assert f"script-src 'sha256-{digest}'" in policy  # no other script may run, and this one may
        assert not re.search(r"@import|url\((?!#)", (folder / "report.html").read_text())


def test_the_page_is_well_made(edited: Path) -> None:
    parsed = made(edited)
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(now - then <= 1 for then, now in pairwise(levels))
    identities = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(identities)) == len(identities)
    images = [attributes for _, attributes in parsed.tags if attributes.get("role") == "img"]
    assert images
    assert all(attributes["aria-label"] for attributes in images)
    assert ("html", {"lang": "en"}) in parsed.tags
    assert set(identities) >= {(a["href"] or "").removeprefix("#") for tag, a in parsed.tags if tag == "a"}


def test_the_same_folder_gives_the_same_bytes(edited: Path, tmp_path: Path) -> None:
    first, _ = page.write(edited, tmp_path / "a.html")
    second, _ = page.write(edited, tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()
    assert b"<svg" in first.read_bytes()


def test_without_matplotlib_the_page_says_so(edited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    parsed = made(edited)
    assert "pip install 'rewire[plot]'" in parsed.shown
    assert not any(tag == "svg" for tag, _ in parsed.tags)


def test_pictures_take_the_pages_colours(edited: Path) -> None:
    made(edited)
    text = (edited / "report.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(pictures) == 4  # learning curve, losses, steps, achieved
    for picture in pictures:
        assert "var(--quiet)" in picture
        assert "xmlns" not in picture
        assert "metadata" not in picture
        assert not re.search(r"(fill|stroke): #0000\d\d", picture)  # no stand-in is left
    assert "Histogram of 4 facts: loss from 0.04 to 1.5, median 0.04." in text


def test_ten_thousand_facts(tmp_path: Path) -> None:
    many = [fact(i, scores(float(i % 4 > 0), 1.0, 1.0, 1.0, " Oslo")) for i in range(10_000)]
    parsed = made(save(tmp_path, report_json={"edits": [edit(many)]}))
    assert len(parsed.data["rows"]) == 10_000
    assert sum(tag == "tr" for tag, _ in parsed.tags) < 150  # a window of rows; the others are made when asked for
    assert "The first 50 of 10,000" in parsed.shown
    assert (tmp_path / "report.html").stat().st_size < 6_000_000


def test_numbers_that_are_none(tmp_path: Path) -> None:
    odd = fact(0, scores(0.0, 0.0, 1.0, 1.0, "\ud800 half"), loss=float("nan"), achieved=float("inf"), steps=None)
    report = edit([odd, fact(1, None)], after=None, before=None, iterations=[], seconds={}, layers=[])
    parsed = made(save(tmp_path, report_json={"edits": [report]}))
    assert [row["outcome"] for row in parsed.data["rows"]] == ["failed", "not measured"]
    assert parsed.data["rows"][0]["loss"] is None
    assert "Nothing was measured" in parsed.shown
    assert "? half" in parsed.shown  # no UTF-8 can say it


def test_several_edits_are_one_page(tmp_path: Path) -> None:
    again = edit(FACTS[:1], after={"efficacy_success": 0.25, "paraphrase_success": 1.0, "neighborhood_success": 1.0})
    parsed = made(save(tmp_path, report_json={"edits": [edit(FACTS[:3]), again]}))
    assert "efficacy, success 0.0 % 62.5 %" in parsed.shown  # (3 * 75 + 1 * 25) / 4
    assert "success, edit by edit" in parsed.shown
    assert "values 4.00" in parsed.shown  # seconds of both


def test_an_evaluation_says_what_is_wrong_with_an_answer(evaluated: Path) -> None:
    parsed = made(evaluated)
    assert {identity: why for identity, (_, why) in outcomes(parsed).items()} == {
        "r0": "",
        "r1": "right, but went on",
        "r2": "answer empty",
        "r3": "answer unchanged",
        "r4": "right, among other words",
        "r5": "another answer",
        "r6": "paraphrase failed",
        "r7": "neighbour changed",
        "r8": "what follows is missing",
    }
    assert outcomes(parsed)["r6"][0] == "partly"
    assert parsed.data["rows"][0]["odd"] == "a: 1"  # further columns as they are
    for text in (
        "reliability 0.0 % 37.5 %",
        "share of answers that are right",
        "what follows from the edits, by category",
        "Subject Aliasing – 50.0 %",
        "ngram entropy 6 5.5",
        "“Graz” became “Turku”",
        "name: exact match",
        "r9 too long",
        "generate 3.00",
    ):
        assert text in parsed.shown, text


def test_what_compares_with_nothing_changed_nothing(tmp_path: Path) -> None:
    """Of an evaluation without an unedited side: only what is a comparison by itself says that a neighbour changed."""
    rows = [
        {"id": "a", "efficacy_accuracy": 1.0, "neighborhood_success": 1.0, "neighborhood_accuracy": 0.0},
        {"id": "b", "efficacy_accuracy": 1.0, "locality": 0.0},
        {"id": "c", "efficacy_accuracy": 1.0, "neighborhood_accuracy": 0.2, "neighborhood_accuracy_unedited": 0.5},
    ]
    for row, key in zip(rows, ("neighborhood_accuracy", "locality", "neighborhood_accuracy"), strict=True):
        asked = {"prompt": "efficacy_accuracy", "paraphrase": None, "follows": None, "neighbor": key}
        assert [reason.label for reason in of_record(row, asked)] == ["neighbour changed"] * (row["id"] != "a")


def test_an_evaluation_of_no_facts(tmp_path: Path) -> None:
    parsed = made(save(tmp_path, evaluation_json=evaluation(metrics={"kl_edited_unedited": 0.5}, unedited=None)))
    assert "tiny, measured" in parsed.shown
    assert "kl edited unedited – 0.5" in parsed.shown  # nats, no share


def published(place: int, right: float, said: str) -> dict[str, Any]:
    asked = {"prompt": f"Where is Tower {place}?", "target_new": "Oslo", "ground_truth": "Rome", "subject": "Tower"}
    side = {"rewrite_acc": right, "rewrite_gen_content": said, "rephrase_acc": right, "portability": {}}
    post = side | {"locality": {"neighborhood_acc": [1.0, 0.0]}}
    pre = side | {"rewrite_acc": 0.0, "rewrite_gen_content": "Rome", "rephrase_acc": 0.0}
    return {"pre": pre, "case_id": place, "requested_rewrite": asked, "post": post}


def test_published_results_alone_are_a_run(tmp_path: Path) -> None:
    folder = save(tmp_path, results_json=[published(0, 1.0, "Oslo"), published(1, [0.0], "Rome")])  # type: ignore[arg-type]
    path, kind = page.write(folder)
    parsed = read(path)
    assert kind == "run"
    assert outcomes(parsed) == {
        0: ("partly", "neighbour changed"),
        1: ("failed", "answer unchanged; paraphrase failed; neighbour changed"),
    }
    assert "reliability 0.0 % 50.0 %" in parsed.shown


def test_a_run_has_a_retention_curve(tmp_path: Path) -> None:
    steps = [{"after": n, "metrics": {"reliability": 1.0 - n / 100, "ngram_entropy": 5.0}} for n in (10, 20, 40)]
    folder = save(
        tmp_path,
        results_json=[published(0, 1.0, "Oslo")],
        evaluation_json=evaluation(),
        records_jsonl=RECORDS,
        checkpoints_json=steps,
    )
    path, kind = page.write(folder)
    assert kind == "run"
    parsed = read(path)
    assert len(parsed.data["rows"]) == len(RECORDS)
    (alternative,) = [a["aria-label"] for _, a in parsed.tags if "Line plot" in (a.get("aria-label") or "")]
    assert alternative == "Line plot over edits made: reliability from 90.0 % to 60.0 %."


def step(right: float, kept: float) -> dict[str, Any]:
    return {
        "pre": {"rewrite_acc": 0.0, "rewrite_success": 0.0, "locality": {"neighborhood_success": 1.0}},
        "post": {
            "rewrite_acc": right,
            "rewrite_success": right,
            "rephrase_acc": right,
            "rephrase_success": right,
            "init_ppl": 90.0,
            "final_ppl": 1.5,
            "spread_ppl": 2.5 - right,
            "rewrite_ppl": 2.0,
            "locality": {"neighborhood_acc": kept, "neighborhood_success": kept},
        },
        "m_ppl": 12.0,
        "m_ppl_pre": 10.0,
    }


def result(place: int, right: float, kept: float) -> dict[str, Any]:
    post = {
        "rewrite_acc": [right],
        "rewrite_success": [right],
        "rephrase_acc": [right],
        "rephrase_success": [1.0],
        "locality": {"neighborhood_acc": [1.0, kept], "neighborhood_success": [1.0, 1.0]},
        "rewrite_ppl": 2.0,
    }
    asked = {"prompt": f"Tower {place} stands in", "subject": f"Tower {place}", "target_new": "Oslo"}
    pre = {"rewrite_acc": [0.0], "rewrite_success": [0.0], "rephrase_acc": [0.0], "locality": {}}
    return {"case_id": place, "id": f"f{place}", "requested_rewrite": asked, "pre": pre, "post": post}


def test_an_experiment_over_iterations(tmp_path: Path) -> None:
    save(
        tmp_path,
        results_1_json=[result(0, 0.0, 1.0), result(1, 0.0, 1.0), result(2, 1.0, 1.0)],
        results_2_json=[result(0, 1.0, 1.0), result(1, 0.0, 1.0), result(2, 1.0, 0.0)],
        summary_json=[step(0.25, 1.0), step(0.75, 0.5)],
        report_json={"edits": [edit([fact(1, None, achieved=0.3)], before=None, after=None)]},
    )
    (tmp_path / "experiment.yaml").write_text("model: models/tiny\nmethod: memit\ndata: mcf\niterations: 2\n")
    path, kind = page.write(tmp_path)
    parsed = read(path)
    assert kind == "experiment"
    assert outcomes(parsed) == {
        "f0": ("worked", ""),
        "f1": ("failed", "old object wins; residual left"),  # the cause is from the edit's report
        "f2": ("partly", "neighbour changed"),
    }
    for text in (
        "3 facts edited into tiny in 2 iterations",
        "efficacy, success 0.0 % 75.0 %",
        "specificity, answers as before – 50.0 %",
        "perplexity of plain texts 10 12",
        "new object, SPREAD",
    ):
        assert text in parsed.shown, text
    alternatives = [a["aria-label"] or "" for _, a in parsed.tags if "aria-label" in a]
    assert any("efficacy from 0.0 % to 75.0 %" in text for text in alternatives)


def test_an_experiment_in_batches_keeps_what_it_kept(tmp_path: Path) -> None:
    batches = [{"batch": 1, "facts": 1, "efficacy_acc": 0.5}, {"batch": 2, "facts": 1, "efficacy_acc": 1.0}]
    save(
        tmp_path,
        results_1_json=[result(0, 1.0, 1.0)],
        results_2_json=[result(0, 1.0, 1.0), result(1, 1.0, 1.0)],
        summary_json=[step(1.0, 1.0), step(1.0, 1.0)],
        retention_json=[{"after": 1, "batches": [batches[1]]}, {"after": 2, "batches": batches}],
    )
    parsed = made(tmp_path)
    assert "2 facts edited into a model in 2 batches" in parsed.shown
    alternatives = [a["aria-label"] or "" for _, a in parsed.tags if "aria-label" in a]
    (kept,) = [text for text in alternatives if "after batch" in text]
    assert "first batch from 100.0 % to 50.0 %; newest batch from 100.0 % to 100.0 %; all so far" in kept


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"nothing found, expected the folder of an edit \(with report.json\)"),
        ({"notes_txt": 1}, r"notes.txt found, expected the folder of an edit"),
        ({"report_json": [1]}, r"report.json: list found, expected a JSON object"),
        ({"report_json": {"rows": []}}, r"report.json: no `edits` in it"),
        ({"evaluation_json": {}}, r"evaluation.json without `metrics`, and no records.jsonl"),
        ({"evaluation_json": {}, "records_jsonl": [{}, 3]}, r"records.jsonl: line 2: int found, expected an object"),
        ({"results_json": {}}, r"results.json: expected a JSON list of objects"),
        (
            {"results_1_json": [result(0, 1.0, 1.0)]},
            r"1 of its steps measured and no summary.json",
        ),
        ({"results_1_json": [result(0, 1.0, 1.0)], "summary_json": []}, r"summary.json: expected a list of steps"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        page.write(save(tmp_path / "some", **files))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "some") in str(caught.value)


def test_a_folder_above_leads_to_the_right_one(tmp_path: Path) -> None:
    save(tmp_path / "MEMIT" / "tiny", report_json={"edits": [edit(FACTS)]})
    with pytest.raises(InputError, match=r"try rewire report .*MEMIT/tiny"):
        page.write(tmp_path)
    (tmp_path / "experiment.yaml").write_text("model: demo\n")
    with pytest.raises(InputError, match=r"no results: nothing is measured yet; rewire run .*experiment.yaml goes on"):
        page.write(tmp_path)
    with pytest.raises(InputError, match=r"no such folder"):
        page.write(tmp_path / "missing")
    with pytest.raises(InputError, match=r"a file, expected the folder"):
        page.write(tmp_path / "experiment.yaml")
