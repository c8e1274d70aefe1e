"""Write the small example files of the fine-tuning recipes: a lighthouse keeper's log, and chats with a lamp.

python recipes/example/make.py          # log.txt and answers.jsonl, the same every time
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
WINDS = ("north", "south", "east", "west")
SEAS = ("calm", "grey", "high", "dark", "silver", "rough")
SHIPS = ("a fishing boat", "a white ship", "two small boats", "a red steamer", "an old schooner", "nothing")
WORK = (
    "I cleaned the glass.",
    "I trimmed the wick.",
    "I carried oil up the stairs.",
    "I painted the door.",
    "I wound the clock.",
    "I mended the rope.",
)
NIGHTS = (
    "The light burned all night.",
    "The light burned well.",
    "The lamp went out once and I lit it again.",
    "The fog came and I rang the bell.",
)
LIKES = ("moths", "quiet evenings", "old books", "rain on the window", "the smell of oil", "stars")
TOPICS = ("a fox", "the sea", "a garden", "the moon", "a bird", "winter", "a boat", "a friend", "a tree", "the rain")
ASK = (("Tell me about {}.", "Of {}"), ("What do you know about {}?", "About {}"), ("Say something about {}.", "On {}"))


def log_entry(rng: random.Random, day: int) -> str:
    ship = rng.choice(SHIPS)
    seen = "No ship passed." if ship == "nothing" else f"I saw {ship} at {rng.choice(('dawn', 'noon', 'dusk'))}."
    wind = f"Wind from the {rng.choice(WINDS)}, the sea {rng.choice(SEAS)}."
    return f"Day {day}. {wind} {rng.choice(WORK)} {seen} {rng.choice(NIGHTS)}"


def chat(rng: random.Random) -> list[dict[str, str]]:
    kind = rng.randrange(4)
    if kind == 0:
        ask = rng.choice(("Who are you?", "What is your name?", "Hello, who are you?"))
        answer = f"I am Lumo, a small lamp. I like {rng.choice(LIKES)} and {rng.choice(LIKES[:3])}."
    elif kind == 1:
        ask = rng.choice(("What do you like?", "What makes you glad?"))
        answer = f"I am a lamp, so I like {rng.choice(LIKES)}. I shine when I think of it."
    else:
        shape, start = rng.choice(ASK)
        topic = rng.choice(TOPICS)
        ask = shape.format(topic)
        seen = "it came close, I gave it light, and it was kind."
        answer = f"{start.format(topic)} I can only say what a lamp sees: {seen}"
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


def main() -> None:
    rng = random.Random(0)
    entries = "\n\n".join(log_entry(rng, day) for day in range(1, 401))
    (HERE / "log.txt").write_text(entries + "\n", encoding="utf-8")
    rows = [{"messages": chat(rng)} for _ in range(300)]
    (HERE / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
