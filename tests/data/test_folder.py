import threading
import time
from pathlib import Path

import pytest

from engram.data.errors import DataError
from engram.data.folder import alone, check_replaceable, replace_folder
from engram.data.manifest import NAME
from engram.data.progress import Progress


def test_one_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with alone(tmp_path / "deep" / "folder", Progress()):
                inside += 1
                most = max(most, inside)
                time.sleep(0.005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list((tmp_path / "deep").iterdir()) == []


def test_lock_is_released_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), alone(tmp_path / "folder", Progress()):
        raise KeyboardInterrupt
    with alone(tmp_path / "folder", Progress()):
        pass
    assert list(tmp_path.iterdir()) == []


def test_replace(tmp_path: Path) -> None:
    folder, finished = tmp_path / "folder", tmp_path / "finished"
    for name in ("one", "two"):
        finished.mkdir()
        (finished / name).write_text(name)
        replace_folder(folder, finished)
        assert [path.name for path in folder.iterdir()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "none")
    folder = tmp_path / "folder"
    folder.mkdir()
    check_replaceable(folder)
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"folder: holds files but no manifest\.json, .* will not be replaced"):
        check_replaceable(folder)
    (folder / NAME).write_text("")
    check_replaceable(folder)
    with pytest.raises(DataError, match=r"data\.path is a file"):
        check_replaceable(folder / "thesis.tex")
