"""Continuing many prompts at once says what plain `generate` says of each alone, and ends where it does."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FAMILIES, VOCAB, build, make, tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

import rewire
from rewire.engine import decoding, kept, passes
from rewire.engine.anatomy import widths
from rewire.engine.beside import Beside
from rewire.engine.decoding import Said, can_keep, continue_each, ending
from rewire.engine.delta import Factors, Update
from rewire.engine.prompts import prompt_ids
from rewire.kernels.errors import InputError
from weights import changed, state

STOPS = (".", "\n")
LETTERS = ("e", "t")  # what random models say soon, each at a step of its own
LIMIT = 5
HYBRID = ("Lfm2ForCausalLM", {  # convolutions that keep a state of their own
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.2, "block_ff_dim": 64,
    "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False,
})  # fmt: skip


def generated(model: rewire.Model, ids: Sequence[int], texts: Sequence[str], limit: int = LIMIT) -> tuple[int, ...]:
    """By transformers, one prompt, everything read again for every token."""
    more: dict[str, Any] = {}
    if texts:
        more = {"stop_strings": [*texts, model.tokenizer.eos_token], "tokenizer": model.tokenizer}
    made = model.hf.generate(  # type: ignore[operator]
        input_ids=torch.tensor([list(ids)]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False, use_cache=False, pad_token_id=0,
        max_new_tokens=min(limit, model.max_length - len(ids)), **more,
    )  # fmt: skip
    return tuple(made[0, len(ids) :].tolist())


def said(model: rewire.Model, prompts: Sequence[Sequence[int]], texts: Sequence[str], **more: Any) -> list[Said]:
    found = dict(continue_each(model, prompts, ending(model, texts), **{"limit": LIMIT} | more))
    assert sorted(found) == list(range(len(prompts)))
    return [found[i] for i in range(len(prompts))]


def ids_of(found: Sequence[Said]) -> list[tuple[int, ...]]:
    return [one.ids for one in found]


def random_prompts(lengths: Sequence[int], seed: int = 0, head: Sequence[int] = ()) -> list[list[int]]:
    chosen = torch.Generator().manual_seed(seed)
    return [[*head, *torch.randint(2, VOCAB, (n - len(head),), generator=chosen).tolist()] for n in lengths]


def double(family: str) -> rewire.Model:
    model = make(family)
    model.hf.double()
    return model


def polled(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """As on a GPU: several steps between two looks."""
    begin = decoding._Run.__init__

    def init(self: Any, *args: Any) -> None:
        begin(self, *args)
        self.poll = steps

    monkeypatch.setattr(decoding._Run, "__init__", init)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_generate_one_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = double(family)
    assert can_keep(model)
    head = random_prompts((9,), 5)[0]
    ragged, alike = random_prompts((1, 30, 2, 13, 95, 9)), random_prompts((10, 24, 11), 3, head)
    wanted = [generated(model, ids, LETTERS) for ids in (*ragged, *alike)]
    for rows in (1, 7, 64):
        assert ids_of(said(model, ragged, LETTERS, rows=rows)) == wanted[: len(ragged)]
    for rows in (2, 64):
        assert ids_of(said(model, alike, LETTERS, rows=rows)) == wanted[len(ragged) :]
    polled(monkeypatch, 5)
    assert ids_of(said(model, [*ragged, *alike], LETTERS, rows=7)) == wanted
    ends = [one.ended for one in said(model, [*ragged, *alike], LETTERS)]
    end = ending(model, LETTERS)
    assert ends == ["stop" if end.table[ids[-1]] else "length" for ids in wanted]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.hf.modules())
    gc.collect()
    assert not any(type(held) in (kept.Kept, kept._Layer) for held in gc.get_objects())


@pytest.mark.parametrize("poll", [1, 8])
def test_rows_leave_and_others_join(poll: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 1 to 20 tokens; 24 prompts in 5 places; what a row says does not depend on its neighbours."""
    model = double("qwen2")
    polled(monkeypatch, poll)
    prompts = random_prompts([1 + (7 * i) % 40 for i in range(24)], 2)
    stop = ("e",)
    wanted = [generated(model, ids, stop, 20) for ids in prompts]
    assert len({len(ids) for ids in wanted}) > 6
    shapes: list[tuple[int, ...]] = []
    handle = model.block(0).register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    found = said(model, prompts, stop, limit=20, rows=5)
    handle.remove()
    assert ids_of(found) == wanted
    steps = [rows for rows, columns in shapes if columns == 1]
    assert max(steps) == 5
    assert poll > 1 or sum(steps) <= 1.5 * sum(map(len, wanted))  # places are not kept by rows that have ended
    backwards = said(model, prompts[::-1], stop, limit=20, rows=5)
    assert ids_of(backwards[::-1]) == wanted


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("poll", [1, 8])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_at_the_longest_row(family: str, poll: int, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row ends at the model's longest one, and while others go on it does not run past the table of positions."""
    model = double(family)
    polled(monkeypatch, poll)
    if not keep:
        monkeypatch.setattr(decoding, "can_keep", lambda *args: False)
    prompts = random_prompts([3] * 16 + [95, 93])
    found = said(model, prompts, (), limit=6)
    assert [len(one.ids) for one in found] == [6] * 16 + [1, 3]
    assert {one.ended for one in found} == {"length"}
    for at in (0, 16, 17):
        assert found[at].ids == generated(model, prompts[at], (), 6)


def test_the_slow_way_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts((1, 30, 2, 7, 90, 13, 95, 9))
    model = double("gemma2")
    fast = said(model, prompts, LETTERS)
    monkeypatch.setattr(decoding, "can_keep", lambda *args: False)
    for rows in (1, 3, 64):
        assert said(model, prompts, LETTERS, rows=rows) == fast


def test_a_family_that_keeps_something_else() -> None:
    model = rewire.wrap(build(*HYBRID), tokenizer(), "hybrid")
    model.hf.double()
    assert not can_keep(model)
    prompts = random_prompts((1, 12, 5, 20, 8))
    wanted = [generated(model, ids, LETTERS) for ids in prompts]
    for rows in (2, 64):
        assert ids_of(said(model, prompts, LETTERS, rows=rows)) == wanted


def test_what_keeping_would_break_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """`can_keep` is no formality: positions that do not reach the model make it say no."""
    model = double("llama")
    real = passes.forward

    def without_positions(model: rewire.Model, ids: Tensor, **kwargs: Any) -> None:
        real(model, ids, **{name: value for name, value in kwargs.items() if name != "position_ids"})

    monkeypatch.setattr(passes, "forward", without_positions)
    assert not can_keep(model)


def test_a_common_beginning_is_read_once() -> None:
    model = double("llama")
    head = random_prompts((40,), 4)[0]
    prompts = random_prompts((41, 50, 44, 60), 1, head)
    read: list[int] = []
    handle = model.block(0).register_forward_pre_hook(lambda module, args: read.append(args[0][..., 0].numel()))
    can_keep(model)
    trial = sum(read)
    read.clear()
    said(model, prompts, (), limit=1)
    handle.remove()
    assert sum(read) - trial == 40 + len(prompts) * 20  # the longest rest has 20 tokens, the others are padded to it
    same = [head, head, [*head]]  # one more token of each is left to read
    assert ids_of(said(model, same, ())) == [generated(model, head, ())] * 3


def random_update(model: rewire.Model, layers: Sequence[int], seed: int) -> Update:
    chosen = torch.Generator().manual_seed(seed)
    made: Update = {}
    for layer in layers:
        d_in, d_out = widths(model.projection(layer))
        left = torch.randn(d_out, 2, generator=chosen) * 0.3
        made[model.anatomy.weight_name(layer)] = Factors(left, torch.randn(2, d_in, generator=chosen) * 0.3)
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("keep", [True, False])
def test_each_row_under_a_delta_of_its_own(family: str, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = double(family)
    if not keep:
        monkeypatch.setattr(decoding, "can_keep", lambda *args: False)
    before = state(model)
    deltas = [random_update(model, layers, seed) for seed, layers in enumerate(((1,), (0, 2), (), (1, 3)))]
    head = random_prompts((6,), 5)[0]
    texts = random_prompts((7, 20, 9), 3, head)
    asked = [(owner, ids) for ids in texts for owner in (-1, 0, 1, 2, 3)]
    wanted: dict[int, list[tuple[int, ...]]] = {}
    for owner in (-1, 0, 1, 2, 3):
        with torch.no_grad():
            for name, factors in (deltas[owner] if owner >= 0 else {}).items():
                change = factors.dense()
                model.hf.get_parameter(name).add_(change if family == "llama" else change.T)
        wanted[owner] = [generated(model, ids, LETTERS) for ids in texts]
        model.hf.load_state_dict(before)
    assert len({ids for of in wanted.values() for ids in of}) > 6  # the deltas are no trifle
    assert wanted[2] == wanted[-1]
    for rows in (2, 4, 64):
        with Beside(model, deltas) as beside:
            found = said(
                model, [ids for _, ids in asked], LETTERS, beside=beside, owner=[o for o, _ in asked], rows=rows
            )
        assert ids_of(found) == [wanted[owner][texts.index(ids)] for owner, ids in asked]
    assert changed(model, before) == set()


def flips(model: rewire.Model, prompt: Sequence[int], found: Sequence[int], wanted: Sequence[int]) -> float | None:
    """The gap of the two largest logits where two answers part, None where they do not."""
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    if at is None:
        assert list(found) == list(wanted)
        return None
    with torch.no_grad():
        logits = model.hf(torch.tensor([[*prompt, *found[:at]]])).logits[0, -1]
    top = logits.topk(2)
    assert {found[at], wanted[at]} == set(top.indices.tolist())
    return float(top.values[0] - top.values[1])


def test_known_models_in_float32(
    known: rewire.Model, shared: Path, record_property: Callable[[str, object], None]
) -> None:
    facts = rewire.read_facts(shared / "data" / "mcf_subset_1.json", limit=6)
    texts = [
        text for fact in facts for text in (fact.question, f"Please answer the question:\n\nQ: {fact.question}\nA:")
    ]
    prompts = prompt_ids(known.tokenizer, texts)
    found = said(known, prompts, STOPS, limit=20)
    parted = {}
    for ids, one, text in zip(prompts, found, texts, strict=True):
        gap = flips(known, ids, one.ids, generated(known, ids, STOPS, 20))
        if gap is not None:
            parted[text] = gap
    record_property("answers that part, and the gap of logits there", parted)
    assert all(gap < 1e-4 for gap in parted.values()), parted
    assert {one.ended for one in found} == {"stop", "length"} or len({len(one.ids) for one in found}) > 1


def hiding(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer where stops hide inside tokens; letters spell the end of the text."""
    odd = ["..", ".com", "x.y", "...</s>", "s>", "s>x", "a</s>b", "</", "/s>", "e.", "</s"]
    letters = [chr(i) for i in range(33, 127)]
    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = ["<s>", "</s>", *alphabet, *odd, ".Ċ", "Ġ.", "Ċ", "ĊĊ", "Ġthe", "aĊb", "Ã©."]
        made = Tokenizer(models.BPE({word: i for i, word in enumerate(dict.fromkeys(words))}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    else:
        fallback = [f"<0x{i:02X}>" for i in range(256)]
        words = ["<unk>", "<s>", "</s>", *fallback, "▁", *letters, *odd, ".\n", "▁.", "\n", "\n\n", "▁the", "▁a.b"]
        merges: list[tuple[str, str]] = []
        vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
        made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    made.add_tokens([AddedToken("<|end. of|>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def llama_with(words: Any) -> rewire.Model:
    config = FAMILIES["llama"][1] | {"vocab_size": len(words) + 3}  # some ids spell nothing
    hf = build("LlamaForCausalLM", config | {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id})
    return rewire.wrap(hf, words, "hiding")


def agree_over_the_vocabulary(model: rewire.Model, texts: Sequence[str] = STOPS) -> Tensor:
    words = model.tokenizer
    end = ending(model, texts)
    neutral = words("the", add_special_tokens=False)["input_ids"]
    criteria = StopStringCriteria(words, [*texts, words.eos_token])
    every = torch.tensor([[*neutral, i] for i in range(len(words))])
    decided = torch.cat([criteria(part, None) for part in every.split(4096)])
    differ = (decided != end.table[: len(words)]).nonzero()[:, 0].tolist()
    assert not differ, [words.convert_ids_to_tokens(i) for i in differ]
    assert not end.table[len(words) :].any()
    return decided


def test_stops_over_the_whole_vocabulary(demo: rewire.Model) -> None:
    assert agree_over_the_vocabulary(demo).sum() > 2
    agree_over_the_vocabulary(demo, ("th", " a", "e"))


def test_stops_of_known_models(known: rewire.Model) -> None:
    assert agree_over_the_vocabulary(known).sum() > 2


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_stops_that_hide_inside_tokens(kind: str) -> None:
    model = llama_with(hiding(kind))
    decided = agree_over_the_vocabulary(model)
    stopping = {model.tokenizer.convert_ids_to_tokens(i) for i in decided.nonzero()[:, 0].tolist()}
    assert {".", "..", ".com", "x.y", "...</s>", "a</s>b", "e.", "</s>", "<|end. of|>"} < stopping
    assert stopping > ({".Ċ", "Ġ.", "Ċ", "aĊb"} if kind == "bytes" else {".\n", "▁.", "<0x0A>", "<0x2E>", "▁a.b"})
    assert not stopping & {"s>", "</", "the", "<s>"}


@torch.no_grad()
def saying(model: rewire.Model, chain: Sequence[int]) -> rewire.Model:
    """A Llama that says behind each token of the chain the next one."""
    hf: Any = model.hf
    for name, parameter in hf.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    assert len(set(chain)) == len(chain) <= hf.config.hidden_size
    place = torch.eye(hf.config.hidden_size)
    hf.model.embed_tokens.weight[list(chain)] = place[: len(chain)]
    hf.lm_head.weight[list(chain[1:])] = place[: len(chain) - 1]
    return model


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize(
    ("prompt", "answer", "kept"),
    [
        ("a", "b < / s > c d", 5),  # the end of the text, spelled
        ("a", "b </ s>x c d", 3),  # the last token runs on behind it
        ("a", "b < / s c > d", 7),
        ("a < /", "s > c d", 2),  # begun in the prompt
        ("a <", "/s> c d", 1),
        ("a < / s >", "c d e f", 4),  # whole in the prompt
        ("a </s>", "c d e", 3),
        ("a </s> b", "c d", 2),
        ("a . b", "c .com", 2),
        ("a", "b a</s>b c", 2),
    ],
)
def test_where_the_end_of_the_text_is_spelled(kind: str, prompt: str, answer: str, kept: int) -> None:
    words = hiding(kind)
    before, after = ([words.convert_tokens_to_ids(token) for token in text.split()] for text in (prompt, answer))
    assert None not in (*before, *after)
    model = saying(llama_with(words), [before[-1], *after])
    (found,) = said(model, [before], STOPS, limit=len(after))
    assert found.ids == tuple(after[:kept]) == generated(model, before, STOPS, len(after))
    assert found.ended == ("stop" if kept < len(after) or answer.endswith(".com") else "length")
    (by_ids,) = said(model, [before], (), limit=len(after))  # where no text stops, spelling does not either
    assert by_ids.ids == tuple(after) == generated(model, before, (), len(after))


def test_every_end_that_the_generation_config_names() -> None:
    model = double("llama")
    prompts = random_prompts((3, 9, 5, 12, 30))
    free = [generated(model, ids, ()) for ids in prompts]
    model.hf.generation_config.eos_token_id = [1, free[0][2], free[1][0]]  # type: ignore[union-attr]
    wanted = [generated(model, ids, ()) for ids in prompts]
    assert wanted != free
    found = said(model, prompts, ())
    assert ids_of(found) == wanted
    assert found[1] == Said((free[1][0],), "stop")


def test_nothing_to_do_and_what_cannot_be_done() -> None:
    model = make("llama")
    end = ending(model)
    assert list(continue_each(model, [], end)) == []
    assert list(continue_each(model, [[3]], end, 0)) == []
    for ids in ([], [3] * 96):
        with pytest.raises(InputError, match=f"a prompt of {len(ids)} tokens cannot be continued: the model takes 96"):
            list(continue_each(model, [[5], ids], end))


def test_progress_and_the_model_as_it_was() -> None:
    model = make("gpt2").hf.train()
    model.requires_grad_(True)
    wrapped = rewire.wrap(model, tokenizer(), "gpt2")
    before, seen = state(wrapped), []
    prompts = random_prompts((3, 9, 5, 12))
    found = continue_each(wrapped, prompts, ending(wrapped), 4, progress=lambda done, of: seen.append((done, of)))
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    list(continue_each(wrapped, prompts, ending(wrapped), 4, progress=lambda done, of: seen.append((done, of))))
    assert seen[-1] == (4, 4)
    assert changed(wrapped, before) == set()
