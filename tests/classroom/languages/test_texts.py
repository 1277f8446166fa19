"""Finished texts find their templates; a kernel's language is that of its folder; progress is one for all languages."""

import json
from pathlib import Path

import pytest

from qlora_lab.classroom.checks import (
    all_exercises,
    check_as_chat,
    check_bits_per_parameter,
    check_blame,
    check_choice,
    check_faults,
    check_mine,
    progress,
)
from qlora_lab.classroom.judging import Progress
from qlora_lab.classroom.languages import labels, texts
from qlora_lab.classroom.languages.rules import faults, faults_of_label
from qlora_lab.errors import UserError

LABELS = {
    "loss": "損失",
    "{0:.1f} GB saved by {1}": "{1} 省下 {0} GB",
    "{0} gives {1:,.4g}, expected {2:g}. {3}": "{0} 得到 {1}，應為 {2}。{3}",
    "These are bytes: bits are asked for.": "這是位元組：題目要的是位元。",
    "of {0:d}": "共 {0}",
    "{0} bits": "{0} 位元",
    "no adapter": "沒有適配器",
    "blocks": "區塊",
    "no translation yet": "",
}


@pytest.fixture
def chinese(tmp_path, monkeypatch) -> None:
    """A catalogue of a few labels, and a kernel that speaks Chinese."""
    (tmp_path / "zh-TW").mkdir()
    (tmp_path / "zh-TW" / "edition.json").write_text("{}", encoding="utf-8")
    (tmp_path / "zh-TW" / "01_a.labels.json").write_text(json.dumps(LABELS), encoding="utf-8")
    monkeypatch.setattr(texts, "SOURCES", tmp_path)
    monkeypatch.setenv("QLORA_LAB_LANGUAGE", "zh-TW")
    for cached in (texts.translated, texts.catalogue):
        cached.cache_clear()
    yield
    for cached in (texts.translated, texts.catalogue):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("english", "said"),
    [
        ("loss", "損失"),
        ("3.5 GB saved by double quantization", "double quantization 省下 3.5 GB"),
        ("some GB saved by magic", "some GB saved by magic"),  # the first field is a number
        ("bits(64, 2) gives 4,510, expected 4.5. These are bytes: bits are asked for.",
         "bits(64, 2) 得到 4,510，應為 4.5。這是位元組：題目要的是位元。"),  # a text in a text
        ("f(2) gives -1e-05, expected 4. loss", "f(2) 得到 -1e-05，應為 4。loss"),  # single words may be names
        ("of 12", "共 12"),
        ("of course", "of course"),
        ("no translation yet", "no translation yet"),
        ("nobody has translated this", "nobody has translated this"),
        ("0.25", "0.25"),
        ("5 bits", "5 位元"),
        ("4 + 0.125 bits", "4 + 0.125 位元"),
        ("lora-bf16 bits", "lora-bf16 位元"),  # a name
        ("each weight takes 4 bits", "each weight takes 4 bits"),  # the template is too short for any text
        ("no adapter: 1.512", "沒有適配器：1.512"),  # a label, and a number
        ("NF4: 5 bits", "NF4：5 位元"),
        ("7B, no adapter", "7B，沒有適配器"),
        ("no adapter   3", "沒有適配器   3"),
        ("no adapter: blocks", "沒有適配器：區塊"),
        ("no adapter: nobody has translated this", "no adapter: nobody has translated this"),
        ("some words, blocks", "some words, blocks"),
    ],
)  # fmt: skip
def test_a_finished_text_is_said_in_chinese(chinese, english, said):
    assert texts.translate(english) == said
    assert texts.translate(english, "en") == english


@pytest.mark.parametrize(
    ("folder", "asked", "found"),
    [
        ("course/notebooks", "", "en"),
        ("course/notebooks/zh-TW", "", "zh-TW"),
        ("course/notebooks/zh-TW/solutions", "", "zh-TW"),
        ("course/notebooks/solutions", "", "en"),
        ("zh-TW/course/notebooks", "", "en"),
        ("course/notebooks/zh-TW", "en", "en"),
        ("elsewhere", "zh-TW", "zh-TW"),
    ],
)
def test_the_language_is_that_of_the_folder_or_the_one_asked_for(folder, asked, found):
    assert texts.find_language(Path(folder), asked, ["zh-TW"]) == found


def test_a_language_that_the_course_is_not_in():
    with pytest.raises(UserError, match="QLORA_LAB_LANGUAGE is 'de', and the course is in en and zh-TW: set one"):
        texts.find_language(Path(), "de", ["zh-TW"])


def test_who_changes_the_language_keeps_their_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_LAB_PROGRESS", str(tmp_path / "progress.json"))
    check_bits_per_parameter(lambda block, scales: 4 + 8 / block + 32 / (block * scales))
    english = progress().summary()
    monkeypatch.setenv("QLORA_LAB_LANGUAGE", "zh-TW")
    check_bits_per_parameter(lambda block, scales: 4 + 32 / block)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "✓ 5.2 4.126953 for blocks of 64 and 256: the scales went from a half bit to an eighth."
    assert second.endswith("這是沒有雙重量化的情況：縮放因子現在占 8 位元。") and "應為 4.126953" in second
    here = progress()
    assert here.solved == {"5.2"} and english.startswith("1 of ") and here.summary().startswith("已完成 1 / ")
    assert "我會" in here._repr_html_() and "下一題: 0.1" in repr(here)
    monkeypatch.setenv("QLORA_LAB_LANGUAGE", "en")
    assert progress().summary() == english == Progress(all_exercises(), here.solved, "en").summary()


def raises(*_):
    raise ValueError("an error, of many: words")


@pytest.mark.parametrize(
    ("check", "answer", "beginning", "end"),
    [
        (check_as_chat, lambda row: {"prompt": [], "completion": []}, "以 {'rules': 'Answer", "放在 prompt 的開頭。"),
        (check_as_chat, lambda row: {"prompt": [], "completion": 1}, "以 {'rules': 'Answer", "和 \"content\"。"),
        (check_blame, {"Ana": 1}, "blame 是 {'Ana': 1} (dict)，", "應為一個 dict，內含 'Ana', 'Ben', 'Cleo'。"),
        (check_choice, {"model": 1}, "應為一個 dict，內含 'model', 'card', ", "你給的是 {'model': 1} (dict)。"),
        (check_mine, {"model": 1}, "應為一個 dict，內含 'model', 'card', ", "你給的是 {'model': 1} (dict)。"),
        (check_faults, lambda *_: [], "你漏掉了 bnb_4bit_compute_dtype（沒有設定；GPU 有 bf16）：", "預設是 float32。"),
        (check_faults, raises, "raises({", "在這一行：`raise ValueError(\"an error, of many: words\")`"),
    ],
)  # fmt: skip
def test_a_verdict_is_in_chinese_from_end_to_end(check, answer, beginning, end):
    """What the learner wrote, and the names that they are to type, stay as they are."""
    said = texts.translate(check.verdict(answer).message, "zh-TW")
    assert said.startswith(beginning) and said.endswith(end), said


# --- Templates in code ------------------------------------------------------------------------------------------------


def test_templates_are_found_where_a_learner_reads_them():
    code = '''
"""A module."""
COLOURS = {"color": "some words here", "label": "a label of it"}

def draw(ax, rows: "a type of thing", name="the default name"):
    """A docstring of it."""
    assert name, "an assertion says this"
    print(f"{name} is printed")
    ax.set(xlabel="density", ylabel=f"error of {name} ({rows:.2f} %)", yscale="log scale")
    ax.plot(rows["a key of it"], linestyle="a dashed line", label=f"{rows:.1f}")
    rows[f"{name}, a new bar"] = rows["bbox"] = f"{rows:g} to {name}".replace("a minus sign", "-")
    ax.text(0, 0, f"{rows:.0f} to {rows:g}".replace("-", "−"))
    if name == "a comparison with it":
        raise ValueError("an error that nobody translates")
    return right("Well done. " f"{name:>4}: {'yes it is' if rows else 'no it is not'}")

@exercise("1.1", "bits", item="some item here", todo="complete `draw`")
def check(came):
    raise Mistake(f"{came} has no rows")
'''
    assert labels.templates(code) == [
        "a label of it",
        "the default name",
        "density",
        "error of {0} ({1:.2f} %)",
        "{0}, a new bar",
        "{0:.0f} to {1:g}",
        "Well done. {0:>4}: {1}",
        "yes it is",
        "no it is not",
        "{0} has no rows",
        "bits",
        "complete `draw`",
    ]
    assert "density" not in labels.templates(code, sentences_only=True)


@pytest.mark.parametrize(
    ("english", "translation", "says"),
    [
        ("{0:.1f} GB of {1}", "{1} 的 {0} GB", []),
        ("{0:.1f} GB of {1}", "{0:.1f} GB", ["has the fields {0}, the English text {0}, {1}"]),
        ("10^9 bytes", "10^6 位元組", ["has the number 6, which the English text does not have", "lacks the number 9"]),
        (
            "eight bits of `x`",
            "`y` 的 8 位元",
            ["lacks the code `x`", "has the code `y`, which the English text does not"],
        ),
    ],
)
def test_what_a_label_must_keep(english, translation, says):
    found = list(faults_of_label(english, translation))
    assert len(found) == len(says) and all(told.startswith(said) for told, said in zip(found, says, strict=True)), found


@pytest.mark.parametrize(
    ("translation", "says"),
    [
        ("```python\nload(path)  # 你的資料夾\n```", []),
        ("```python\nload(folder)  # 你的資料夾\n```", ["lacks the code", "has the code"]),
    ],
)
def test_a_block_of_code_may_have_its_comments_translated(translation, says):
    found = list(faults("label", "```python\nload(path)  # your folder\n```", translation))
    assert [told[: len(said)] for told, said in zip(found, says, strict=True)] == says


def test_a_label_whose_english_has_changed_is_kept_as_outdated():
    old = {"bits per parameter": "每個參數的位元數", "level": "位準", "gone": "不見了"}
    new = labels.renewed(["bits per weight parameter", "level", "density"], old)
    assert list(new) == ["bits per weight parameter", "level", "density", "gone"]
    assert new["bits per weight parameter"] == "?? bits per parameter ?? 每個參數的位元數"
    assert (new["level"], new["density"]) == ("位準", "")


@pytest.mark.parametrize("into", texts.editions())
def test_a_label_is_translated_alike_in_all_lessons(into):
    """At run time it is not known which lesson a label is of. A lesson may keep the English."""
    found: dict[str, set[str]] = {}
    for path in sorted((texts.SOURCES / into).glob("*.labels.json")):
        for english, translation in json.loads(path.read_text(encoding="utf-8")).items():
            found.setdefault(english, set()).update({translation} - {english, ""})
    assert {english: each for english, each in found.items() if len(each) > 1} == {}
