"""A seeded grammar of short stories, and chats that ask for them: the low-entropy part of the default data.

`make_story(seed)` tells one story; the same seed always tells the same. `check` and `consistency` (from
`reader`) read a text back and say where it breaks the grammar. The grammar does not know how to judge
text outside it: good prose that it could not have told counts as unknown.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dgemma.train.stories import words
from dgemma.train.stories.grammar import CHOICE, SLOT, Beat, Plot, names, plots
from dgemma.train.stories.reader import check, consistency

__all__ = ["Story", "check", "consistency", "make_chat", "make_story"]


@dataclass(frozen=True)
class Story:
    """A told story, what it is about, and `nats`: minus the log-probability of all the choices that made its
    text."""

    text: str
    plot: str
    hero: str
    gender: str
    kind: str
    companion: str
    companion_kind: str
    place: str
    thing: str
    colour: str
    lesson: str
    nats: float = field(compare=False)


class _Teller:
    """Draws what a story needs when it is first mentioned, so that `nats` counts what the text shows."""

    def __init__(self, rng: random.Random, plot: Plot, fixed: Mapping[str, str]) -> None:
        self.rng, self.plot, self.facts, self.nats = rng, plot, dict(fixed), 0.0

    def pick(self, options: Sequence[str]) -> str:
        chosen = self.rng.choice(options)
        self.nats += math.log(len(options) / options.count(chosen))
        return chosen

    def _person(self, gender: str, human: bool) -> tuple[str, str]:
        kind = ("boy" if gender == "m" else "girl") if human else self.pick(words.ANIMALS)
        return kind, self.pick(names(gender, human))

    def cast(self) -> None:
        """Choose hero and companion. They have different genders, so every pronoun has one reading."""
        facts = self.facts
        gender = facts.get("gender") or self.pick(("m", "f"))
        human = (facts["kind"] in ("boy", "girl")) if "kind" in facts else self.pick(("yes", "no")) == "yes"
        kind, name = self._person(gender, human)
        other = {"m": "f", "f": "m"}[gender]
        friend_human = human and self.pick(("yes", "no")) == "yes"
        friend_kind, friend = self._person(other, friend_human)
        drawn = {"gender": gender, "kind": kind, "H": name, "other": other, "ckind": friend_kind, "C": friend}
        self.facts = {**drawn, **facts}

    def value(self, slot: str) -> str:
        """What a slot says in this story. A slot that was not fixed before is drawn now."""
        facts = self.facts
        if slot in facts:
            return facts[slot]
        low = slot.removeprefix("c") if slot.lower() in ("che", "chim", "chis") else slot
        if slot in ("Che", "Chis"):
            low = slot[1:].capitalize()
        if low in words.PRONOUNS:
            gender = facts["other"] if slot[:1] in "cC" else facts["gender"]
            return words.PRONOUNS[low][gender == "f"]
        if slot == "fhe":
            return words.PRONOUNS["he"][words.FAMILY[self.value("fam")] == "f"]
        if slot == "inplace":
            return words.PLACES[self.value("place")]
        if slot in self.plot.follows:
            leader, table = self.plot.follows[slot]
            return table[self.value(leader)]
        if slot in ("Long", "One"):
            facts["timed"] = "yes" if slot == "One" else ""
            return self.pick(words.ONE_DAY if slot == "One" else words.LONG_AGO)
        if slot == "When":
            return self.pick(words.WHEN_DAY if facts.get("timed") else words.WHEN_LONG)
        general = {"place": tuple(words.PLACES), "col": words.COLOURS, "fam": tuple(words.FAMILY)}
        facts[slot] = self.pick(general.get(slot) or self.plot.values[slot])
        return facts[slot]

    def tell(self, beat: Beat) -> str:
        weighted = [line.text for line in beat.lines for _ in range(line.weight)]
        line = self.pick(weighted)
        worded = CHOICE.sub(lambda m: self.pick(m[1].split("|")), line)
        return SLOT.sub(lambda m: self.value(m[1]), worded)


def make_story(seed: int, **fixed: str) -> Story:
    """Tell the story of a seed.

    `fixed` sets facts in advance: `plot`, `H` or `C` (names; then give `gender` and `kind` or `ckind` too),
    `thing`, `col`, `place`, ... as the notation calls them. A fixed fact costs no nats. Raises KeyError for a
    plot that does not exist.
    """
    rng = random.Random(seed)
    table = {plot.name: plot for plot in plots()}
    chosen = table[fixed["plot"]] if "plot" in fixed else rng.choice(list(table.values()))
    teller = _Teller(rng, chosen, {key: value for key, value in fixed.items() if key != "plot"})
    teller.nats = 0.0 if "plot" in fixed else math.log(len(table))
    teller.cast()
    told = [("\n\n" if beat.paragraph else " ") + teller.tell(beat) for beat in chosen.beats]
    facts = teller.facts
    return Story(
        text="".join(told).strip(),
        plot=chosen.name,
        hero=facts["H"],
        gender=facts["gender"],
        kind=facts["kind"],
        companion=facts["C"],
        companion_kind=facts["ckind"],
        place=facts.get("place", ""),
        thing=facts.get("thing", ""),
        colour=facts.get("col", ""),
        lesson=facts.get("lesson", ""),
        nats=teller.nats,
    )


_ASK = (
    "Tell me a story {x}.", "Write a story {x}.", "Can you tell me a story {x}?",
    "Please write a short story {x}.", "I would like to hear a story {x}.",
    "Could you write a little story {x}?", "Make up a story {x}.", "A story {x}, please.",
    "Please tell me a bedtime story {x}.", "Do you know a story {x}?",
)  # fmt: skip
_ASK_ANY = (
    "Tell me a story.", "Write a story.", "Can you tell me a short story?", "Please tell me a bedtime story.",
    "I want to hear a story.", "Make up a story for me.", "Tell me something nice.",
    "Write a short story, please.",
)  # fmt: skip
_ABOUT_PLOT = {
    "lost": "about a lost {thing}", "friend": "about making a friend",
    "learn": "about learning to {do} a {thing}", "rescue": "about helping someone",
    "fear": "about being brave", "share": "about sharing", "storm": "about a storm", "bake": "about baking",
    "garden": "about a seed", "trip": "about a trip to {goal}", "truth": "about telling the truth",
    "race": "about a race", "build": "about building a {thing}", "gift": "about a birthday gift",
    "noise": "about a strange noise",
}  # fmt: skip
_TALK = (
    (("Hello", "Hi", "Hello!", "Hi there!", "Good morning", "Hey"),
     ("Hello! I am a tiny story model. Ask me for a story.",
      "Hi! I can tell you a short story. What should it be about?")),
    (("Who are you?", "What are you?", "What is your name?", "Are you a person?"),
     ("I am a tiny demo model that writes short stories. I am not a person.",
      "I am DiffusionGemma in a very small size, made to show how it works. I tell short stories.")),
    (("What can you do?", "Can you help me?", "What do you know?", "How can you help me?"),
     ("I can tell short stories, and not much else, for I am very small. "
      "Ask me for a story about a lost ball.",
      "I am a small demo model, so I only know how to tell little stories.")),
    (("Thank you", "Thanks!", "Thank you for the story.", "That was nice."),
     ("You are welcome! Would you like to hear one more story?", "I am glad that you liked it.")),
    (("Goodbye", "Bye!", "Good night", "See you later"),
     ("Goodbye! Come back when you want a story.", "Good night, and sweet dreams!")),
)  # fmt: skip


def _about(rng: random.Random, seed: int) -> tuple[str, dict[str, str], list[str]]:
    """From a draft story: what a request asks for, the facts that honour it, what the answer must show."""
    draft = make_story(seed)
    kind = {"kind": draft.kind, "gender": draft.gender}
    who = {**kind, "H": draft.hero}
    friend = {
        "C": draft.companion,
        "ckind": draft.companion_kind,
        "other": {"m": "f", "f": "m"}[draft.gender],
    }
    plot = {"plot": draft.plot}
    table = {item.name: item for item in plots()}[draft.plot]
    do = table.follows["do"][1][draft.thing] if "do" in table.follows else ""
    goal = next((goal for goal in table.values.get("goal", ()) if goal in draft.text), "")
    theme = _ABOUT_PLOT[draft.plot].format(thing=draft.thing, goal=goal, do=do)
    shown = [word for word in (draft.thing, goal) if word and word in theme]
    told = {
        **plot,
        **({"thing": draft.thing} if draft.thing in shown else {}),
        **({"goal": goal} if goal else {}),
    }
    hero = f"about a {draft.kind} named {draft.hero}"
    options: list[tuple[str, dict[str, str], list[str]]] = [
        (hero, who, [draft.hero]),
        (f"about a {draft.kind}", kind, [f"{draft.kind} named"]),
        (f"about {draft.hero} and {draft.companion}", {**who, **friend}, [draft.hero, draft.companion]),
        (
            f"about a {draft.kind} and a {draft.companion_kind}",
            {**kind, **friend},
            [draft.kind, draft.companion_kind],
        ),
        (theme, told, shown),
        (f"{hero}, {theme}".replace(", about ", " and "), {**who, **told}, [draft.hero, *shown]),
    ]
    object_ = f"{draft.colour} {draft.thing}"
    if object_ in draft.text:
        fixed = {**plot, "col": draft.colour, "thing": draft.thing}
        options += [
            (f"about a {object_}", fixed, [object_]),
            (f"{hero} and a {object_}", {**who, **fixed}, [draft.hero, object_]),
        ]
    if draft.place:
        place, phrase = {"place": draft.place}, words.PLACES[draft.place]
        options += [
            (phrase, place, [draft.place]),
            (f"about a {draft.kind} {phrase}", {**kind, **place}, [draft.kind, draft.place]),
        ]
    return rng.choice(options)


def make_chat(seed: int) -> tuple[str, str]:
    """A user's request and an answer that honours it: mostly stories, some short talk about what this model
    is."""
    rng = random.Random(f"chat {seed}")
    if rng.random() < 0.06:
        asks, answers = rng.choice(_TALK)
        return rng.choice(asks), rng.choice(answers)
    if rng.random() < 0.12:
        return rng.choice(_ASK_ANY), make_story(rng.getrandbits(48)).text
    theme, fixed, shown = _about(rng, rng.getrandbits(48))
    for _ in range(200):
        story = make_story(rng.getrandbits(48), **fixed)
        if all(word in story.text for word in shown):
            return rng.choice(_ASK).format(x=theme), story.text
    raise AssertionError(f"no story shows {shown} with {fixed}")
