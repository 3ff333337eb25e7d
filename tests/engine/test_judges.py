"""Judges of generated answers. The language model is a stand-in on this machine, asked through the real client."""

import email.utils
import json
import logging
import os
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from judge_server import JudgeServer, Wrong, judge_server

from rewire.engine.judges import Claim, ExactMatch, LLMJudge, find_judge, normalise
from rewire.engine.judges.endpoint import public_url, retry_after
from rewire.engine.judges.grading import grading_prompt, prompt_digest, read_grade
from rewire.engine.judges.kept import KeptVerdicts, claim_key
from rewire.kernels.errors import InputError

KEY = "sk-secret-0123456789"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with judge_server() as found:
        yield found


@pytest.fixture
def judge(server: JudgeServer) -> Callable[..., LLMJudge]:
    return lambda **options: LLMJudge(base_url=server.url, **({"backoff": 0.001} | options))


def some(count: int) -> list[Claim]:
    """Every third of them is wrong."""
    return [Claim(f"q{i}", (f"gold{i}",), f"it is gold{i}." if i % 3 else "it is not.") for i in range(count)]


def right(claims: Sequence[Claim]) -> list[bool]:
    return [claim.gold[0] in claim.answer for claim in claims]


def refused(ask: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        ask()
    said = str(caught.value)
    assert "\n" not in said
    assert KEY not in said
    assert caught.value.__suppress_context__  # a traceback would show what the client quotes
    return said


# exact match


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("  An  apple\n a day\t", "apple day"),
        ("theatre, atheist & Ana", "theatre atheist ana"),
        ("A.N. Other", "other"),  # punctuation goes first: "an other"
        ("the_", ""),
        ("one–a–two", "one– –two"),  # a space comes in place of an article
        (")", ""),
        ("Ärger „im“ Café", "ärger „im“ café"),  # only ASCII punctuation
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.text(string.ascii_letters + string.digits + string.punctuation + " \t\n"))
def test_normalise_is_what_it_says_word_by_word(text: str) -> None:
    kept = "".join(letter for letter in text if letter not in string.punctuation)
    assert normalise(text) == " ".join(word for word in kept.lower().split() if word not in {"a", "an", "the"})


@given(st.text())
@example("İ the Σ")
def test_normalise_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once == once.strip()
    assert not set(once) & set(string.punctuation)


@given(st.text(string.ascii_lowercase + " "), st.sampled_from(string.punctuation), st.integers(0, 20))
def test_punctuation_anywhere_counts_for_nothing(text: str, sign: str, where: int) -> None:
    assert normalise(text[:where] + sign + text[where:]) == normalise(text)


def test_exact_match() -> None:
    ticks: list[tuple[int, int]] = []
    claims = [Claim("q", ("Paris", "Lutetia"), a) for a in ("The lutetia!", "paris", "Paris, France", "")]
    found = ExactMatch().verdicts(claims, lambda *tick: ticks.append(tick))
    assert (found, ticks) == ([True, True, False, False], [(4, 4)])
    assert ExactMatch().describe()["kind"] == ExactMatch.name == "exact"


def test_a_claim_has_a_gold_answer() -> None:
    assert "no accepted answer" in refused_plainly(lambda: Claim("q", (), "x"))


def refused_plainly(ask: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        ask()
    return str(caught.value)


# prompt and reply


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("A", True), ("B", False), (" b\n", False), ("A.", True), ("(B)", False), ("**A**", True), ('"B"', False),
        ("A: CORRECT", True), ("B: INCORRECT", False), ("A - Correct", True), ("Correct (A)", True),
        ("B INCORRECT", False), ("CORRECT", True), ("incorrect", False), ("Incorrect.", False),
        ("Correct, as both rivers are there", True),
        ("Answer: A", True), ("The answer is B.", False), ("**Grade:** B. The Danube is wrong", False),
        ("A\n\nBoth are there.", True), ("<think>B? No, (A)</think>\n\nA", True), ("<think>A</think>B", False),
        ("", None), ("maybe", None), ("A: INCORRECT", None), ("B. CORRECT", None), ("A or B", None), ("A, B", None),
        ("A/B", None), ("A predicted answer is", None), ("A correct answer has both", None), ("Apple", None),
        ("Correct answer: the Rhine", None), ("not correct", None), ("I cannot grade this", None),
    ],
)  # fmt: skip
def test_replies_are_read(reply: str, grade: bool | None) -> None:
    assert read_grade(reply) is grade


@given(
    st.sampled_from([("A", "CORRECT", True), ("B", "INCORRECT", False)]),
    st.sampled_from(["{0}", "{1}", "{0}: {1}", "{0}) {1}", "{1} ({0})", "{0} - {1}", "{0}.: {1}", "[[{0}]]"]),
    st.sampled_from([str.upper, str.lower, str.capitalize]),
    st.sampled_from(["", "Answer: ", "The grade is ", "Final answer - "]),
    st.sampled_from(["", ".", "\n", "\nIt is so because of the Rhine.", "!", ": see above"]),
)
def test_a_grade_is_found_however_it_is_dressed(
    of: tuple[str, str, bool], form: str, case: Callable[[str], str], lead: str, end: str
) -> None:
    assert read_grade(lead + case(form.format(of[0], of[1])) + end) is of[2]


@given(st.text(string.ascii_letters + "{}\\ %"), st.text(string.ascii_letters + "{}\\ %"))
def test_the_prompt_holds_the_claim_as_it_is(question: str, answer: str) -> None:
    text = grading_prompt(Claim(question, ("x{y}", "z"), answer))
    assert f"Question: {question}\nGold target: x{{y}} (or, just as good:) z\nPredicted answer: {answer}\n" in text


def test_what_is_sent(server: JudgeServer, judge: Callable[..., LLMJudge]) -> None:
    claim = Claim("half \ud83d a pair", ("x",), "x")
    assert judge(model="m").verdicts([claim]) == [True]
    message = {"role": "user", "content": grading_prompt(claim)}
    assert server.bodies == [{"model": "m", "messages": [message], "temperature": 0}]
    assert server.keys == {f"Bearer {KEY}"}


# asking


def test_verdicts_come_in_order_and_nothing_is_asked_twice(server: JudgeServer, judge: Callable[..., LLMJudge]) -> None:
    claims = [*some(12), *some(5), Claim("q1", ("gold1",), ""), Claim("q1", ("gold1",), " \n")]
    ticks: list[tuple[int, int]] = []
    expected = [*right(some(12)), *right(some(5)), False, False]
    assert judge().verdicts(claims, lambda *tick: ticks.append(tick)) == expected
    assert ticks == [(done, 12) for done in range(13)]
    assert judge().verdicts(claims) == expected
    assert server.asked == {f"q{i}": 1 for i in range(12)}


def test_nobody_is_needed_where_everything_is_known(
    judge: Callable[..., LLMJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge().verdicts(some(3))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge().verdicts([*some(3), Claim("new", ("x",), "")]) == [*right(some(3)), False]
    assert judge().verdicts([]) == []


@pytest.mark.parametrize("other", [Claim("Q", ("g",), "a"), Claim("q", ("g", "h"), "a"), Claim("q", ("g",), "A")])
def test_claims_are_told_apart(other: Claim) -> None:
    assert claim_key(other) != claim_key(Claim("q", ("g",), "a"))


def test_verdicts_of_another_model_or_endpoint_count_for_nothing(tmp_path: Path) -> None:
    judges = [LLMJudge(), LLMJudge("m"), LLMJudge(base_url="http://h/v1"), LLMJudge(cache=tmp_path)]
    assert len({judge.path for judge in judges}) == 4
    assert LLMJudge(base_url="http://h/v1/").path == LLMJudge(base_url="http://me:pw@h/v1?key=1").path == judges[2].path
    assert judges[0].path.parent == Path(os.environ["REWIRE_CACHE"]) / "judgements"


FAULTS = {
    "429": Wrong(429),
    "429, seconds": Wrong(429, headers=(("Retry-After", "0.05"),)),
    "429, nonsense": Wrong(429, headers=(("Retry-After", "soon"),)),
    "500": Wrong(500),
    "503": Wrong(503),
    "408": Wrong(408),
    "maybe": Wrong(reply="maybe"),
    "a web page": Wrong(body="<html>"),
    "an error that says 200": Wrong(body='{"error": {"message": "overloaded"}}'),
    "no choice": Wrong(body='{"choices": []}'),
    "closed before": Wrong(close="before"),
    "closed in the middle": Wrong(close="middle"),
    "slow": Wrong(seconds=2.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_costs_one_more_request(
    server: JudgeServer, judge: Callable[..., LLMJudge], fault: str
) -> None:
    claims = some(6)
    server.wrong = {"q1": [FAULTS[fault]], "q3": [FAULTS[fault]]}
    options = {"timeout": 1.2} if fault == "slow" else {}
    assert judge(**options).verdicts(claims) == right(claims)
    assert server.asked == {claim.question: 2 if claim.question in ("q1", "q3") else 1 for claim in claims}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Wrong(500), "(status 500)"),
        (Wrong(close="before"), "(no connection, or a lost one)"),
        (Wrong(reply=f"may\nbe {KEY}"), "(the reply is 'may be ***', expected A or B)"),
        (Wrong(seconds=0.3), "(no answer within 0.05 s)"),
    ],
)
def test_a_lasting_fault_ends_it_after_the_retries(
    server: JudgeServer, judge: Callable[..., LLMJudge], fault: Wrong, said: str
) -> None:
    server.always = fault
    timeout = 0.05 if fault.seconds else 5.0
    found = refused(lambda: judge(retries=3, concurrency=1, timeout=timeout).verdicts(some(4)))
    assert found.startswith(f"{public_url(server.url)}: no verdict of gpt-4o-mini about 'q0' in 4 tries {said}; ")
    assert found.endswith("; 0 of 4 claims are judged and kept; the same command goes on with the others")
    assert server.asked == {"q0": 4}


def test_waits_grow(server: JudgeServer, judge: Callable[..., LLMJudge]) -> None:
    server.wrong = {"q1": [Wrong(500)] * 3}
    start = time.monotonic()
    judge(backoff=0.1).verdicts(some(2))
    assert time.monotonic() - start >= 0.5 * (0.1 + 0.2 + 0.4)


def test_retry_after_holds_everybody(server: JudgeServer, judge: Callable[..., LLMJudge]) -> None:
    server.wrong = {"q0": [Wrong(429, headers=(("Retry-After", "0.4"),))]}
    start = time.monotonic()
    judge(concurrency=1).verdicts(some(1))
    assert time.monotonic() - start >= 0.4
    server.wrong, server.seconds = {"q1": [Wrong(429, headers=(("Retry-After", "0.4"),))]}, 0.2
    judge(concurrency=2).verdicts(some(4))  # q2 is asked beside q1, q3 after q2 and within the 0.4 s
    assert server.times["q3"][0] - server.times["q1"][0] >= 0.4


def test_retry_after_may_be_a_date_or_too_long(server: JudgeServer, judge: Callable[..., LLMJudge]) -> None:
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < retry_after(in_a_minute) <= 60
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == retry_after("-3") == retry_after("nan") == 0
    assert retry_after("7") == 7
    server.always = Wrong(429, headers=(("Retry-After", "86400"),))
    assert "left alone for 86400 s" in refused(lambda: judge(concurrency=1).verdicts(some(2)))
    assert server.asked.total() == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Wrong(401), "(401): set OPENAI_API_KEY"),
        (Wrong(403), "may not use gpt-4o-mini (403)"),
        (Wrong(404), "no model 'gpt-4o-mini', or no such endpoint (404)"),
        (Wrong(400), "the request about 'q0' is refused (400: "),
        (Wrong(429, body='{"error": {"message": "pay", "code": "insufficient_quota"}}'), "no credit left (429)"),
    ],
)
def test_what_no_retry_helps_ends_at_once(
    server: JudgeServer, judge: Callable[..., LLMJudge], fault: Wrong, said: str
) -> None:
    server.always = fault
    assert said in refused(lambda: judge(concurrency=1).verdicts(some(5)))
    assert server.asked == {"q0": 1}


def test_an_end_wakes_those_who_wait(server: JudgeServer, judge: Callable[..., LLMJudge]) -> None:
    server.wrong = {"q0": [Wrong(500)], "q1": [Wrong(401, seconds=0.2)]}
    start = time.monotonic()
    assert "(401)" in refused(lambda: judge(concurrency=2, backoff=30.0).verdicts(some(2)))
    assert time.monotonic() - start < 10


def test_no_more_in_flight_than_allowed(server: JudgeServer, judge: Callable[..., LLMJudge]) -> None:
    server.seconds = 0.2
    assert judge(concurrency=3).verdicts(some(6)) == right(some(6))
    assert server.most == 3


def test_no_faster_than_allowed(judge: Callable[..., LLMJudge]) -> None:
    slow = judge(per_minute=1200)
    start = time.monotonic()
    slow.verdicts(some(5))
    slow.verdicts(some(8))  # the pace is the judge's, not the call's
    assert time.monotonic() - start >= 7 * 0.05


# interrupted


def test_a_dead_endpoint_costs_no_verdict(server: JudgeServer, judge: Callable[..., LLMJudge]) -> None:
    claims, server.dies_after = some(20), 12
    found = refused(lambda: judge(concurrency=4, retries=2).verdicts(claims))
    assert "12 of 20 claims are judged and kept; the same command goes on" in found
    before = dict(server.asked)
    kept = KeptVerdicts(judge().path).known
    assert len(kept) == 12
    server.dies_after = None
    assert judge(concurrency=4).verdicts(claims) == right(claims)
    again = {claim.question for claim in claims if server.asked[claim.question] != before.get(claim.question, 0)}
    assert again == {claim.question for claim in claims if claim_key(claim) not in kept}
    assert server.graded == {claim.question: 1 for claim in claims}


def test_an_interrupt_costs_no_verdict(server: JudgeServer, judge: Callable[..., LLMJudge]) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    server.seconds = 0.03
    with pytest.raises(KeyboardInterrupt):
        judge(concurrency=2).verdicts(some(30), interrupt)
    assert 4 <= server.asked.total() < 30
    assert judge().verdicts(some(30)) == right(some(30))
    assert server.asked == {f"q{i}": 1 for i in range(30)}  # those in flight were waited for


PROGRAM = """
import sys
from rewire.engine.judges import Claim, LLMJudge
claims = [Claim(f"q{i}", (f"gold{i}",), f"it is gold{i}." if i % 3 else "it is not.") for i in range(40)]
LLMJudge(base_url=sys.argv[1], concurrency=4).verdicts(claims)
"""


def test_a_killed_process_costs_no_kept_verdict(server: JudgeServer, judge: Callable[..., LLMJudge]) -> None:
    claims, path = some(40), judge().path
    server.seconds = 0.2
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, server.url], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") >= 8):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = KeptVerdicts(path).known
    assert 8 <= len(kept) < 40
    assert judge().verdicts(claims) == right(claims)
    assert all(server.asked[claim.question] == 1 for claim in claims if claim_key(claim) in kept)
    assert server.asked.total() <= 40 + 4  # what was in flight cannot be known


NO_VERDICTS = [{}, [1], 7, {"key": [1], "correct": True}, {"key": claim_key(some(4)[3]), "correct": 1}]


@pytest.mark.parametrize("torn", [b'{"key": "', b"\xff", "\n".join(map(json.dumps, NO_VERDICTS)).encode()])
def test_a_torn_line_is_asked_again_and_harms_no_other(
    server: JudgeServer, judge: Callable[..., LLMJudge], torn: bytes
) -> None:
    judge().verdicts(some(3))
    path = judge().path
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    lost = json.loads(lines[-1])["question"]
    path.write_bytes(b"".join(lines[:-1]) + torn)
    assert judge().verdicts(some(4)) == right(some(4))
    assert server.asked == {f"q{i}": 1 for i in range(4)} | {lost: 2}
    assert path.read_bytes().startswith(b"".join(lines[:-1]) + torn + b"\n")  # appended to, never rewritten
    assert judge().verdicts(some(4)) == right(some(4))
    assert server.asked.total() == 5


def test_many_may_append_at_once(tmp_path: Path) -> None:
    claims, path = some(200), tmp_path / "v.jsonl"
    stores = [KeptVerdicts(path) for _ in range(4)]  # as of four processes

    def add(number: int) -> None:
        for claim in claims[number::4]:
            stores[number].add(claim, right([claim])[0])

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert KeptVerdicts(path).known == dict(zip(map(claim_key, claims), right(claims), strict=True))


def test_nothing_is_paid_for_that_could_not_be_kept(
    server: JudgeServer, judge: Callable[..., LLMJudge], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    found = refused(lambda: judge(cache=tmp_path / "file").verdicts(some(2)))
    assert "cannot be written to" in found
    assert "REWIRE_CACHE" in found
    assert not server.asked


# the key, and other input


def test_the_key_is_written_nowhere(
    server: JudgeServer, judge: Callable[..., LLMJudge], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    server.wrong = {"q0": [Wrong(500), Wrong(429)]}
    found = judge(cache=tmp_path)
    found.verdicts(some(3))
    server.always = Wrong(401)
    refused(lambda: found.verdicts(some(4)))
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert caplog.text  # the client's own, which is where it might stand
    assert KEY not in caplog.text + "".join(files) + json.dumps(found.describe())


def test_the_key_is_read_when_first_asked(
    server: JudgeServer, judge: Callable[..., LLMJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    found = judge(key_variable="MY_KEY")
    said = refused_plainly(lambda: found.verdicts(some(2)))
    assert said.startswith(f"MY_KEY is not set: set it to the key of {public_url(server.url)}")
    monkeypatch.setenv("MY_KEY", "other-key\n")
    assert found.verdicts(some(2)) == right(some(2))
    assert server.keys == {"Bearer other-key"}


@pytest.mark.parametrize("sign", ["\n", "é", " "])
def test_a_key_that_is_none_is_not_quoted(
    server: JudgeServer, judge: Callable[..., LLMJudge], monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY + sign + KEY)
    assert "OPENAI_API_KEY: holds spaces or other signs" in refused(lambda: judge().verdicts(some(1)))
    assert not server.asked


def test_the_package_is_named(judge: Callable[..., LLMJudge], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install rewire[judge]" in refused(lambda: judge().verdicts(some(1)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"concurrency": 0}, "the judge's concurrency: 0 found, expected 1 or more"),
        ({"retries": -1}, "retries: -1"),
        ({"timeout": float("nan")}, "timeout: nan"),
        ({"per_minute": 0}, "per_minute: 0"),
        ({"backoff": -1.0}, "backoff: -1.0"),
        ({"base_url": "me:pw@localhost:8000/v1?pw=1"}, "base_url: 'localhost:8000/v1' found, expected an http address"),
        ({"base_url": "http://[::1/v1"}, "base_url"),
    ],
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    found = refused_plainly(lambda: LLMJudge(**options))
    assert said in found
    assert "pw" not in found


def test_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    about = {"kind": "llm", "model": "gpt-4o-mini", "prompt": prompt_digest(), "temperature": 0}
    assert LLMJudge().describe() == about | {"base_url": "https://api.openai.com/v1"}
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:pw@host:81/v1/?pw=1")
    assert LLMJudge().describe() == about | {"base_url": "https://host:81/v1"}


def test_find_judge(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in (None, "auto", "llm"):
        found = find_judge(name, model="m", base_url=None)
        assert isinstance(found, LLMJudge)
        assert found.describe()["model"] == "m"
    assert find_judge("exact", model=None).name == "exact"
    assert not caplog.records
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    assert find_judge("llm").name == "llm"
    assert not caplog.records
    assert find_judge("auto", model="m").name == "exact"
    assert [(record.name, record.levelname) for record in caplog.records] == [("rewire", "WARNING")]
    assert "exact match judges the answers: OPENAI_API_KEY is not set" in caplog.text
    monkeypatch.setenv("MY_KEY", KEY)
    assert find_judge(key_variable="MY_KEY").name == "llm"


def test_find_judge_refuses() -> None:
    assert "did you mean 'exact'?" in refused_plainly(lambda: find_judge("Exacts"))
    assert "there are auto, exact, llm" in refused_plainly(lambda: find_judge("human"))
    assert refused_plainly(lambda: find_judge("exact", model="m")).startswith("model: exact match takes no such option")
