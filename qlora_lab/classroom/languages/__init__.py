"""The course in a second language: its notebooks are built from the same sources, and CI says which texts are stale.

`notebooks/source/zh-TW/` holds the edition in Traditional Chinese: for each lesson a file of translated prose
(`05_double_quantization.md`) and one of figures' labels and checks' messages (`05_double_quantization.labels.json`),
and for all of them `edition.json` (which lessons there are), `terms.json` and `common.labels.json`.
docs/translating.md says how one works with them.

texts.py      at run time: the language of a kernel, and `translate`
figures.py    labels of figures in that language, and a font that has its signs
entries.py    which texts of a lesson are translated: prose, hints, alt texts, titles, comments; and their places
prose.py      the translator's file, read and written; stale texts and the entries that belong to them
labels.py     the templates of labels and messages, found in the code; the JSON file of their translations
rules.py      what a translation must keep: numbers, values, code, links, structure; and its terms
page.py       README in that language, and what is out of step there
site.py       the website in that language: where its pages lie, its navigation, its search
edition.py    the command line's part: extract, build, check
"""
