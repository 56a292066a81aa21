# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # How much to experts, how much to memory?
#
# Reads the tables that `python -m engram.sweep collect` wrote. Nothing is trained here; the same figures and words
# come from `python -m engram.sweep report configs/sweep/study.yaml`.

# %% tags=["parameters"]
sweep_file = "configs/sweep/study.yaml"
# Figures are written here as PNG, PDF, SVG and CSV.
figures = "runs/notebooks/allocation"

# %%
from pathlib import Path

from IPython.display import Image, Markdown, display
from rich.console import Console

from engram.sweep.report import figures_of
from engram.sweep.spec import load_sweep
from engram.sweep.study import fits, print_fits
from engram.sweep.tables import read_table

sweep = load_sweep(sweep_file)
study = fits(sweep, read_table(sweep.out / "runs.parquet"))

# %% [markdown]
# ## What was found
#
# Losses are in nats per token. Every interval covers the choice of seed, and nothing else.

# %%
print_fits(study, Console(width=110))


# %%
def show(part: str) -> None:
    for figure, caption in figures_of(study.views[part], Path(figures)):
        display(Image(Path(figures) / f"{figure.name}.png"), Markdown(caption))


# %% [markdown]
# ## Loss against the experts' share, one curve for each budget

# %%
show("allocation")

# %% [markdown]
# ## The other parts that have finished runs

# %%
for part, view in study.views.items():
    if part != "allocation" and view.points.finished:
        show(part)
