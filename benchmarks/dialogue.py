"""A dialogue of eight turns with the embedded model.

The prompt of each turn has all earlier turns and a new question, in the model's own chat format. The earlier
turns have fixed answers instead of the generated ones, so that every engine reads and generates the same
number of tokens. An engine with a prefix cache reuses the prompt of the turn before, and reads only its fixed
answer and the new question. Knows text, token ids and times; knows nothing about the engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.attempts import Attempts
from benchmarks.process import PeerProcess
from benchmarks.protocol import Request
from benchmarks.scenarios import Row, ask, in_rounds
from llama.prompt.dialog import Dialog
from llama.text.load_tokenizer import load_tokenizer

NEW_TOKENS = 64
ROUNDS = 3
_SYSTEM = "You are a helpful assistant. Answer in a few sentences."
_TURNS = (
    (
        "I am planning a trip of one week to Italy in May with two friends. Which cities would you visit if "
        "we like old buildings and good food, but do not want to change trains every day?",
        "I would stay in two places: four nights in Rome and three in Bologna. Rome has more old buildings "
        "than you can see in a week, and Bologna is famous for its food. A fast train takes about two hours "
        "from one to the other, so you travel only once.",
    ),
    (
        "That sounds good. What should we see in Rome if one of us has a bad knee and cannot walk more than "
        "two or three kilometres a day?",
        "See one large place a day and take a taxi there. The Pantheon, Piazza Navona and Campo de' Fiori "
        "are close together and flat. The Vatican Museums lend wheelchairs, and the Colosseum has a lift. "
        "Leave out the Palatine Hill, because its paths are steep and uneven.",
    ),
    (
        "How much money should we plan for each day, without the hotels?",
        "Plan about 80 euros for each person: 40 for two simple meals, 25 for tickets to museums, and 15 for "
        "taxis and coffee. A good dinner with wine costs more, about 45 euros in Rome. Bologna is a little "
        "cheaper.",
    ),
    (
        "My friend does not eat meat or fish. Will it be difficult to find something for her in Bologna?",
        "No. Many dishes there have meat sauce, but every restaurant has pasta with butter and sage, pumpkin "
        "tortelli, or vegetables with cheese. She can say: senza carne e senza pesce, per favore. The market "
        "in the Quadrilatero also has good bread, fruit and cheese.",
    ),
    (
        "What is the weather like at that time, and what clothes should we take with us?",
        "In May it is usually between 14 and 24 degrees, and it rains on about a third of the days. Take "
        "light clothes, a jacket for the evening and a small umbrella. Cover your shoulders and knees in "
        "churches. Shoes with soft soles help on the old streets.",
    ),
    (
        "Do we have to buy the train tickets early, or can we buy them at the station on the same day?",
        "You can do both, but early tickets are much cheaper. A ticket from Rome to Bologna costs about 25 "
        "euros if you buy it a month before, and about 70 on the same day. Cheap tickets are for one train "
        "only, so allow enough time.",
    ),
    (
        "We will have one free afternoon in Bologna. Is there a place nearby that is worth a short trip?",
        "Go to Ferrara, which is half an hour away by train. It has a castle with a moat, a long town wall "
        "with trees, and almost no cars. Everything is flat, so it is easy for a bad knee. Ravenna has "
        "famous mosaics, but the train takes more than an hour.",
    ),
    (
        "Please write down the whole plan as a short list, with one line for each of the seven days.",
        "",
    ),
)


def dialogues(folder: Path) -> list[list[Request]]:
    """Return one dialogue per round, with one request per turn, in the chat format of the model in `folder`.

    The dialogues differ in their first words, so that an engine cannot reuse the cache of an earlier round.
    """
    tokenizer = load_tokenizer(folder)
    found = []
    for number in range(1, ROUNDS + 1):
        said, requests = list[str](), list[Request]()
        for question, answer in _TURNS:
            dialog = Dialog(f"{number}. {_SYSTEM}", (*said, question))
            requests.append(Request(tokenizer.encode(dialog), NEW_TOKENS))
            said += [question, answer]
        found.append(requests)
    return found


def measure(
    attempts: Attempts, peers: Sequence[PeerProcess], rounds: Sequence[Sequence[Request]]
) -> dict[str, Row]:
    """Return one row per peer, with medians over the rounds.

    `first_tokens` has the time to first token of each turn, and `prompt_tokens` the length of its prompt.
    """
    first_tokens: dict[str, list[list[float]]] = {peer.spec.name: [] for peer in peers}

    def one(peer: PeerProcess) -> Row:
        before = first_tokens[peer.spec.name]
        requests = rounds[len(before)]
        answers = [ask(peer, [request])[0] for request in requests]
        before.append([answer[0] for answer in answers])
        seconds = sum(answer[-1] for answer in answers)
        return {"seconds": seconds, "tokens_per_second": NEW_TOKENS * len(requests) / seconds}

    title = f"a dialogue of {len(rounds[0])} turns"
    rows = in_rounds(attempts, peers, title, one, rounds=len(rounds), at_least=1, seconds=20.0)
    for name, row in rows.items():
        row["first_tokens"] = [median(turn) for turn in zip(*first_tokens[name], strict=True)]
        row["prompt_tokens"] = [len(request.prompt) for request in rounds[0]]
    return rows
