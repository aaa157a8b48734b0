"""Files appear whole or not at all, never through a link; what is read is a plain file of a bounded size."""

from __future__ import annotations

import errno
import os
import resource
import signal
from contextlib import contextmanager

import pytest
from PIL import Image
from stores import fixed_store

from vtc.cli import main
from vtc.errors import StoreError
from vtc.eval.bench import common
from vtc.eval.store import Store
from vtc.files import PART, create, read_plain, save, write_whole
from vtc.inspect import save_picture

OLD = "what was there before " * 1000


@contextmanager
def full_disk(room: int):
    """Let no file of this process grow beyond ``room`` bytes: what is written stops in the middle, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "deep" / "report.html"
    write_whole(path, "first")
    assert path.read_text() == "first"
    write_whole(path, b"second")
    assert path.read_bytes() == b"second" and [p.name for p in path.parent.iterdir()] == ["report.html"]
    with full_disk(100), pytest.raises(OSError, match="too large"):
        write_whole(path, "x" * 10_000)
    assert path.read_bytes() == b"second" and [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "replace"])
def test_every_call_may_fail_and_the_old_file_stays(tmp_path, monkeypatch, call):
    path = tmp_path / "f"
    write_whole(path, "old")
    real = getattr(os, call)

    def failing(*args, **kwargs):
        if call == "close":
            real(*args, **kwargs)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        with pytest.raises(StoreError, match="cannot write .*f .Input/output error.: do this"):
            save(path, "new", "do this")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write_whole(tmp_path / "f", "more than three bytes")
    assert (tmp_path / "f").read_text() == "more than three bytes"


def test_a_link_is_replaced_and_never_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text(OLD)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "report.html").symlink_to(victim)
    write_whole(tmp_path / "store" / "report.html", "new")
    assert victim.read_text() == OLD and (tmp_path / "store" / "report.html").read_text() == "new"
    assert not (tmp_path / "store" / "report.html").is_symlink()
    (tmp_path / "store" / "fresh").symlink_to(victim)
    with pytest.raises(FileExistsError):
        create(tmp_path / "store" / "fresh", "new")
    assert victim.read_text() == OLD


def test_names_aside_cannot_be_guessed(tmp_path, monkeypatch):
    seen = set()
    real = os.open

    def noting(path, flags, *rest, **more):
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL and flags & os.O_NOFOLLOW
            seen.add(os.path.basename(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", noting)
    for _ in range(20):
        write_whole(tmp_path / "f", "x")
    assert len(seen) == 20 and all(PART.fullmatch(name) for name in seen)


def test_devices_pipes_and_folders_are_no_place_for_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path, word in ((tmp_path / "pipe", "not a file"), (tmp_path / "folder", "directory")):
        with pytest.raises(StoreError, match=word):
            save(path, "x", "name another")
    with pytest.raises(StoreError, match="no place for files"):
        save(type(tmp_path)("/dev/stdout"), "x", "name another")


def test_only_plain_files_of_a_bounded_size_are_read(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert read_plain(tmp_path / "f", 3) == b"abc"
    (tmp_path / "link").symlink_to(tmp_path / "f")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for name, most, code in (
        ("f", 2, errno.EFBIG),
        ("link", 9, errno.EINVAL),
        ("zero", 9, errno.EINVAL),
        ("pipe", 9, errno.EINVAL),
        (".", 9, errno.EINVAL),
        ("none", 9, errno.ENOENT),
    ):
        with pytest.raises(OSError) as caught:
            read_plain(tmp_path / name, most)
        assert caught.value.errno == code, name
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(OSError):
            read_plain(tmp_path, 9)
    assert len(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------------------------------------------ who uses it
@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["report", "STORE", "--output", "OUT/report.html"], "report.html"),
        (["table", "STORE", "-f", "md", "-o", "OUT/table.md"], "table.md"),
        (["plot", "STORE", "-k", "tokens", "-f", "svg", "-o", "OUT"], "tokens.svg"),
    ],
)
def test_a_full_disk_costs_the_new_file_and_not_the_old_one(tmp_path, capsys, arguments, file):
    """RLIMIT_FSIZE cuts what is written in place after 64 bytes, as a full disk does."""
    store = fixed_store(tmp_path / "s")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text(OLD)
    given = [a.replace("STORE", str(store.root)).replace("OUT", str(tmp_path / "out")) for a in arguments]
    with capsys.disabled(), full_disk(64), open(os.devnull, "w") as quiet, pytest.raises(SystemExit) as ended:
        import contextlib

        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            main(given)
    assert ended.value.code == 1
    assert (tmp_path / "out" / file).read_text() == OLD
    assert [p.name for p in (tmp_path / "out").iterdir()] == [file]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert not ended.value.code and (tmp_path / "out" / file).read_text() != OLD


def test_pictures_and_bench_tables_are_written_aside_too(tmp_path):
    for path, write in (
        (tmp_path / "kept.png", lambda p: save_picture(Image.new("RGB", (64, 64), "red"), p)),
        (tmp_path / "bench.csv", lambda p: common.write(p, [{"a": 1, "b": "x" * 100}])),
    ):
        path.write_text(OLD)
        with full_disk(64), pytest.raises(StoreError, match="cannot write"):
            write(path)
        assert path.read_text() == OLD
        write(path)
        assert path.read_bytes()[:5] != OLD[:5].encode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.csv", "kept.png"]


def test_links_in_a_store_overwrite_nothing(tmp_path, capsys):
    """A store from somebody else with links where vtc writes: the report, the record, the lock and the cells' folder."""
    victim = tmp_path / "victim"
    victim.write_text(OLD)
    store = fixed_store(tmp_path / "s")
    (store.root / "report.html").symlink_to(victim)
    (store.root / f".sweep.json.{os.getpid()}").symlink_to(victim)  # what the temporary was once called
    with pytest.raises(SystemExit):
        main(["report", str(store.root)])
    assert "<!doctype html>" in (store.root / "report.html").read_text() and victim.read_text() == OLD
    record = store.read_sweep()
    (store.root / "sweep.json").unlink()
    (store.root / "sweep.json").symlink_to(victim)
    with pytest.raises(StoreError, match="cannot be read .a link"):
        store.read_sweep()
    store.write_sweep(record)
    assert victim.read_text() == OLD and Store(store.root).read_sweep() == record
    (store.root / "locks").mkdir(exist_ok=True)
    (store.root / "locks" / "a.lock").symlink_to(victim)
    with pytest.raises(StoreError, match="cannot lock"):
        store.claim("a")
    assert victim.read_text() == OLD
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("locks", "cells"):
        (store.root / name).rename(store.root / f"my-{name}")
        (store.root / name).symlink_to(elsewhere)
        with pytest.raises(StoreError, match="not a folder of this store"):
            Store(store.root).claim("b")
        (store.root / name).unlink()
        (store.root / f"my-{name}").rename(store.root / name)
    assert not list(elsewhere.iterdir())
