from pathlib import Path

import pytest

from engram.training.files import (
    move_into_place,
    point,
    remove_folder,
    remove_unfinished,
    sha256,
    unfinished,
    write_atomically,
)


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "done.json"
    write_atomically(path, "old é\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old é\n"
    assert [child.name for child in tmp_path.iterdir()] == ["done.json"]


def test_pointer_is_replaced_in_one_step(tmp_path: Path) -> None:
    for name in ("step_000001", "step_000002"):
        (tmp_path / name).mkdir()
        point(tmp_path / "latest", name)
        assert (tmp_path / "latest").resolve() == tmp_path / name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001", "step_000002"]


def test_folder_replaces_an_older_one_whole(tmp_path: Path) -> None:
    old, building = tmp_path / "step_000003", tmp_path / ".building"
    old.mkdir()
    (old / "only_in_old").write_text("")
    building.mkdir()
    (building / "new").write_text("")
    move_into_place(building, old)
    assert [path.name for path in old.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    half_a_folder, half_a_file, dangling = (
        unfinished(tmp_path / name) for name in ("step_000001", "done.json", "latest")
    )
    half_a_folder.mkdir()
    (half_a_folder / "model.safetensors").write_text("x")
    half_a_file.write_text("{")
    dangling.symlink_to("nowhere")
    (tmp_path / "step_000002").mkdir()
    (tmp_path / ".gitignore").write_text("*")
    assert remove_unfinished(tmp_path) == sorted(path.name for path in (half_a_folder, half_a_file, dangling))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", "step_000002"]


def test_a_half_removed_folder_is_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "step_000001"
    folder.mkdir()

    def interrupted(path: Path, **_: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert not folder.exists()
    assert len(remove_unfinished(tmp_path)) == 1


def test_sha256_of_known_bytes(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
