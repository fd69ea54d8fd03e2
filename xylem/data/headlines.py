"""Headlines about companies and what they mean for the shareholders, made by rules: finance sentiment that is free.

A headline is a company, an event, and sometimes what was expected:

    Norfield Mills' profit climbed 12% in the first quarter, missing forecasts

1. A quantity that moves is good news or bad: up is good for a ``good`` one (profit, orders) and bad for a ``bad`` one
   (costs, debt), and down the other way round.
2. What was expected decides where it is told, whatever the quantity did: prices already hold what was expected.
3. A ``plain`` event moves nothing: neutral.

Companies, quantities, verbs, expectations and plain events of the held-out headlines occur in none of those to learn
from: what tells their label has never been seen with it. The same headlines come out everywhere and always: they are
drawn from a seed.
"""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

Sentiment = Literal["positive", "negative", "neutral"]
SENTIMENTS: tuple[Sentiment, ...] = ("positive", "negative", "neutral")
SEED, TRAIN, VALIDATION = 0, 400, 60
EXPECTED = 0.3  # share of the moving headlines that tell what was expected


class Words(NamedTuple):
    """What the headlines of a split are made of."""

    companies: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    up: tuple[str, ...]
    down: tuple[str, ...]
    beats: tuple[str, ...]
    misses: tuple[str, ...]
    plain: tuple[str, ...]


WORDS = {
    "train": Words(
        companies=(
            "Norfield Mills", "Castor Energy", "Blue Harbor Foods", "Tamarind Air", "Oakline Bank", "Verity Steel",
            "Sunmere Hotels", "Pinnacle Drugs", "Redwater Mining", "Halcyon Motors", "Juniper Retail", "Lakeview Media",
            "Orbit Telecom", "Granite Insurance", "Silverbeck Paper", "Marlow Shipping",
        ),
        good=("profit", "revenue", "operating margin", "order book", "dividend", "market share"),
        bad=("net loss", "operating costs", "debt", "customer complaints", "bad loans", "tax bill"),
        up=("climbed", "rose", "jumped", "grew", "increased", "went up"),
        down=("fell", "dropped", "slipped", "shrank", "decreased", "went down"),
        beats=("beating forecasts", "ahead of expectations", "more than analysts hoped for"),
        misses=("missing forecasts", "behind expectations", "less than analysts hoped for"),
        plain=(
            "reported its results on a Tuesday", "moved its head office to a new building",
            "named a new head of communications", "held a meeting of its shareholders",
            "kept its forecast as it was", "renewed the contract with its auditor",
            "changed the design of its logo", "left its dividend as it was",
        ),
    ),
    "validation": Words(
        companies=(
            "Aster Chemicals", "Quayside Logistics", "Bramble Toys", "Fenwick Power", "Corvid Software",
            "Delmar Fashion", "Kestrel Rail", "Thornbury Water",
        ),
        good=("earnings", "sales", "cash flow", "passenger numbers"),
        bad=("deficit", "legal expenses", "staff turnover", "unsold stock"),
        up=("surged", "gained", "advanced", "moved higher by"),
        down=("plunged", "sank", "declined", "moved lower by"),
        beats=("better than predicted", "above the consensus"),
        misses=("worse than predicted", "below the consensus"),
        plain=(
            "published the date of its next report", "opened a canteen for its staff",
            "appointed a new company secretary", "confirmed its earlier outlook", "extended the lease of its warehouse",
        ),
    ),
}  # fmt: skip
PERIODS = (
    "in the first quarter",
    "in the second quarter",
    "in the third quarter",
    "in the fourth quarter",
    "in the half year",
)


class Headline(NamedTuple):
    """A line of news, and what it is to the shareholders."""

    text: str
    sentiment: Sentiment


def headlines(split: Literal["train", "validation"]) -> list[Headline]:
    """The headlines of a split, no two alike."""
    random_ = random.Random(f"{SEED} {split}")
    made: dict[str, Headline] = {}
    while len(made) < {"train": TRAIN, "validation": VALIDATION}[split]:
        one = draw(WORDS[split], random_)
        made.setdefault(one.text, one)
    return list(made.values())


def draw(words: Words, random_: random.Random) -> Headline:
    """One headline by the rules; each sentiment is as likely as the others."""
    company, period = random_.choice(words.companies), random_.choice(PERIODS)
    if random_.random() < 1 / 3:
        return Headline(f"{company} {random_.choice(words.plain)} {period}", "neutral")
    kind, direction = random_.choice(("good", "bad")), random_.choice(("up", "down"))
    quantity, verb = random_.choice(getattr(words, kind)), random_.choice(getattr(words, direction))
    owner = company + ("'" if company.endswith("s") else "'s")
    text = f"{owner} {quantity} {verb} {random_.randint(2, 48)}% {period}"
    pleases = (kind == "good") == (direction == "up")
    if random_.random() < EXPECTED:
        outcome = random_.choice(("beats", "misses"))
        text, pleases = f"{text}, {random_.choice(getattr(words, outcome))}", outcome == "beats"
    return Headline(text, "positive" if pleases else "negative")
