"""What the notebooks show, and the workshop that builds and grades them.

lessons/      one folder per lesson: its checks, figures, suspects
checks.py     all lessons' checks in one module, and progress
judging.py    how a check shows, records and raises
certificate.py  what was solved, when and with what: a page to print
plots.py      figures that several lessons draw
widgets.py    sliders, live loss, tables
cards.py      what a plain run needs of a card: memory, hours
rounded_twice.py  the base in 4 bits, rounded once and twice
samples.py    random numbers of several distributions, real weights
build.py      one source -> learner's and solved notebook: the command line, and the whole syntax
files.py      sources, notebooks, and whether a stored notebook is what its source gives
source.py     reads the source script; what claims must not do
drafts.py     from its cells to both notebooks
assignments.py  a lesson as nbgrader wants it
publish.py    the address of one's own copy, in set-up cells and README
website.py    the course as a website
students.py   the copy for a class that is graded: without solutions
values.py     the numbers in the text, filled in from a run and compared with the next
numbers.py    the numbers in the text that no run fills in, held to a list that shrinks
needs.py      which cells need which: what CI runs of the solved notebook
outputs.py    running, and what may be stored of it
notebook_json.py  a notebook's file, read
scaffold.py   a new lesson, exercise or data set; a lesson dropped
templates.py  what these begin with
languages/    the course in a second language: translations, their rules, figures' labels at run time
grading/      what learners hand in, run under limits, judged, put into tables
grade.py      its command line
course.py     the course in a folder of the learner's, opened in JupyterLab
"""
