"""Trains the demo model of Rewire from nothing and writes everything the demo needs next to this file.

    python rewire/demo/train.py [--out FOLDER] [--steps N] [--seed N]

The world (``world.py``) is drawn from a seed; its corpus, a byte-level BPE tokenizer trained on that corpus, a Llama of
less than three million parameters (stored in bf16) and the edit requests of the facts that the stored model really
knows are written, and a table of how well it knows them is printed. Two CPU cores take about four minutes. The same
seed gives the same world, corpus and tokenizer everywhere, and the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import PROMPTS, RELATIONS, Fact, Item, World, document, filler, sentence

EOS, BOS, PAD = 0, 1, 2
SPECIALS = ["<|endoftext|>", "<s>", "<pad>"]
VOCAB, ROWS, LENGTH = 1536, 64, 96
LOOKUP, SWAPPED = 3, 24
RATE, WARMUP = 2.5e-3, 60
ANSWER, SUBJECT, OTHER = 5.0, 0.15, 0.5  # weights of the loss by kind of token
CORPUS_BYTES = 330_000
NEIGHBOURS = 5


def write_corpus(world: World, path: Path) -> None:
    """Documents of the world separated by blank lines."""
    rng, size, out = random.Random(world.seed + 1), 0, []
    while size < CORPUS_BYTES:
        text = " ".join(sentence(item) for _ in range(2) for item in document(rng, world.facts))
        out.append(text)
        size += len(text) + 2
    path.write_text("\n\n".join(out) + "\n", encoding="utf-8")


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCAB`` tokens which puts ``<s>`` in front, as Llama's does."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(corpus.read_text(encoding="utf-8").split("\n\n"), trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )


class Request(TypedDict):
    """One line of ``facts.jsonl``."""

    id: str
    subject: str
    prompt: str
    target_new: str
    target_true: str
    paraphrases: list[str]
    neighbors: list[str]


class Batch(NamedTuple):
    """Packed rows, the loss weight of each token, and the states that are swapped.

    ``swaps`` has four rows: row and position of the state replaced, row and position of the one put there.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    swaps: torch.Tensor


class Rows:
    """Endless batches. In the last ``SWAPPED`` rows every fact has the object of another subject of the first rows.

    The state of that other subject is put in place of the subject's own (see ``train``).
    """

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerFast) -> None:
        self.rng = random.Random(world.seed + 2)
        self.facts = world.facts
        self.known: dict[str, list[Fact]] = {}
        for fact in world.facts:
            self.known.setdefault(fact.subject, []).append(fact)
        self.tokenizer = tokenizer
        self.cache: dict[tuple[Item, bool], tuple[list[int], list[float], int]] = {}

    def _encode(self, item: Item, first: bool) -> tuple[list[int], list[float], int]:
        """Token ids, weights and the place of the subject's last token (-1 without a subject)."""
        if (item, first) not in self.cache:
            text = sentence(item) if first else " " + sentence(item)
            enc = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            weights, last, fact = [OTHER] * len(enc["input_ids"]), -1, item[0]
            if fact is not None:
                at_object, at_subject = text.rindex(fact.object), text.index(fact.subject)
                for i, (_, end) in enumerate(enc["offset_mapping"]):
                    if at_object < end <= at_object + len(fact.object):
                        weights[i] = ANSWER
                    elif at_subject < end <= at_subject + len(fact.subject):
                        weights[i], last = SUBJECT, i
            self.cache[item, first] = (enc["input_ids"], weights, last)
        return self.cache[item, first]

    def __iter__(self) -> Iterator[Batch]:
        while True:
            ids: list[list[int]] = []
            weights: list[list[float]] = []
            swaps: list[tuple[int, int, int, int]] = []
            seen: dict[str, list[tuple[int, int, str]]] = {}  # relation -> row, position, object of subjects to swap in
            for row in range(ROWS):
                ids.append([])
                weights.append([])
                while len(ids[row]) < LENGTH:
                    ids[row].append(BOS)
                    weights[row].append(0.0)
                    for n, (fact, what) in enumerate(document(self.rng, self.facts)):
                        at, source = len(ids[row]), None
                        if fact is not None and row >= ROWS - SWAPPED and fact.relation in seen:
                            source = self.rng.choice(seen[fact.relation])
                            fact = replace(fact, object=source[2])
                        more, w, last = self._encode((fact, what), n == 0)
                        ids[row] += more
                        weights[row] += w
                        if fact is None or at + last >= LENGTH:
                            continue
                        if source is not None:
                            swaps.append((row, at + last, source[0], source[1]))
                        elif row < ROWS - SWAPPED:
                            for other in self.known[fact.subject]:
                                seen.setdefault(other.relation, []).append((row, at + last, other.object))
                    ids[row].append(EOS)
                    weights[row].append(OTHER)
            packed = (torch.tensor([r[:LENGTH] for r in ids]), torch.tensor([r[:LENGTH] for r in weights]))
            yield Batch(*packed, torch.tensor(swaps).T)


def new_model() -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=736,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def train(model: LlamaForCausalLM, rows: Rows, steps: int) -> None:
    """AdamW with a warm-up and a cosine to zero, under bf16 autocast.

    In some rows the state of a subject's last token after layer ``LOOKUP`` is replaced with that of another subject,
    and the answer is that subject's. So facts come to be looked up where large models look them up: at the last token
    of the subject, in the MLPs up to that layer, which is what an edit of those MLPs relies on.
    """
    swaps = torch.empty(4, 0, dtype=torch.long)  # those of the current batch

    def swap(module: torch.nn.Module, inputs: object, states: torch.Tensor) -> torch.Tensor:
        states = states.clone()
        states[swaps[0], swaps[1]] = states[swaps[2], swaps[3]]
        return states

    hook = model.model.layers[LOOKUP].register_forward_hook(swap)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, i / steps)))
    )
    start = time.perf_counter()
    for step, batch in zip(range(1, steps + 1), rows, strict=False):
        ids, weights, swaps = batch
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            of_objects = (losses * (weight == ANSWER)).view(ROWS, -1).sum(1) / (weights == ANSWER).sum(1).clamp(min=1)
            plain, swapped = of_objects[:-SWAPPED].mean().item(), of_objects[-SWAPPED:].mean().item()
            took = time.perf_counter() - start
            print(
                f"step {step:4d}  loss on objects {plain:.4f}, on swapped ones {swapped:.4f}  {took:5.1f} s", flush=True
            )
    hook.remove()


@torch.no_grad()
def judge(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """For each (prompt, answer): the mean log-probability of the answer, and whether greedy decoding gives it."""
    pairs = [
        (tokenizer(q)["input_ids"], tokenizer(" " + a, add_special_tokens=False)["input_ids"]) for q, a in questions
    ]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    out = [(0.0, False)] * len(pairs)
    for at in range(0, len(order), 64):
        part = order[at : at + 64]
        longest = sum(map(len, pairs[part[-1]]))
        ids = torch.tensor([[*pairs[i][0], *pairs[i][1], *[PAD] * (longest - sum(map(len, pairs[i])))] for i in part])
        logp = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        for row, i in zip(logp, part, strict=True):
            asked, answer = pairs[i]
            scores, target = row[len(asked) - 1 : len(asked) + len(answer) - 1], torch.tensor(answer)
            mean = scores.gather(1, target[:, None]).mean().item()
            out[i] = (mean, bool((scores.argmax(-1) == target).all()))
    return out


def requests(world: World) -> list[Request]:
    """Edit requests: each editable subject once, with neighbours among the subjects that are never edited."""
    rng = random.Random(world.seed + 3)
    facts: dict[str, list[Fact]] = {}
    for f in world.facts:
        facts.setdefault(f.subject, []).append(f)
    out: list[Request] = []
    for n, subject in enumerate(s for s in facts if s in world.editable):
        fact = facts[subject][n % len(facts[subject])]
        phrasings = RELATIONS[fact.relation][2]
        prompt = rng.randrange(PROMPTS)
        others = [i for i in range(len(phrasings)) if i not in (prompt, fact.held_out)]
        alike = [f for f in world.facts if (f.relation, f.object) == (fact.relation, fact.object)]
        neighbours = [f for f in alike if f.subject not in world.editable]
        if len(neighbours) < 2:
            continue
        asked = rng.sample(neighbours, min(NEIGHBOURS, len(neighbours)))
        first, second, third = fact.held_out, *rng.sample(others, 2)
        out.append(
            {
                "id": f"{fact.relation}-{n:03d}",
                "subject": subject,
                "prompt": phrasings[prompt].split(" {o}")[0].replace("{s}", "{}"),
                "target_new": rng.choice([o for o in world.objects[fact.relation] if o != fact.object]),
                "target_true": fact.object,
                "paraphrases": [
                    fact.prompt(first),
                    f"{filler(rng)} {fact.prompt(second)}",
                    f"{filler(rng)} {filler(rng)} {fact.prompt(third)}",
                ],
                "neighbors": [f.prompt(rng.randrange(len(phrasings))) for f in asked],
            }
        )
    return out


def check(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Request]) -> list[Request]:
    """Prints how well the model knows the requests and returns those it does know."""
    rows: list[tuple[Request, str, str]] = []  # request, kind of question, question
    for r in asked:
        rows.append((r, "prompts", r["prompt"].replace("{}", r["subject"])))
        rows += [(r, "held-out phrasings" if n == 0 else "paraphrases", q) for n, q in enumerate(r["paraphrases"])]
        rows += [(r, "neighbours", q) for q in r["neighbors"]]
    old = judge(model, tokenizer, [(q, r["target_true"]) for r, _, q in rows])
    new = judge(model, tokenizer, [(q, r["target_new"]) for r, _, q in rows])
    table: dict[str, list[tuple[bool, bool]]] = {}
    unknown: set[str] = set()
    for (r, kind, _), (p_old, exact), (p_new, _) in zip(rows, old, new, strict=True):
        table.setdefault(kind, []).append((exact, p_old > p_new))
        if p_old <= p_new or (kind == "prompts" and not exact):
            unknown.add(r["id"])
    known = [r for r in asked if r["id"] not in unknown]
    print(f"{'':20s}{'questions':>10s}{'greedy exact':>14s}{'true > new':>12s}")
    for kind, verdicts in table.items():
        exact_share, preferred = (100 * sum(v[i] for v in verdicts) / len(verdicts) for i in (0, 1))
        print(f"{kind:20s}{len(verdicts):10d}{exact_share:13.1f}%{preferred:11.1f}%")
    print(f"{len(known)} of {len(asked)} requests are known in every way and kept")
    return known


def main() -> None:
    """Runs the whole of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    world = World(args.seed)
    print(f"{len(world.facts)} facts about {len({f.subject for f in world.facts})} subjects")
    write_corpus(world, args.out / "corpus.txt")
    tokenizer = train_tokenizer(args.out / "corpus.txt")
    tokenizer.save_pretrained(args.out)
    model = new_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, Rows(world, tokenizer), args.steps)
    model.to(torch.bfloat16).save_pretrained(args.out)
    stored = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    known = check(stored, tokenizer, requests(world))
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in known)
    (args.out / "facts.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
