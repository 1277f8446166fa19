"""What one lesson alone uses, a folder each: n04 belongs to notebooks/source/04_nf4.py, dive_a to dive_a_....py.

    n04/checks.py      the checks of its exercises, which qlora_lab/classroom/checks.py finds there
    n04/figures.py     what it alone draws; what several lessons draw is in qlora_lab/classroom/plots.py
    dive_i/suspects.py code with bugs, for its exercises to find
    dive_g/held.py     what is run in several processes: what each of them holds
    n08/samples.py     a sample of which the end is not learned
    n12/machinery.py   what its folded cells and one-line helpers do, as in several lessons
    dive_a/pasts.py    formats that weights may have been in
    n09/limited.py     a script in a process that is short of memory

Right and wrong answers to the exercises are in tests/classroom/lessons/n04/answers.py.
"""
