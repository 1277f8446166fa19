"""Write the four splits of the orders data set: `python data/orders/generate.py`.

Each line is `{"system": the task, "prompt": a sentence that orders something, "response": the order as JSON}`.
The JSON has no spaces: that saves a quarter of the answer's tokens. Answers are compared as JSON values anyway.

    train, validation, test   the same templates, names, cities and number spellings, different sentences
    shifted                   other templates, names and cities, another word order, numbers spelled in other ways,
                              and distractors (a second city, a second number, a second colour) to be ignored

All text is made up here. The generator is seeded and uses no library, so the same files come out on every machine.
"""

import json
import pathlib
import random

COUNTS = {"train": 2000, "validation": 200, "test": 200, "shifted": 200}
SEED = 2305_14314
SYSTEM = "Turn the order into JSON with customer, item, colour, quantity, city and total."

COLOURS = "red blue green yellow black white orange purple grey brown pink silver".split()
# singular, plural
ITEMS = [
    ("lamp", "lamps"), ("chair", "chairs"), ("mug", "mugs"), ("scarf", "scarves"), ("notebook", "notebooks"),
    ("umbrella", "umbrellas"), ("candle", "candles"), ("basket", "baskets"), ("blanket", "blankets"),
    ("vase", "vases"), ("kettle", "kettles"), ("shelf", "shelves"), ("cushion", "cushions"), ("plate", "plates"),
    ("bicycle", "bicycles"), ("backpack", "backpacks"), ("brush", "brushes"), ("bottle", "bottles"),
    ("watch", "watches"), ("towel", "towels"), ("box", "boxes"), ("curtain", "curtains"), ("jacket", "jackets"),
    ("knife", "knives"),
]  # fmt: skip
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
TENS = {20: "twenty", 30: "thirty", 40: "forty", 50: "fifty", 60: "sixty"}

FIRST = (
    "Anna Bruno Clara David Elena Felix Grace Hugo Irene Jonas Karin Luis Maria Nils Olga Peter Rosa Simon Teresa "
    "Victor Wanda Yusuf Zoe Amir Bella Carlos Dora Emil Fatima George Hanna Ivan Julia Kemal Laura Marco Nadia Oscar "
    "Paula Quentin Rachel Stefan Tanja Umar Vera Walter Ximena Yara Zeno Astrid Boris Celine Dario Esther Fabio Gloria"
).split()
LAST = (
    "Adler Brandt Costa Duarte Evans Fischer Garcia Hansen Ivanov Jansen Keller Larsen Moreau Novak Olsen Petrov "
    "Quinn Rossi Silva Turner Ueda Vargas Weber Young Zimmer Baker Carter Dubois Ericson Ferrari Gruber Horvath "
    "Iversen Jimenez Kowalski Lombardi Mertens Nielsen Okafor Pereira Reyes Schmidt Tanaka Ulrich Vasquez Wagner "
    "Yilmaz Zanetti Almeida Bergman Calloway Dvorak Engel Fontaine Goldberg"
).split()
CITIES = (
    "Oslo Lisbon Vienna Prague Dublin Madrid Berlin Rome Athens Warsaw Geneva Helsinki Naples Hamburg Porto Lyon "
    "Krakow Bergen Valencia Antwerp Zurich Bilbao Turin Leipzig Toulouse Seville Munich Bristol Tallinn Gdansk "
    "Salzburg Rotterdam Marseille Bologna Cardiff Dresden Sofia Zagreb Bucharest Copenhagen Stockholm Glasgow Malaga "
    "Bordeaux Budapest Florence Stuttgart Uppsala Granada Nantes"
).split()

SHIFTED_FIRST = (
    "Aiko Bongani Chidi Deepak Esperanza Farrukh Gulnara Hyejin Ikaika Jacinta Kwame Leilani Mbali Nguyet Oluchi "
    "Priya Qasim Rangi Sunniva Tatsuo Ulugbek Vikram Wairimu Xiomara Yevgenia"
).split()
SHIFTED_LAST = (
    "Abernathy Bhattacharya Castellanos Dlamini Eriksdottir Fitzgerald Gunawardena Hashimoto Ilunga Jayawardene "
    "Kovalenko Lindqvist McAllister Nakamura O'Sullivan Papadakis Quispe Ramanujan Szymanski Tshabalala"
).split()
SHIFTED_CITIES = (
    "Ouagadougou Thiruvananthapuram Reykjavik Antananarivo Guadalajara Ulaanbaatar Christchurch Montevideo Samarkand "
    "Yogyakarta Bloemfontein Chattanooga Kaohsiung Ljubljana Maracaibo Novosibirsk Saskatoon Tegucigalpa"
).split() + ["New Plymouth", "San Sebastian", "Cape Town", "Buenos Aires", "Addis Ababa"]

# {q} quantity, {c} colour, {i} item, {n} customer, {y} city, {t} total
TEMPLATES = [
    "{n} from {y} orders {q} {c} {i} for {t} euros in total.",
    "Please send {q} {c} {i} to {n} in {y}. The total is {t} euros.",
    "Hello, this is {n}. I need {q} {c} {i} delivered to {y}, and I will pay {t} euros.",
    "{n} would like {q} {c} {i} shipped to {y} at a total of {t} euros.",
    "New order for {n} in {y}: {q} {c} {i}, altogether {t} euros.",
    "{q} {c} {i} for {n}, {y}, {t} euros in all.",
    "Could you bring {q} {c} {i} to {y}? The customer is {n} and the price is {t} euros.",
    "My name is {n}, I live in {y}, and I want to buy {q} {c} {i} for {t} euros.",
    "To {y}, please: {q} {c} {i}. {n} pays {t} euros.",
    "We have received {t} euros from {n} for {q} {c} {i}, to be sent to {y}.",
    "A total of {t} euros for {q} {c} {i}. They go to {n}, who lives in {y}.",
    "Customers in {y} are waiting: {n} has asked for {q} {i} in {c} and pays {t} euros.",
]
# {x} another city, {m} another number, {d} another colour: none of them belongs in the answer
SHIFTED_TEMPLATES = [
    "For {t} euros altogether, {y} is where {n} expects {q} {i} in {c}.",
    "{i}, {q} of them, all {c}: that is what {n} asked us to drop off in {y}. Bill: {t} euros.",
    "The bill of {t} euros goes to {n}, who moved from {x} to {y} and is waiting there for {q} {c} {i}.",
    "Not {m} but {q} {i}, please, in {c} rather than {d}. It is for {n} over in {y}, who has paid {t} euros.",
    "{y} again! {n} spends {t} euros with us this time; the parcel holds {q} {i}, every one of them {c}.",
    "We no longer deliver to {x}, so {n} will collect {q} {c} {i} in {y} and leave {t} euros at the desk.",
    "In {y}, at house number {m}, lives {n}. Take along {q} {c} {i}. You should come back with {t} euros.",
    "{t} euros have arrived from {n}. Pack {q} {i}, {c} ones, and mark the box for {y}, not for {x}.",
    "Last year it was {m} {d} {i}; this year {n} of {y} takes {q} {c} ones instead and owes {t} euros.",
    "What {n} wants: {i}. What colour: {c}. How many: {q}. Where to: {y}. What we charge: {t} euros.",
]


def in_words(number: int) -> str:
    """Spell 0 to 69 in English, as in "forty-two"."""
    if number <= 20:
        return ONES[number]
    tens, ones = number // 10 * 10, number % 10
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def spell(number: int, rng: random.Random) -> str:
    """The training splits spell a number in digits or, up to twenty, in one word."""
    return in_words(number) if number <= 20 and rng.random() < 0.5 else str(number)


def spell_shifted(number: int, rng: random.Random) -> str:
    """The shifted split also knows pairs, dozens and hyphens."""
    special = {2: ["a pair of", "a couple of"], 6: ["half a dozen"], 12: ["a dozen"], 24: ["two dozen"]}
    return rng.choice([*special.get(number, []), in_words(number), str(number)])


def sample(rng: random.Random, shifted: bool) -> dict:
    """One sentence and its order. The item is singular in the answer; quantity and total are numbers."""
    firsts, lasts, cities = (SHIFTED_FIRST, SHIFTED_LAST, SHIFTED_CITIES) if shifted else (FIRST, LAST, CITIES)
    item, plural = rng.choice(ITEMS)
    order = {
        "customer": f"{rng.choice(firsts)} {rng.choice(lasts)}",
        "item": item,
        "colour": rng.choice(COLOURS),
        "quantity": rng.choice([2, 6, 12, 24, *range(2, 49)]) if shifted else rng.randint(2, 40),
        "city": rng.choice(cities),
        "total": rng.randint(10, 999),
    }
    prompt = rng.choice(SHIFTED_TEMPLATES if shifted else TEMPLATES).format(
        q=(spell_shifted if shifted else spell)(order["quantity"], rng),
        c=order["colour"], i=plural, n=order["customer"], y=order["city"], t=order["total"],
        x=rng.choice([city for city in cities if city != order["city"]]),
        m=rng.choice([number for number in range(2, 49) if number != order["quantity"]]),
        d=rng.choice([colour for colour in COLOURS if colour != order["colour"]]),
    )  # fmt: skip
    return {
        "system": SYSTEM,
        "prompt": prompt[0].upper() + prompt[1:],
        "response": json.dumps(order, separators=(",", ":")),
    }


def main() -> None:
    rng, seen = random.Random(SEED), set()
    for split, count in COUNTS.items():
        rows = []
        while len(rows) < count:
            row = sample(rng, shifted=split == "shifted")
            if row["prompt"] not in seen:  # no sentence stands twice, in one split or in two
                seen.add(row["prompt"])
                rows.append(row)
        path = pathlib.Path(__file__).with_name(f"{split}.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
