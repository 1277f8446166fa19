"""What a new lesson, exercise or data set begins with: small, and whole, so that it can be run before it is changed.

The names in braces are filled in by `scaffold.py`.
"""

LESSON = """\
# %% [markdown]
# # {number} · {Title}
#
# Say in three sentences what is asked, why it matters, and what a learner can do in the end.
#
# | you need | |
# |---|---|
# | time | 10 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not needed |

# %% machinery "Imports"
import ipywidgets

from qlora_lab.classroom.checks import progress
from qlora_lab.classroom.lessons.{room}.figures import plot_megabytes
from qlora_lab.classroom.plots import new_axes
from qlora_lab.classroom.widgets import explore

# %%
weights = 1_000_000
for bits in (32, 16, 4):
    print(f"{{weights:,}} weights of {{bits}} bits: {{weights * bits / 8 / 1e6:.1f}} MB")

# %% claims
assert weights * 4 / 8 == 500_000

# %% [markdown]
# A million weights of {{{{4}}}} bits are {{{{weights * 4 / 8 / 1e6:.1f}}}} MB. Such numbers are filled in when the
# notebook is run.

# %% alt="A straight line: megabytes over bits per weight. A dot is at {{{{weights * 4 / 8 / 1e6:.1f}}}} MB."
def draw(bits):
    return plot_megabytes(new_axes(height=2.6), weights, bits)


explore(draw, bits=ipywidgets.IntSlider(value=4, min=1, max=32, description="bits"))

# %% [markdown]
# ## Recap
#
# - Say in one line each what was found.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()
"""

FIGURES = '''\
"""Figures of {stem}."""

from matplotlib.axes import Axes


def plot_megabytes(ax: Axes, weights: int, bits: int) -> Axes:
    """Megabytes over bits per weight, with a dot at `bits`."""
    ax.plot([1, 32], [weights * b / 8 / 1e6 for b in (1, 32)])
    ax.plot([bits], [weights * bits / 8 / 1e6], "o")
    ax.set(xlabel="bits per weight", ylabel="MB", xlim=(0, 33), ylim=(0, weights * 33 / 8 / 1e6))
    return ax
'''

CHECKS = '"""Exercises of {stem}."""\n'

ANSWERS = '''\
"""Answers to the exercises of {stem}: right ones, and likely mistakes."""

RIGHT = []

WRONG = []
'''

EXERCISE = """\
# %% [markdown]
# **Exercise {id} {dots} (3 minutes).** {Title}: write a function from a number of weights, and the bits of each, to
# bytes.


# %%
def {name}(weights, bits):
    ### BEGIN SOLUTION (about 1 line)
    return weights * bits / 8
    ### END SOLUTION


# %%
check_{name}({name})

# %% [markdown]
# <details><summary>Hint</summary>Eight bits make a byte.</details>

"""

CHECK = """

@exercise("{id}", "{title}", item="{item}", points={points}, todo="complete `{name}`")
def check_{name}({name}) -> Verdict:
    for weights, bits in ((1000, 4), (64, 16)):  # more than once: a constant is no answer
        mistakes = [(weights * bits, "These are bits: eight make a byte."), (weights, "Are the `bits` used?")]
        expect_number(
            f"{name}({{weights}}, {{bits}})", call({name}, weights, bits), weights * bits / 8, mistakes
        )
    return right("Bytes, as a memory has them.")
"""

RIGHT_ANSWER = "    (check_{name}, (lambda weights, bits: weights * (bits / 8),)),\n"
WRONG_ANSWERS = """\
    (check_{name}, lambda weights, bits: weights * bits, "eight make a byte"),
    (check_{name}, lambda weights, bits: weights, "Are the `bits` used?"),
"""

SAMPLES = """\
{"messages": [{"role": "user", "content": "What is four times seven?"}, {"role": "assistant", "content": "28"}]}
{"messages": [{"role": "user", "content": "What is six times eight?"}, {"role": "assistant", "content": "48"}]}
"""
