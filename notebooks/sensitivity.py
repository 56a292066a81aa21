# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # What is lost without the memory?
#
# The memory is switched off, or given other rows, while everything else stays: how far the loss rises, and by how often
# training had seen the n-gram. The same as `python -m eval sensitivity`. It measures how much the model depends on its
# memory, not what the memory added: the backbone was trained with it.

# %% tags=["parameters"]
# Runs or checkpoints of one recipe that differ in their seeds.
checkpoints = ["runs/tiny_engram"]
# Tables, figures and the page go here.
figures = "runs/notebooks/sensitivity"
tokens = 20_000

# %%
from pathlib import Path

import pandas
from IPython.display import Image, display

from eval.__main__ import main

arguments = ["--checkpoint", *checkpoints, "--out", figures, "--tokens", str(tokens)]
assert main(["sensitivity", *arguments]) == 0

# %%
for path in sorted(Path(figures).glob("*.png")):
    display(Image(path))

# %%
for path in sorted(Path(figures).glob("*.csv")):
    display(path.name, pandas.read_csv(path).head(12))
