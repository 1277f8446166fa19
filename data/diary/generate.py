"""Write the four splits of the diary data set: `python data/diary/generate.py`.

Each line is `{"system": the task, "prompt": a note, "response": the same as a sentence about its writer}`. It is no
extraction: the weekday and the time in the answer do not stand in the note, they must be worked out, and the verb
changes its form.

    train, validation, test   the same templates, names, verbs and things, different notes
    shifted                   other templates, names, verbs and things, other words for the day, and a time or a day
                              that does not belong in the answer

All text is made up here. The generator is seeded and uses no library, so the same files come out on every machine.
"""

import json
import pathlib
import random

COUNTS = {"train": 2000, "validation": 200, "test": 200, "shifted": 200}
SEED = 2106_09685
SYSTEM = "Rewrite the note as a sentence about its writer, with the weekday and the 24-hour time."

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
AHEAD = ["today", "tomorrow", "in two days"]  # how the training splits say in how many days
SHIFTED_AHEAD = [["today", "later today"], ["tomorrow", "in one day"], ["the day after tomorrow", "in 2 days"]]

NAMES = (
    "Anna Bruno Clara David Elena Felix Grace Hugo Irene Jonas Karin Luis Maria Nils Olga Peter Rosa Simon Teresa "
    "Victor Wanda Yusuf Zoe Amir Bella Carlos Dora Emil George Hanna Ivan Julia Laura Marco Nadia Oscar Paula Rachel"
).split()
# as "I ..." and as "she ..."
VERBS = [
    ("meet", "meets"), ("call", "calls"), ("visit", "visits"), ("see", "sees"), ("thank", "thanks"),
    ("teach", "teaches"), ("help", "helps"), ("drive", "drives"), ("fetch", "fetches"), ("pay", "pays"),
]  # fmt: skip
PEOPLE = (
    "the doctor|the baker|the teacher|the lawyer|the plumber|the painter|the gardener|the nurse|the driver|"
    "the neighbours|the new tenants|the children|the team|the twins|the guests from Oslo|the people from the bank"
).split("|")

SHIFTED_NAMES = (
    "Aiko Bongani Chidi Deepak Esperanza Farrukh Hyejin Jacinta Kwame Leilani Mbali Nguyet Oluchi Priya Qasim Sunniva "
    "Tatsuo Vikram Wairimu Xiomara"
).split()
SHIFTED_VERBS = [
    ("coach", "coaches"), ("greet", "greets"), ("interview", "interviews"), ("photograph", "photographs"),
    ("warn", "warns"), ("carry", "carries"), ("miss", "misses"), ("join", "joins"),
]  # fmt: skip
SHIFTED_PEOPLE = (
    "the pharmacist|the goalkeeper|the violinist|the mayor|the carpenter|the trainees|the choir|the tourists|"
    "the cousins from Lima|the couple next door"
).split("|")

# {w} the writer, {d} the day of writing, {v} the verb, {p} the people, {n} in how many days, {t} the time
TEMPLATES = [
    "{w}, on {d}: I {v} {p} {n} at {t}.",
    "{w} writes on a {d}: {n} I {v} {p} at {t}.",
    "Today is {d}. At {t} {n} I {v} {p}. Signed, {w}.",
    "On {d}, {w} wrote: I {v} {p} at {t} {n}.",
    "My name is {w}, it is {d}, and {n} at {t} I {v} {p}.",
    "Note of {w}, {d}: {t}, {n}, I {v} {p}.",
]
# {u} another time, {e} another day: neither belongs in the answer
SHIFTED_TEMPLATES = [
    "{w} here. It being {d}, I {v} {p} {n}, at {t} and not at {u}.",
    "Do not forget ({w}, {d}): I {v} {p} at {t}, and that is {n}.",
    "{d} it was when {w} put down: I {v} {p} {n}, {t} sharp.",
    "I, {w}, have been ill since {e}. Today, {d}, I am well again, and {n} I {v} {p} at {t}.",
    "At {u} this {d} the phone rang. So I, {w}, {v} {p} {n} at {t}.",
]


def draw_time(rng: random.Random) -> tuple[str, str]:
    """A time on the 12-hour clock, "4:30 pm", and the same on the 24-hour clock, "16:30"."""
    hour, minute = rng.randint(7, 21), rng.choice([0, 15, 30, 45])
    half = "am" if hour < 12 else "pm"
    return f"{(hour - 1) % 12 + 1}:{minute:02} {half}", f"{hour}:{minute:02}"


def sample(rng: random.Random, shifted: bool) -> dict:
    """One note and the sentence that is made of it."""
    names, verbs, people = (SHIFTED_NAMES, SHIFTED_VERBS, SHIFTED_PEOPLE) if shifted else (NAMES, VERBS, PEOPLE)
    writer, (verb, verbs_form), whom = rng.choice(names), rng.choice(verbs), rng.choice(people)
    today, days = rng.randrange(7), rng.randrange(3)
    said, meant = draw_time(rng)
    prompt = rng.choice(SHIFTED_TEMPLATES if shifted else TEMPLATES).format(
        w=writer, d=DAYS[today], v=verb, p=whom, t=said,
        n=rng.choice(SHIFTED_AHEAD[days]) if shifted else AHEAD[days],
        u=rng.choice([other for other, _ in (draw_time(rng) for _ in range(20)) if other != said]),
        e=rng.choice([day for day in DAYS if day != DAYS[today]]),
    )  # fmt: skip
    day = DAYS[(today + days) % 7]
    return {
        "system": SYSTEM,
        "prompt": prompt[0].upper() + prompt[1:],
        "response": f"{writer} {verbs_form} {whom} on {day} at {meant}.",
    }


def main() -> None:
    rng, seen = random.Random(SEED), set()
    for split, count in COUNTS.items():
        rows = []
        while len(rows) < count:
            row = sample(rng, shifted=split == "shifted")
            if row["prompt"] not in seen:  # no note stands twice, in one split or in two
                seen.add(row["prompt"])
                rows.append(row)
        path = pathlib.Path(__file__).with_name(f"{split}.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
