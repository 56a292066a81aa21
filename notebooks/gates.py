# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # When does the memory open?
#
# Every layer and stream over the first validation documents, ordered by a score that was fixed beforehand. The heat
# maps are in `gates.html`; the same as `python -m eval gates --documents`.

# %% tags=["parameters"]
# Runs or checkpoints of one recipe that differ in their seeds.
checkpoints = ["runs/tiny_engram"]
# Tables, figures and the page go here.
figures = "runs/notebooks/gates"
tokens = 20_000

# %%
from pathlib import Path

import pandas
from IPython.display import Image, display

from eval.__main__ import main

arguments = ["--checkpoint", checkpoints[0], "--documents", str(tokens // 256), "--out", figures]
assert main(["gates", *arguments]) == 0

# %%
for path in sorted(Path(figures).glob("*.png")):
    display(Image(path))

# %% [markdown]
# ## The long table: one row for each token, layer and stream

# %%
pandas.read_parquet(Path(figures) / "gates.parquet").head(20)
