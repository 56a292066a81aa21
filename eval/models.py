"""Several checkpoints that are asked the same: loaded together, of one tokenizer."""

from collections.abc import Mapping

from engram.config import UserError
from eval.loading import Loaded, load


def load_models(
    checkpoints: Mapping[str, str], device: str = "auto", dtype: str = "float32", threads: int | None = None
) -> dict[str, Loaded]:
    """The models by their names. Raises UserError as `load` does, and where two have different tokenizers."""
    models = {name: load(path, device, dtype, threads) for name, path in checkpoints.items()}
    (name, first), *others = models.items()
    for other, loaded in others:
        if loaded.tokenizer.digest != first.tokenizer.digest:
            raise UserError(
                f"{other} ({loaded.folder}) has another tokenizer than {name} ({first.folder}): a text is other tokens "
                "to each of them. Compare models of one tokenizer"
            )
    return models
