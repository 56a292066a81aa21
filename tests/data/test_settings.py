from collections.abc import Callable
from pathlib import Path

import pytest

from engram.config import Config
from engram.data.errors import DataError
from engram.data.settings import check_settings, content_settings

ConfigMaker = Callable[..., Config]


def test_what_does_not_change_the_content_may_differ(make_config: ConfigMaker) -> None:
    first = content_settings(make_config())
    second = content_settings(make_config(sequence_length=32, prefetch=0, shuffle_seed=5, cache="other"))
    assert first == second
    check_settings(Path("p"), first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_seed": 3}, r"data\.split_seed was 0, is 3"),
        ({"validation_fraction": 0.1}, r"data\.validation_fraction was 0\.02, is 0\.1"),
        ({"shard_tokens": 2048}, r"data\.shard_tokens was 16777216, is 2048"),
        ({"vocab_size": 400}, r"model\.vocab_size was 320, is 400"),
        ({"sources": [{"name": "sotu"}, {"name": "gcide"}]}, r"data\.sources\.1\.name was None, is 'gcide'"),
        ({"sources": [{"name": "sotu", "fraction": 0.5}]}, r"data\.sources\.0\.fraction was 1\.0, is 0\.5"),
        ({"tokenizer": {"character_coverage": 1}}, r"data\.tokenizer\.character_coverage was 0\.9999, is 1"),
        ({"tokenizer": {"path": "deepseek"}}, r"data\.tokenizer\.path was None, is 'deepseek'"),
    ],
)
def test_differing_settings_are_named(make_config: ConfigMaker, change: dict, message: str) -> None:
    found, wanted = content_settings(make_config()), content_settings(make_config(**change))
    with pytest.raises(DataError, match=rf"was prepared with other settings: .*{message}.*choose another data\.path"):
        check_settings(Path("p"), found, wanted)


def test_changed_files_are_noticed_and_gone_ones_are_not(make_config: ConfigMaker, tmp_path: Path) -> None:
    text, tokenizer = tmp_path / "a.txt", tmp_path / "t.model"
    text.write_text("one")
    tokenizer.write_bytes(b"one")
    config = make_config(sources=[{"path": str(text)}], tokenizer={"path": str(tokenizer)})
    found = content_settings(config)
    text.write_text("more")
    with pytest.raises(DataError, match="names and sizes of the files"):
        check_settings(Path("p"), found, content_settings(config))
    text.unlink()
    check_settings(Path("p"), found, content_settings(config))
    tokenizer.write_bytes(b"two")
    with pytest.raises(DataError, match=r"data\.tokenizer\.path \(the file\)"):
        check_settings(Path("p"), found, content_settings(config))
    tokenizer.unlink()
    check_settings(Path("p"), found, content_settings(config))
