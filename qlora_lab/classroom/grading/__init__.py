"""Grading what learners hand in: one notebook under limits, many side by side, a class in tables.

reports.py    what comes out: a grade an exercise, a report a hand-in
inside.py     in the learner's kernel: ask a check
kernel.py     a kernel under limits of time and memory, and the end of everything that it started
hand_in.py    one hand-in: which lesson it is, its cells run, its answers judged
worker.py     one hand-in in a process of its own, as `runs.py` starts it
containers.py  one hand-in in a container, for strangers' code; contained.py is what runs inside
runs.py       many hand-ins side by side, results kept as they come
classes.py    whose hand-ins: folders or a roster
tables.py     a class as numbers: matrix, statistics, files for Moodle and Canvas
progress.py   what students have exported of their progress, merged
webpage.py    the same as a page, with comments for each student
"""
