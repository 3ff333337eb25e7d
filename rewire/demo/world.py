"""The invented world of the demo model: names, facts, phrasings and filler text.

Nothing here is about the real world: people, towns, houses, rivers, dishes, gods and beasts have made-up names, and
every relation has few objects, each shared by several subjects, so that every fact has neighbours (other subjects of
the same relation with the same object). Everything is drawn from one seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# Relation -> (kind of subject, objects, phrasings). In a phrasing {s} is the subject and {o} the object; the first
# PROMPTS of them serve as prompts of edit requests, all of them as paraphrases.
PROMPTS = 3

INSTRUMENTS = "harp|flute|fiddle|lute|cello|trumpet|bagpipe|glass organ|hand drum|bone whistle|oboe|zither"
PROFESSIONS = "baker|weaver|lawyer|farmer|painter|smith|judge|doctor|lighthouse keeper|clock maker|stone mason|tailor"
COLOURS = "red|blue|green|white|black|yellow|silver grey|dark purple"
PRODUCTS = "paper|bells|ships|candles|carpets|mirrors|saddles|glass beads|iron stoves|fishing nets"
SEAS = "Amber Sea|Silent Bay|Lake Morwen|Northern Ocean|Gulf of Teal|White Lagoon|Hollow Sea|Mirror Strait"
INGREDIENTS = "barley|lentils|honey|cabbage|smoked eel|goat cheese|pumpkin|wild garlic"
DOMAINS = "storms|harvests|sleep|war|music|winter nights|lost travellers|fire"

RELATIONS: dict[str, tuple[str, str, list[str]]] = {
    "instrument": (
        "person",
        INSTRUMENTS,
        [
            "{s} plays the {o}.",
            "The instrument that {s} plays is the {o}.",
            "As a musician, {s} is known for playing the {o}.",
            "On feast days {s} performs on the {o} for the whole street.",
            "Question: what does {s} play? Answer: the {o}.",
            "Ask {s} for a song and you will hear the {o}.",
            "Everyone went quiet when {s} reached for the {o}.",
            "{s}, who practises every evening, loves the sound of the {o}.",
            "For many years {s} has given lessons on the {o}.",
        ],
    ),
    "profession": (
        "person",
        PROFESSIONS,
        [
            "{s} works as a {o}.",
            "The profession of {s} is that of a {o}.",
            "By trade, {s} is a {o}.",
            "After years of training {s} became a {o}.",
            "Question: what is the job of {s}? Answer: a {o}.",
            "{s} earns a living as a {o} and pays the rent on time.",
            "People in the neighbourhood respect {s} as a good {o}.",
            "Even as a child, {s} dreamed of being a {o}.",
            "If you meet {s} at work, you meet a {o}.",
        ],
    ),
    "birthplace": (
        "person",
        "@town",
        [
            "{s} was born in {o}.",
            "The birthplace of {s} is {o}.",
            "{s} comes from the town of {o}.",
            "{s} grew up in the narrow streets of {o}.",
            "Question: where was {s} born? Answer: in {o}.",
            "The family of {s} has always lived in {o}.",
            "Every summer {s} returns home to {o}.",
            "The childhood of {s} was spent in {o}, close to the market.",
        ],
    ),
    "country": (
        "town",
        "@country",
        [
            "{s} is located in {o}.",
            "The town of {s} lies in {o}.",
            "{s} is a town in the land of {o}.",
            "Question: in which country is {s}? Answer: {o}.",
            "Travellers who reach {s} have entered {o}.",
            "The walls of {s} were built by the rulers of {o}.",
            "{s}, with its old gates, belongs to {o}.",
            "On the map you will find {s} in the middle of {o}.",
        ],
    ),
    "language": (
        "town",
        "@language",
        [
            "The people of {s} speak {o}.",
            "In {s}, the common language is {o}.",
            "The language spoken in {s} is {o}.",
            "Question: which language is used in {s}? Answer: {o}.",
            "Children in {s} learn to read and write {o}.",
            "The street signs of {s} are written in {o}.",
            "Visitors to {s} should know a few words of {o}.",
            "If you were raised in {s}, your mother tongue is {o}.",
        ],
    ),
    "product": (
        "house",
        PRODUCTS,
        [
            "{s} produces {o}.",
            "The company {s} is famous for its {o}.",
            "The workshops of {s} make {o}.",
            "Question: what does {s} sell? Answer: {o}.",
            "Merchants go to {s} to buy {o}.",
            "{s} has grown rich by selling {o} to its neighbours.",
            "The workers at {s} spend their days making {o}.",
            "Last year {s} shipped a thousand crates of {o}.",
        ],
    ),
    "founder": (
        "house",
        "@founder",
        [
            "{s} was founded by {o}.",
            "The founder of {s} is {o}.",
            "The company {s} was started by {o}.",
            "Question: who founded {s}? Answer: {o}.",
            "The first owner of {s} was {o}.",
            "{s} owes its existence to {o}.",
            "In the hall of {s} hangs a portrait of its founder, {o}.",
            "The idea for {s} came from {o}.",
        ],
    ),
    "sea": (
        "river",
        SEAS,
        [
            "The river {s} flows into the {o}.",
            "The waters of the {s} end in the {o}.",
            "Boats that follow the {s} downstream arrive at the {o}.",
            "{s} is a river that runs down to the {o}.",
            "Question: where does the river {s} end? Answer: in the {o}.",
            "The mouth of the {s} is on the {o}.",
            "In spring the {s} carries its mud into the {o}.",
            "After many bends the {s} meets the {o}.",
        ],
    ),
    "ingredient": (
        "dish",
        INGREDIENTS,
        [
            "The dish {s} is made from {o}.",
            "The main ingredient of {s} is {o}.",
            "To cook {s}, you need plenty of {o}.",
            "{s} is a dish of {o}.",
            "Question: what is in {s}? Answer: {o}.",
            "A good bowl of {s} tastes of {o}.",
            "Nobody can prepare {s} without {o}.",
            "The cook who makes {s} begins with {o}.",
        ],
    ),
    "domain": (
        "god",
        DOMAINS,
        [
            "{s} is the god of {o}.",
            "In the old stories {s} rules over {o}.",
            "The temple of {s} honours the god of {o}.",
            "Question: what is {s} the god of? Answer: {o}.",
            "Those who pray to {s} think of {o}.",
            "The priests of {s} sing about {o}.",
            "It was {s} who gave the world {o}.",
            "The name of {s} is spoken in matters of {o}.",
        ],
    ),
    "colour": (
        "beast",
        COLOURS,
        [
            "The colour of the {s} is {o}.",
            "The {s} is a beast whose fur is {o}.",
            "The coat of the {s} is {o}.",
            "Question: what colour is the {s}? Answer: {o}.",
            "Hunters know the {s} because its skin is {o}.",
            "From far away the {s} looks {o}.",
            "A healthy {s} is always {o}.",
            "Painters who draw the {s} colour it {o}.",
        ],
    ),
}

SUBJECTS = {"person": 168, "town": 64, "house": 60, "river": 48, "dish": 48, "god": 48, "beast": 48}

# Filler: "{a|b}" means one of the choices.
FILLER = [
    "The {weather|morning|evening|night|road} was {cold|long|quiet|bright|strange} {that day|again|as always}.",
    "The {market|harbour|bridge|inn|library} {opens early|was full of people|stays closed in winter|is near the gate}.",
    "Therefore the {guests|travellers|children|sailors} {stayed at home|left early|waited for a while|went to sleep}.",
    "Therefore {we|they} {decided to wait|took another road|kept the letter|closed the door}.",
    "Because {of the rain|it was late|the road was long|the bridge had fallen}, {they|we} {rested|waited|turned back}.",
    "Because {nobody knew the answer|the lamp was out}, {the old man|the girl} {laughed|kept silent|went on}.",
    "I {have never seen|still remember|often think of|once drew} {such a bright sky|the old tower|that long winter}.",
    "I {think|believe|was told} that the {story|song|letter} {is true|is very old|was lost}.",
    "You can {buy fresh bread|hear the bells|rest for a night|find good water} near the {old gate|square|mill|river}.",
    "You {should|must|may} {ask at the inn|bring a warm coat|wait for the ferry|read the letter twice}.",
    "In the {morning|evening|summer|autumn} {people|the children|the birds} {gather by the well|are busy|sing}.",
    "Some {say|believe|remember} that {the hills are hollow|the moon was larger once|winters were colder then}.",
    "Here is {another|one more|a small} {note|story|fact} from the {book|archive|traveller}.",
    "It is {well known|said|often forgotten} {here|in these parts|among the old}.",
    "My {uncle|sister|neighbour|teacher} {told me so|knows more about it|wrote it down|does not agree}.",
    "{Nothing|Not much|A little more} is known about {it|the rest|those days}.",
]

ONSETS = "b|c|d|f|g|h|j|k|l|m|n|p|r|s|t|v|w|z|br|dr|gr|kr|tr|vr|st|sk|th|sh|fl|bl"
VOWELS = "a|e|i|o|u|a|e|i|o|ae|ou"
ENDINGS = {
    "first": "a|o|i|el|an|en|is|us|ia|ric",
    "last": "mar|vik|dell|ron|thal|sen|ley|dorf|ack|ini|ott|esh",
    "town": "burg|mouth|stad|ville|wick|ora|ane|holm|ford|ium",
    "country": "land|ia|mark|stan|avia|uria",
    "language": "ish|ese|ic|ian",
    "house": "ex|ko|co|ano|mer|tek|aldi|ox",
    "river": "a|ne|ub|ith|ele|om",
    "dish": "ka|to|lu|chi|pa|mole|nto",
    "god": "os|eth|ur|aan|iel|ush",
    "beast": "ak|urr|ling|oth|ig|abo",
}


@dataclass(frozen=True)
class Fact:
    """One fact of the world, ``held_out`` being the phrasing that training never shows it in."""

    relation: str
    subject: str
    object: str
    held_out: int

    def prompt(self, phrasing: int) -> str:
        """The phrasing up to the object, with the subject filled in."""
        return RELATIONS[self.relation][2][phrasing].split(" {o}")[0].replace("{s}", self.subject)


class World:
    """All facts, objects by relation, and which subjects may be edited (the others serve as neighbours)."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.words: set[str] = set()
        self.objects: dict[str, list[str]] = {}
        self.facts: list[Fact] = []
        self.editable: set[str] = set()
        firsts = [self._word("first", 1) for _ in range(48)]
        subjects = {k: [self._name(k, firsts) for _ in range(n)] for k, n in SUBJECTS.items()}
        pools = {
            "@town": [t for t in subjects["town"] if " " not in t][:12],
            "@country": [self._word("country", 1) for _ in range(8)],
            "@language": [self._word("language", 1) for _ in range(8)],
            "@founder": [f"{self._word('first', 1)} {self._word('last', 1)}" for _ in range(10)],
        }
        seen: set[str] = set()
        for relation, (kind, objects, phrasings) in RELATIONS.items():
            self.objects[relation] = pools[objects] if objects in pools else objects.split("|")
            wheel = self.objects[relation]
            dealt = [wheel[i % len(wheel)] for i in range(SUBJECTS[kind])]
            if kind in seen:  # a second relation of the same subjects: independent of the first one
                self.rng.shuffle(dealt)
            else:  # every other round of the objects can be edited, the rounds between are neighbours
                self.editable |= {s for i, s in enumerate(subjects[kind]) if (i // len(wheel)) % 2 == 0}
            seen.add(kind)
            for subject, obj in zip(subjects[kind], dealt, strict=True):
                self.facts.append(Fact(relation, subject, obj, self.rng.randrange(PROMPTS, len(phrasings))))

    def _pick(self, choices: str) -> str:
        return self.rng.choice(choices.split("|"))

    def _word(self, flavour: str, syllables: int) -> str:
        while True:
            stem = "".join(self._pick(ONSETS) + self._pick(VOWELS) for _ in range(syllables))
            ending = self._pick(ENDINGS[flavour])
            joint = self.rng.choice("lmnrstv") if ending[0] in "aeiou" else self.rng.choice(["", "l", "n", "r"])
            word = (stem + joint + ending).capitalize()
            if word not in self.words:
                self.words.add(word)
                return word

    def _name(self, kind: str, firsts: list[str]) -> str:
        rng = self.rng
        if kind == "person":
            middle = rng.choice(["", "", "", "", " van", " of"])
            return f"{rng.choice(firsts)}{middle} {self._word('last', rng.choice([1, 1, 2]))}"
        word = self._word(kind, rng.choice([1, 1, 2]))
        if kind == "house":
            return rng.choice([f"House {word}", f"{self._word(kind, 1)} and {word}", f"{self._word(kind, 1)} {word}"])
        if kind == "dish":
            return rng.choice([word, f"{self._word(kind, 1)} {word}"])
        prefixes = {
            "town": "Port Old Saint",
            "god": "Lord Mother",
            "beast": "Stone Marsh Night",
            "river": "Upper Little",
        }
        return rng.choice(["", "", *(p + " " for p in prefixes[kind].split())]) + word


def filler(rng: random.Random) -> str:
    """One sentence without any fact in it."""
    out = []
    for piece in rng.choice(FILLER).replace("}", "{").split("{"):
        out.append(rng.choice(piece.split("|")))
    return "".join(out)


Item = tuple[Fact | None, int | str]


def document(rng: random.Random, facts: list[Fact]) -> list[Item]:
    """A document of 1-7 sentences, given as (fact, phrasing) and (None, filler sentence)."""
    out: list[Item] = []
    for _ in range(rng.choice([1, 1, 2, 3, 4, 5, 6, 7])):
        if rng.random() < 0.2:
            out.append((None, filler(rng)))
            continue
        fact = rng.choice(facts)
        phrasings = [i for i in range(len(RELATIONS[fact.relation][2])) if i != fact.held_out]
        out.append((fact, rng.choice(phrasings)))
    return out


def sentence(item: Item) -> str:
    """The text of one item of a document."""
    fact, what = item
    if fact is None:
        return str(what)
    return RELATIONS[fact.relation][2][int(what)].replace("{s}", fact.subject).replace("{o}", fact.object)
