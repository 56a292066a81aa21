"""Settings: precedence, derived numbers, and one clear line for each mistake."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engram.config import Config, ConfigError, ModelConfig, UserError, load_config, parse_config, save_config
from engram.model.accounting import count_parameters

ROOT = Path(__file__).parents[1]

ATTENTION = {"num_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6}
MEMORY = {"layer_ids": [1], "num_heads": 2, "head_dim": 3, "rows_per_head": 50}
MOE = {"num_experts": 4, "top_k": 2, "expert_dim": 8}
TREE: dict[str, Any] = {
    "model": {"num_layers": 3, "hidden_size": 16, "vocab_size": 40, "attention": ATTENTION, "memory": MEMORY},
    "data": {"path": "data/small", "sequence_length": 8},
    "train": {"steps": 5, "batch_size": 6},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def complaint(file: Path, *overrides: str) -> str:
    """The message of the ConfigError, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value).replace(f"{file}: ", "")


# ---------------------------------------------------------------------------------------------------------- precedence


def test_defaults_give_way_to_base_file_and_override(tmp_path: Path) -> None:
    base, file = tmp_path / "base.yaml", tmp_path / "deep" / "run.yaml"
    file.parent.mkdir()
    base.write_text(yaml.safe_dump({**TREE, "optim": {"lr": 0.1, "weight_decay": 0.2, "eps": 0.3}}))
    file.write_text("base: ../base.yaml\noptim: {weight_decay: 0.5, eps: 0.6}\n")
    optim = load_config(file, ["optim.eps=0.7"]).optim
    assert (optim.lr, optim.weight_decay, optim.eps, optim.clip_norm) == (0.1, 0.5, 0.7, 1.0)


def test_a_later_override_wins_and_may_open_sections(file: Path) -> None:
    config = load_config(file, ["train.steps=7", "optim.table.kind=sinkhorn", "train.steps=9"])
    assert (config.train.steps, config.optim.table.kind) == (9, "sinkhorn")


def test_a_base_has_no_base(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    message = complaint(tmp_path / "a.yaml")
    assert message == f"{tmp_path / 'b.yaml'}: is a base and names a base itself (c.yaml): only one level is allowed"


def test_null_switches_a_section_off_also_over_a_base(tmp_path: Path, file: Path) -> None:
    above = tmp_path / "above.yaml"
    above.write_text("base: run.yaml\nmodel: {memory: null}\n")
    assert load_config(above).model.memory is None
    assert load_config(file, ["model.memory=null"]).model.memory is None
    assert load_config(file, ["model.memory="]).model.memory is None
    assert load_config(file, ["model.hyper_connection={}"]).model.hc_mult == 4
    assert load_config(file).model.hc_mult == 1
    assert load_config(file, ["optim.muon=null"]).optim.muon is None


def test_conv_is_a_switch_and_a_section(file: Path) -> None:
    def conv(value: str) -> Any:
        memory = load_config(file, [f"model.memory.conv={value}"]).model.memory
        assert memory
        return memory.conv and memory.conv.kernel_size

    assert [conv(value) for value in ("true", "false", "null", "{kernel_size: 3}")] == [4, None, None, 3]


def test_numbers_as_people_write_them(file: Path) -> None:
    """YAML 1.1 reads 3e-4, without a point, as text."""
    for text in ("3e-4", "3.0e-4", "0.0003", "'3e-4'"):
        assert load_config(file, [f"optim.lr={text}"]).optim.lr == 0.0003
    assert load_config(file, ["data.shard_tokens=1_000_000"]).data.shard_tokens == 1_000_000


def test_one_number_of_rows_serves_all_orders(file: Path) -> None:
    memory = load_config(file, ["model.memory.max_ngram_size=4"]).model.memory
    assert memory and memory.rows_per_head == (50, 50, 50)
    assert ModelConfig(**TREE["model"]).memory == load_config(file).model.memory


# -------------------------------------------------------------------------------------------------------------- values


def test_derived_numbers(file: Path) -> None:
    config = load_config(file, ["train.micro_batch_size=2", f"model.moe={MOE}", "model.memory.max_ngram_size=4"])
    model, memory, moe = config.model, config.model.memory, config.model.moe
    assert memory and moe
    assert (list(memory.orders), memory.d_mem) == ([2, 3, 4], 3 * 2 * 3)
    assert model.attention.qk_head_dim == 8
    assert config.tokens_per_step == 48
    assert [model.is_moe_layer(layer) for layer in range(3)] == [False, True, True]
    # One shared expert; the dense layer is as wide as that and the two chosen experts together.
    assert (moe.shared_width, model.dense_width) == (8, 24)
    assert moe.replace(shared_dim=5).shared_width == 5
    assert moe.replace(num_shared_experts=0).shared_width == 0
    # 8/3 x 16 = 42.7, rounded up to a multiple of 64.
    assert model.replace(moe=None).dense_width == 64
    assert model.replace(ffn_dim=9).dense_width == 9


def test_settings_are_frozen_and_copies_are_checked(file: Path) -> None:
    config = load_config(file)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 6
    assert config.train.replace(steps=6).steps == 6
    assert config.train.steps == 5
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        config.train.replace(steps=0)
    with pytest.raises(ValidationError, match="not permitted"):
        config.train.replace(stpes=1)


def test_a_saved_config_is_complete_and_loads_as_itself(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["optim.lr=3e-4", "model.hyper_connection={}", f"model.moe={MOE}"])
    saved = tmp_path / "saved.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
    # A default that changes in a later version must not change this run.
    assert yaml.safe_load(saved.read_text())["model"]["memory"]["conv"]["kernel_size"] == 4
    assert yaml.safe_load(saved.read_text())["optim"]["table"]["eps"] == 1e-10


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for path in (ROOT / "configs").rglob("*.yaml")
        # Sweeps and evaluations have settings of their own.
        if not {"sweep", "eval"} & set(path.parts)
    ),
    ids=lambda path: path.stem,
)
def test_shipped_configs_load_count_and_explain_themselves(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert count_parameters(config.model).total > 0
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    for topic in ("command", "cost", "expected"):
        assert topic in header.lower()
    assert f"configs/{path.relative_to(ROOT / 'configs')}" in header
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # Keys that do not exist, at every depth: path, value, nearest name.
        ("sed=3", "sed: unknown key (value 3); did you mean 'seed'?"),
        ("model.memory.head_dims=3", "model.memory.head_dims: unknown key (value 3); did you mean 'head_dim'?"),
        ("model.memory.conv.kernel=3", "model.memory.conv.kernel: unknown key (value 3); did you mean 'kernel_size'?"),
        ("optim.table.kinds=row", "optim.table.kinds: unknown key (value 'row'); did you mean 'kind'?"),
        (
            "data.sources=[{name: sotu, txt_key: body}]",
            "data.sources.0.txt_key: unknown key (value 'body'); did you mean 'text_key'?",
        ),
        ("train.2=3", "train.2: unknown key (value 3); the keys here are steps, init_from, batch_size, "),
        ("quantize=3", "quantize: unknown key (value 3); the keys here are model, data, train, optim, eval, "),
        # Nothing where something is wanted.
        ("run_dir=", "run_dir: is empty, but must be text"),
        ("run_dir=''", "run_dir: is '', but must be text of 1 or more characters"),
        ("data.sources=[{path: ''}]", "data.sources.0.path: is '', but must be text of 1 or more characters"),
        ("train=", "train: is empty, but must be a section of settings"),
        ("data.sources=[]", "data.sources: is [], but must be a list of 1 or more entries"),
        ("optim.betas=[0.9]", "optim.betas.1: is required and missing: the list has too few entries"),
        # Wrong types and ranges: path, value, what is expected.
        ("run_dir=3", "run_dir: is 3, but must be text: put it in quotes"),
        ("run_dir=2001-01-01", "run_dir: is 2001-01-01, but must be text: put it in quotes"),
        ("train.steps=many", "train.steps: is 'many', but must be a whole number"),
        ("train.steps=2.5", "train.steps: is 2.5, but must be a whole number"),
        ("train.steps=[1]", "train.steps: is [1], but must be a whole number"),
        ("train.steps=true", "train.steps: is true, but must be a number"),
        ("train.steps=0", "train.steps: is 0, but must be 1 or more"),
        ("train.dtype=fp8", "train.dtype: is 'fp8', but must be 'float32' or 'bfloat16'"),
        ("train.compile=maybe", "train.compile: is 'maybe', but must be true or false"),
        ("train.compile=[]", "train.compile: is [], but must be true or false"),
        ("optim.table.betas=[1,0.5]", "optim.table.betas.0: is 1, but must be below 1"),
        ("optim.lr=-1", "optim.lr: is -1, but must be above 0"),
        ("optim.lr=fast", "optim.lr: is 'fast', but must be a number"),
        ("optim.lr=.nan", "optim.lr: is nan, but must be a finite number"),
        ("optim.betas=0.9", "optim.betas: is 0.9, but must be a list"),
        ("optim.betas=[0.9, 0.9, 0.9]", "optim.betas: is [0.9, 0.9, 0.9], but must be a list of 2 or fewer entries"),
        ("model.memory=true", "model.memory: is true, but must be a section of settings"),
        ("data.sources={name: sotu}", "data.sources: is {'name': 'sotu'}, but must be a list"),
        ("data.tokenizer.character_coverage=0.5", "data.tokenizer.character_coverage: is 0.5, but must be above 0.9"),
        # Settings that may be of several kinds: one line, with all of them.
        ("distributed={table_ranks: 0}", "distributed.table_ranks: is 0, but must be 'all' or 1 or more"),
        ("distributed={table_ranks: true}", "distributed.table_ranks: is true, but must be 'all' or a number"),
        ("distributed={table_ranks: [2]}", "distributed.table_ranks: is [2], but must be 'all' or a whole number"),
        # Unknown keys that look like the words of pydantic.
        ('distributed={"list[": 3}', "distributed.list[: unknown key (value 3); the keys here are zero_stage, "),
        ("distributed=8", "distributed: is 8, but must be a section of settings"),
        ("seed=-1", "seed: is -1, but must be 0 or more"),
        ("seed=4294967296", "seed: is 4294967296, but must be below 4294967296"),
        ("model.memory.max_ngram_size=x", "model.memory.max_ngram_size: is 'x', but must be a whole number"),
        ("model.memory.max_ngram_size=9", "model.memory.max_ngram_size: is 9, but must be 8 or less"),
        # Settings that cannot be combined.
        ("model.moe.top_k=5", "model.moe: top_k is 5, but there are only 4 experts: lower top_k"),
        ("model.moe.num_groups=3", "model.moe: num_experts 4 is not a multiple of num_groups 3"),
        ("model.moe.top_k_groups=2", "model.moe: top_k_groups is 2, but num_groups is 1"),
        (
            "model.moe={num_experts: 4, top_k: 3, expert_dim: 8, num_groups: 2}",
            "model.moe: top_k 3 experts do not fit into top_k_groups 1 groups",
        ),
        ("model.moe.num_dense_layers=4", "model: moe.num_dense_layers is 4, but num_layers is 3"),
        (
            "model.memory.layer_ids=[0, 3]",
            "model: memory.layer_ids names layer 3, but the model's layers are 0 to 2",
        ),
        ("model.memory.layer_ids=[2, 1]", "model.memory: layer_ids [2, 1] must ascend without repeats"),
        ("model.memory.layer_ids=[1, 1]", "model.memory: layer_ids [1, 1] must ascend without repeats"),
        (
            "model.memory.rows_per_head=[7, 8, 9]",
            "model.memory: rows_per_head has 3 entries, but orders 2 to 3 need 2: give one number per order, or one",
        ),
        ("model.memory.pad_id=40", "model: memory.pad_id is 40, but token ids end at 39"),
        (
            "model.attention.qk_rope_head_dim=3",
            "model.attention: qk_rope_head_dim is 3, but RoPE rotates pairs: make it even",
        ),
        ("train.micro_batch_size=4", "train: batch_size 6 is not a multiple of micro_batch_size 4"),
        (
            "optim.table.sinkhorn_steps=4",
            "optim.table: sinkhorn_steps is 4, but an odd number is needed to end on rows",
        ),
        ("optim.schedule.milestones=[0.5]", "optim.schedule: milestones and factors need one entry each"),
        ("optim.schedule.milestones=[0.9, 0.8]", "optim.schedule: milestones and factors need one entry each"),
        ("data.sources=[{name: a, path: b}]", "data.sources.0: a source has either a name (a known corpus) or a path"),
        # Overrides that are none.
        ("train.steps", "override 'train.steps' is not of the form a.b=value"),
        ("=3", "override '=3' is not of the form a.b=value"),
        ("train..steps=3", "override 'train..steps=3' is not of the form a.b=value"),
        ("train.steps.x=3", "override 'train.steps.x=3': train.steps is 5, not a section"),
        # Entries of lists, whether the file writes the list or leaves it to its default.
        (
            "data.sources.0.path=x",
            "override 'data.sources.0.path=x': data.sources is a list, whose entries cannot be set one by one: give "
            "the whole list, for example 'data.sources=[{path: x}]'",
        ),
        (
            "model.memory.layer_ids.0=2",
            "override 'model.memory.layer_ids.0=2': model.memory.layer_ids is a list, whose entries cannot be set one "
            "by one: give the whole list, for example 'model.memory.layer_ids=[2]'",
        ),
        ("optim.betas=[0.9", "override 'optim.betas=[0.9': the value is not valid YAML: while parsing a flow sequence"),
        ("train.steps=2001-99-99", "override 'train.steps=2001-99-99': the value is not valid YAML: month must be in"),
    ],
)
def test_a_mistake_gives_one_line(file: Path, override: str, message: str) -> None:
    lines = complaint(file, f"model.moe={MOE}", override).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_a_missing_key_is_named(file: Path) -> None:
    tree = copy.deepcopy(TREE)
    del tree["model"]["memory"]["head_dim"], tree["data"]["path"]
    file.write_text(yaml.safe_dump(tree))
    lines = complaint(file).splitlines()
    assert lines == [
        "model.memory.head_dim: is required and missing: give a whole number",
        "data.path: is required and missing: give text",
    ]


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    lines = complaint(file, "train.steps=0", "optim.lrr=1", "model.attention.num_heads=x").splitlines()
    assert [line.split(":")[0] for line in lines] == ["model.attention.num_heads", "train.steps", "optim.lrr"]


def test_a_huge_value_is_not_repeated_in_full(file: Path) -> None:
    assert len(complaint(file, f"train.steps=[{'1, ' * 500}]")) < 250


def test_files_that_are_no_configs(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    missing = tmp_path / "none.yaml"
    assert complaint(missing) == "cannot be read: No such file or directory"
    assert complaint(tmp_path) == "cannot be read: Is a directory"
    for text, message in (
        ("train: [", f"{file}:1:9: is not valid YAML: while parsing a flow node: "),
        ("train: 2001-99-99", "is not valid YAML: month must be in 1..12"),
        ("train: {steps: 1}\ntrain: {steps: 2}", f"{file}:2:1: is not valid YAML: key 'train' stands twice"),
        ("? [a]\n: 1", f"{file}:1:3: is not valid YAML: "),
        ("!!python/object/apply:os.getcwd []", f"{file}:1:1: is not valid YAML: could not determine a constructor"),
        ("- 1", "holds [1], but must hold settings, one on a line, as `key: value`"),
        ("", "is empty, but must hold settings, one on a line, as `key: value`"),
        ("base: none.yaml", f"{missing}: cannot be read: No such file or directory"),
        (yaml.safe_dump({**TREE, 3: 4}), "3: is 3, but must be text, as all names of settings are"),
    ):
        file.write_text(text)
        assert complaint(file).startswith(message)
    file.write_bytes(b"\xff\xfe\x00")
    assert complaint(file).startswith("cannot be read: 'utf-8' codec can't decode byte 0xff")


def test_every_message_names_its_file(file: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(file, ["train.steps=0", "optim.lrr=1"])
    assert all(line.startswith(f"{file}: ") for line in str(caught.value).splitlines())


# ---------------------------------------------------------------------------------------------------------------- fuzz

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["row_adam", "plain", "eos", "bfloat16"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "layer_ids", "rows_per_head", "name"]) | LEAVES, inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(section: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a nested dictionary, sections and leaves."""
    found = []
    for key, value in section.items():
        found.append((*above, key))
        if isinstance(value, dict):
            found += paths(value, (*above, key))
    return found


TABLES = {"num_heads": 2, "head_dim": 3, "rows_per_head": 50}
FULL = parse_config(
    {**TREE, "model": {**TREE["model"], "moe": MOE, "hyper_connection": {}, "over_encoding": TABLES}}
).model_dump(mode="json")


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(st.sampled_from(paths(FULL)), VALUES), min_size=1, max_size=3))
def test_no_tree_breaks_the_parser(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    tree = copy.deepcopy(FULL)
    for path, value in changes:
        section: Any = tree
        for key in path[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[path[-1]] = value
    try:
        assert isinstance(parse_config(tree), Config)
    except ConfigError as error:
        # No kind of mistake is left to pydantic's words.
        assert str(error) and "nput should" not in str(error) and "but must be valid" not in str(error)


@given(text=st.text(max_size=40) | st.text(alphabet="[]{}:-?!&*#|>%@`\"' \n0x1e_.,ab<=", max_size=40))
@example(text="? {a: 1}\n: 2")
@example(text="a: &a [*a]")
@example(text="a: 0x_")
@example(text="a: !!int x")
@example(text="a: !!bool x")
@example(text="a: !!timestamp x")
@example(text="base: [")
@example(text='base: "a\\0b"')
@example(text="[" * 1000)
def test_no_text_breaks_the_reader(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file, sound = (tmp_path_factory.getbasetemp() / name for name in ("fuzz.yaml", "sound.yaml"))
    file.write_text(text, encoding="utf-8", errors="replace")
    sound.write_text("seed: 1")
    for path, overrides in ((file, []), (sound, [f"optim.lr={text}"]), (sound, [f"{text}=1"])):
        with pytest.raises(ConfigError):
            load_config(path, overrides)
