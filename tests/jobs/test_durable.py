"""Files that are whole or not there, and a lock that only one process has, whenever another lets go of it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtllm_fast.jobs import durable
from mtllm_fast.jobs.durable import FolderLock, replace_folder, replacing, scratch, write_json, write_text

TAKE = """
import sys
from pathlib import Path
from mtllm_fast.jobs.durable import FolderLock
print(FolderLock(Path(sys.argv[1])).take())
"""


def taken_by_another(folder: Path) -> bool:
    """Whether another process, which ends at once, gets the lock."""
    out = subprocess.run([sys.executable, "-c", TAKE, folder], capture_output=True, text=True, check=True).stdout
    return out.strip() == "True"


@pytest.fixture
def lock(tmp_path: Path):
    lock = FolderLock(tmp_path)
    yield lock
    lock.release()


def held_by_another_handle(path: Path) -> int:
    """An open file that has the lock, as another process would have it."""
    handle = durable.opened(path)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


@pytest.mark.parametrize("when", ["before the lock", "after the lock"])
def test_a_lock_file_that_its_holder_removes_meanwhile_is_not_taken(lock, when, tmp_path, monkeypatch) -> None:
    """Its holder lets go after this process has opened the file: the lock of that file keeps nobody out."""
    other = held_by_another_handle(lock.path)
    original, left = durable.lock, [other]

    def let_go() -> None:
        if left:
            lock.path.unlink()
            os.close(left.pop())

    def taking(handle: int, *, wait: bool) -> bool:
        if when == "before the lock":
            let_go()
        free = original(handle, wait=wait)
        let_go()
        return free

    monkeypatch.setattr(durable, "lock", taking)
    assert lock.take() and not left
    assert lock.path.exists()
    assert not taken_by_another(tmp_path)
    lock.release()
    assert not lock.path.exists() and taken_by_another(tmp_path)


def test_the_lock_of_another_process_in_a_new_folder_of_the_same_name_stays(tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder)
    assert lock.take()
    shutil.rmtree(folder)
    folder.mkdir()
    other = held_by_another_handle(lock.path)
    lock.release()
    assert lock.path.exists() and not lock.take()
    os.close(other)
    assert lock.take()  # control
    lock.release()


def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path) -> None:
    path = tmp_path / "scores.json"
    write_json(path, {"at": Path("x")})

    def interrupted() -> None:
        with replacing(path) as temporary:
            assert temporary.parent == tmp_path and temporary.suffix == ".json" and temporary.name.startswith(".")
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == '{\n  "at": "x"\n}\n'
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    umask = os.umask(0)
    os.umask(umask)
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_bytes_are_on_the_disk_before_their_name_is(tmp_path, monkeypatch) -> None:
    done: list[str] = []

    def noted(name: str):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments: (done.append(name), original(*arguments))[1])

    for name in ("fsync", "replace"):
        noted(name)
    write_text(tmp_path / "a", "text")
    assert done == ["fsync", "replace", "fsync"]


def test_a_finished_folder_takes_the_place_of_another(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    (tmp_path / ".model.old").mkdir()  # a kill left it
    with scratch(tmp_path / ".making") as made:
        (made / "new").touch()
        replace_folder(made, tmp_path / "model")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["model", "model/new"]
    with pytest.raises(OSError), scratch(tmp_path / ".making"):
        raise OSError
    assert not (tmp_path / ".making").exists()
