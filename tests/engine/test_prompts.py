"""Token rows: right for every kind of tokenizer, held to what the tokenizer decodes, never to its offsets."""

import functools
import json
import random
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import rewire
from rewire.engine.decoding import continuations
from rewire.engine.passes import sample_contexts
from rewire.engine.prompts import (
    PLAIN,
    SEED_WORDS,
    Row,
    answer_rows,
    check_contexts,
    clean_context,
    fact_rows,
    kl_rows,
    pad,
    prompt_ids,
    read_contexts,
    subject_rows,
)

SENTENCES = [
    "The mother tongue of Danielle Darrieux is French. Therefore, Paris is the capital of France.",
    "Because of the work of Marie Curie, which was in physics, you and I know about 88 elements.",
    "Gabriel García Márquez was born in Aracataca; O'Brien's half-sister lives in Saint-Étienne, 日本 is a country.",
]


def byte_level(**more: Any) -> Tokenizer:
    """GPT-2's: bytes as letters, a word keeps the space before it."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = more.get("normalizer")
    tokenizer.pre_tokenizer = more.get("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet),
    )
    tokenizer.post_processor = more.get("post_processor", ByteLevel(trim_offsets=False))
    return tokenizer


def sentence_piece(prefix: bool) -> Tokenizer:
    """Llama 2's (`prefix`: a "▁" before the text) and Gemma's: spaces become "▁", unknown characters bytes."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=150))
    content = json.loads(tokenizer.to_str())
    learnt = content["model"]["vocab"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learnt, key=learnt.get)]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in content["model"]["merges"]]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    marks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), marks]) if prefix else marks
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    tokenizer.post_processor = special(1, before=True)
    return tokenizer


def special(token: int, before: bool) -> TemplateProcessing:
    name = "<s>" if before else "</s>"
    return TemplateProcessing(single=[name, "$A"] if before else ["$A", name], special_tokens=[(name, token)])


def llama3() -> Tokenizer:
    split = pre_tokenizers.Split(
        Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"),
        "isolated",
    )
    words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    after = Sequence([ByteLevel(trim_offsets=False), special(0, before=True)])
    return byte_level(pre_tokenizer=words, post_processor=after)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": byte_level,
    "trimmed-offsets": lambda: byte_level(post_processor=ByteLevel(trim_offsets=True)),
    "qwen2": lambda: byte_level(normalizer=normalizers.NFC()),
    "llama3": llama3,
    "llama2": lambda: sentence_piece(prefix=True),
    "gemma": lambda: sentence_piece(prefix=False),
    "eos": lambda: byte_level(post_processor=special(1, before=False)),
}


CLEAN = ("gpt2", "trimmed-offsets", "llama3")  # for which the published way of counting holds
kinds = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def build(kind: str) -> PreTrainedTokenizerFast:
    """Returns token_type_ids too, as BERT's and many others do where nobody says no."""
    return PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](),
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def decode(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def plain(tokenizer: Any, text: str) -> str:
    """The text as the tokenizer gives it back."""
    normal = tokenizer.backend_tokenizer.normalizer
    return unicodedata.normalize("NFC", text) if isinstance(normal, normalizers.NFC) else text


pieces = st.sampled_from(
    [
        *"abdeiMZ09-'’.,&/() ",
        " ",
        "é",
        "e\u0301",
        "ñ",
        "ß",
        "李",
        "日本",
        "🙂",
        "👩‍👩‍👧",
        "🇫🇷",
        "ا",
        "Darrieux",
        " of ",
        "'s",
        "88",
        "½",
    ]
)
names = st.lists(pieces, min_size=1, max_size=6).map("".join).map(str.strip).filter(bool)
prompts = st.sampled_from(
    [
        "{} was born in",
        "The mother tongue of {} is",
        "Who is {}",
        "{}'s mother tongue is",
        "In “{}”, 李明 and {{x}} said",
        "pre{}post",
        "({})",
        "日本{}は",
        "🙂 {} 🙂 ",
    ]
)
CONTEXTS = (PLAIN, "The end of Étienne. {}", "日本 🙂 x\n. {}")
facts_of = st.builds(rewire.Fact, subject=names, prompt=prompts, target_new=names)


def spell(context: str, fact: rewire.Fact) -> tuple[str, str, str]:
    """(all before the subject's end, the whole question, question and target), put together by hand."""
    before, after = fact.prompt.split("{}")
    until = context.removesuffix("{}") + before + fact.subject
    return until, until + after, (until + after).rstrip() + " " + fact.target_new


@kinds
@settings(max_examples=60, deadline=None)
@given(fact=facts_of)
def test_rows(kind, fact):
    tokenizer = build(kind)
    (asked,) = fact_rows(tokenizer, [fact], CONTEXTS, 10_000)
    (read,) = subject_rows(tokenizer, [fact], CONTEXTS, 10_000)
    assert len(asked) == len(read) == len(CONTEXTS)
    for context, row, cut in zip(CONTEXTS, asked, read, strict=True):
        until, question, text = (plain(tokenizer, part) for part in spell(context, fact))
        whole = (*row.ids, row.labels[-1])
        assert decode(tokenizer, whole) == text
        # the subject's last token is the one that completes its last character
        assert decode(tokenizer, row.ids[: row.position + 1]).startswith(until)
        assert not decode(tokenizer, row.ids[: row.position]).startswith(until)
        # labels are all that stands behind the prompt, and nothing else
        split = len(whole) - len(row.labels)
        assert whole[split:] == row.labels
        assert decode(tokenizer, whole[:split]) == question.rstrip()
        assert not set(row.labels) & set(tokenizer.all_special_ids)
        # cut behind the subject; the end of the text may be tokenised otherwise without a target behind it
        assert len(cut.ids) == cut.position + 1
        assert cut.labels == ()
        assert decode(tokenizer, cut.ids).startswith(until)
        assert not decode(tokenizer, cut.ids[:-1]).startswith(until)


@kinds
@settings(max_examples=40, deadline=None)
@given(fact=facts_of)
def test_rows_of_the_held_prompt(kind, fact):
    tokenizer = build(kind)
    (row,) = kl_rows(tokenizer, [fact])
    subject = plain(tokenizer, fact.subject)
    assert (len(row.ids), row.labels) == (row.position + 1, ())
    assert decode(tokenizer, row.ids).startswith(subject)
    assert not decode(tokenizer, row.ids[:-1]).startswith(subject)


@kinds
@settings(max_examples=40, deadline=None)
@given(fact=facts_of, spaces=st.sampled_from(["", " ", "  "]))
def test_answers(kind, fact, spaces):
    tokenizer = build(kind)
    (row,) = answer_rows(tokenizer, [(fact.question.rstrip() + spaces, fact.target_new)])
    (same,) = fact_rows(tokenizer, [fact], [PLAIN], 10_000)[0]
    assert (row.ids, row.labels, row.position) == (same.ids, same.labels, -1)


@pytest.mark.parametrize("kind", CLEAN)
def test_behind_a_line_break_an_object_has_no_space(kind):
    """As a chat template ends: what the model says there begins a line."""
    tokenizer = build(kind)
    for prompt, text in (("Q: who?\nA:\n\n", "Q: who?\nA:\n\nRome"), ("Who? ", "Who? Rome")):
        (row,) = answer_rows(tokenizer, [(prompt, "Rome")])
        assert [*row.ids, row.labels[-1]] == list(prompt_ids(tokenizer, [text])[0])
        assert decode(tokenizer, row.labels).strip() == "Rome"


@pytest.mark.parametrize("kind", CLEAN)
@settings(max_examples=60, deadline=None)
@given(fact=st.builds(rewire.Fact, names, st.sampled_from(["{} was born in", "The home of {} is", "Who is {}"]), names))
def test_the_published_way_of_counting(kind, fact):
    tokenizer = build(kind)
    (row,) = fact_rows(tokenizer, [fact], [PLAIN], 10_000)[0]
    assert row.position == len(tokenizer.encode(fact.prompt.split("{}")[0] + fact.subject)) - 1
    assert list(row.labels) == tokenizer.encode(" " + fact.target_new, add_special_tokens=False)


@kinds
def test_a_character_of_several_tokens(kind):
    """The subject's last token is that of the last byte."""
    tokenizer = build(kind)
    (row,) = subject_rows(tokenizer, [rewire.Fact("smile 🙂", "The {} is", "x")], [PLAIN], 100)[0]
    assert decode(tokenizer, row.ids[-4:]) == "🙂"
    assert decode(tokenizer, row.ids[-3:]) != "🙂"


@kinds
def test_special_tokens_stay_where_they_belong(kind):
    """BOS is read where the tokenizer puts one; an EOS behind the text is neither read nor a label."""
    tokenizer = build(kind)
    (row,) = fact_rows(tokenizer, [rewire.Fact("Paris", "{} is in", "France")], [PLAIN], 100)[0]
    ids = [*row.ids, row.labels[-1]]
    bare = tokenizer.encode("Paris is in France", add_special_tokens=False)
    assert ids == [tokenizer.bos_token_id] * (kind in ("llama3", "llama2", "gemma")) + bare


def test_too_long():
    tokenizer = build("gpt2")
    facts = [rewire.Fact(name, "{} is in", "France", id=name) for name in ("short", "long" * 30, "longer" * 40, "b")]
    for make in (fact_rows, subject_rows):
        rows = make(tokenizer, facts, CONTEXTS, 10_000)
        longest = sorted(max(len(row.ids) for row in group) for group in rows)
        make(tokenizer, facts, CONTEXTS, longest[-1])  # just fits
        with pytest.raises(rewire.InputError) as error:
            make(tokenizer, facts, CONTEXTS, longest[1])
        assert all(fact.id in str(error.value) for fact in facts[1:3])
        assert "short" not in str(error.value)
        assert "2 of 4 facts" in str(error.value)


def test_pads_on_the_right():
    padded = pad([Row((5,)), Row((6, 7, 8)), Row((9, 9))], "cpu")
    assert padded.tolist() == [[5, 0, 0], [6, 7, 8], [9, 9, 0]]


@pytest.mark.parametrize("bad", ["no mark", "{} in front", "{} and {}", 7])
def test_contexts_that_are_none(bad):
    with pytest.raises(rewire.InputError, match="here: context template"):
        check_contexts(["fine. {}", bad], "here")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('["a. {}", "b. {}"]', ("a. {}", "b. {}")),
        ('[["{}"], ["a. {}", "b. {}"]]', ("a. {}", "b. {}")),
        ('["{}", "a. {}"]', ("a. {}",)),
        ("[]", ()),
    ],
)
def test_reads_contexts(tmp_path, content, found):
    (tmp_path / "contexts.json").write_text(content)
    assert read_contexts(tmp_path / "contexts.json") == found


@pytest.mark.parametrize(
    "content", ["{broken", '{"a": 1}', '["{} twice {}"]', "[1]", '[["{}"], "a. {}"]', b"\xff\xfe[]", None]
)
def test_refuses_contexts(tmp_path, content):
    path = tmp_path / "contexts.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(rewire.InputError, match=r"contexts\.json"):
        read_contexts(path)


@given(text=st.text())
def test_cleaned_text_is_a_template(text):
    context = clean_context(text)
    assert check_contexts([context], "it") == (context,)
    assert context.endswith(". {}")
    assert clean_context("a{b}\n\né") == "a b  e\u0301. {}"


def tiny(kind: str) -> rewire.Model:
    torch.manual_seed(0)
    tokenizer = build(kind)
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    size = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 96, "initializer_range": 0.2}
    config = GPT2Config(vocab_size=len(tokenizer), **size, **ends)
    return rewire.wrap(GPT2LMHeadModel(config), tokenizer)


def test_samples_contexts():
    model = tiny("gpt2")
    state = torch.get_rng_state()
    contexts = sample_contexts(model, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(contexts) == len(set(contexts)) == 5
    assert check_contexts(contexts, "sampled") == contexts
    for context, word in zip(contexts, SEED_WORDS, strict=True):
        assert context.startswith(word)
        assert context.endswith(". {}")
    torch.manual_seed(5)
    assert sample_contexts(model, 1) == contexts
    assert sample_contexts(model, 2) != contexts


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "eos"])
def test_what_is_continued_ends_in_the_text(kind):
    """No EOS before what the model shall add."""
    model, tokenizer = tiny(kind), build(kind)
    calls: list[torch.Tensor] = []
    model.hf.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True)
    continuations(model, ["Paris is"], 2)
    bos = [tokenizer.bos_token_id] * (kind == "llama2")
    assert [bos + tokenizer.encode("Paris is", add_special_tokens=False)] in [call.tolist() for call in calls]
    calls.clear()
    sample_contexts(model, 0)
    assert len(calls[0]) == len(SEED_WORDS)
    assert not (calls[0] == tokenizer.eos_token_id).any()


def test_token_types_never_reach_the_model(tmp_path):
    """In no pass of a whole edit: sampled contexts, statistics, values, keys, evaluation."""
    model = tiny("gpt2")
    calls: list[dict[str, Any]] = []
    model.hf.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    assert "token_type_ids" in model.tokenizer("a text")
    corpus = tmp_path / "corpus.txt"
    chosen, words = random.Random(0), " ".join(SENTENCES).split()
    corpus.write_text("\n\n".join(" ".join(chosen.choices(words, k=12)) for _ in range(40)), encoding="utf-8")
    hparams = {"layers": [0, 1], "v_num_grad_steps": 2, "mom2_tokens": 600, "mom2_update_weight": 1}
    session = rewire.EditSession(model, corpus=corpus, hparams=hparams)
    session.edit([rewire.Fact("Paris", "{} is in", "Italy", "France", neighbors=("Rome is in",))])
    assert len(calls) > 10
    assert not any("token_type_ids" in kwargs for kwargs in calls)
