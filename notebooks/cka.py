# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Which layer of the baseline is each layer like?
#
# Similarity of layers (CKA, unbiased) at the last tokens of named entities, and the paper's soft alignment with the
# null that top-k alignment has at the edges. The same as `python -m eval cka`.

# %% tags=["parameters"]
# Runs or checkpoints of one recipe that differ in their seeds, and of the recipe to compare with.
checkpoints = ["runs/tiny_engram"]
baselines = ["runs/tiny_moe"]
# Tables, figures and the page go here.
figures = "runs/notebooks/cka"
tokens = 20_000
# The last token of each named entity, or "all" tokens.
positions = "entities"

# %%
from pathlib import Path

import pandas
from IPython.display import Image, display

from eval.__main__ import main

arguments = ["--checkpoint", *checkpoints, "--baseline", *baselines, "--out", figures, "--tokens", str(tokens)]
assert main(["cka", *arguments, "--positions", positions]) == 0

# %%
for path in sorted(Path(figures).glob("*.png")):
    display(Image(path))

# %% [markdown]
# ## Alignment, less its null

# %%
pandas.read_csv(Path(figures) / "alignment.csv")
