# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # What would each depth predict?
#
# LogitLens: head and final norm applied to the state after each block, compared with the model's own prediction.
# The same as `python -m eval logit_lens`, whose page tells what to beware of. A model is compared with its own final
# distribution: a flatter one has a lower divergence everywhere.

# %% tags=["parameters"]
# Runs or checkpoints of one recipe that differ in their seeds, and of the recipe to compare with.
checkpoints = ["runs/tiny_engram"]
baselines = ["runs/tiny_moe"]
# Tables, figures and the page go here.
figures = "runs/notebooks/logit_lens"
tokens = 20_000

# %%
from pathlib import Path

import pandas
from IPython.display import Image, display

from eval.__main__ import main

arguments = ["--checkpoint", *checkpoints, "--baseline", *baselines, "--out", figures, "--tokens", str(tokens)]
assert main(["logit_lens", *arguments]) == 0

# %%
for path in sorted(Path(figures).glob("*.png")):
    display(Image(path))

# %% [markdown]
# ## Scalars: where the divergence has fallen, and the area below its curve

# %%
pandas.read_csv(Path(figures) / "scalars.csv")
