"""Judge a model, before training and after.

judge.py      the one judge of the command line, the experiments and the lessons
answers.py    greedy answers, and whether they are exactly right
scores.py     scores for free text, for a value in it, for JSON
losses.py     the loss of texts, token by token, and perplexity
soundness.py  whether a base model is fit to be trained
intervals.py  how sure a difference is, from several seeds
reports.py    a run's report in a few lines, and two side by side
kept_answers.py  a run's answers before training and after
page.py       all of it as a page for the browser
"""
