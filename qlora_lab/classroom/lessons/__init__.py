"""What one lesson alone uses, a folder each: n03 belongs to notebooks/source/03_nf4.py.

    n03/checks.py      the checks of its exercises, which qlora_lab/classroom/checks.py finds there
    n03/figures.py     what it alone draws; what several lessons draw is in qlora_lab/classroom/plots.py
    n03/suspects.py    code with bugs, for its exercises to find
    n14/held.py        what is run in several processes: what each of them holds
    n15/samples.py     a sample of which the end is not learned
    n16/machinery.py   what its folded cells and one-line helpers do; n19/machinery.py too
    n17/pasts.py       formats that weights may have been in
    n19/limited.py     a script in a process that is short of memory

Right and wrong answers to the exercises are in tests/classroom/lessons/n03/answers.py.
"""
