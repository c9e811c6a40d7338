"""The folder in which remote files are kept: its size, and what is written there."""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kept_files import (
    MIB,
    URL,
    a_bucket,  # noqa: F401 - a fixture
    caching,  # noqa: F401 - a fixture
    content,
    fill,
    kept,
    locate,
    read_all,
    settled,
)
from remote_bucket import Bucket, MemorySource

from fastst_patch.config import Config
from fastst_patch.sources import partial, store
from fastst_patch.sources.cache import CachedSource, open_kept
from fastst_patch.sources.store import Store

# ---- room


def urls(bucket: Bucket, count: int, nbytes: int = MIB) -> list[str]:
    found = [f"memory://bucket/{i}.safetensors" for i in range(count)]
    bucket.files.update({url: content(nbytes) for url in found})
    return found


def age(path: str, seconds: float) -> None:
    then = time.time() - seconds
    for suffix in (".safetensors", ".json"):
        os.utime(os.path.splitext(path)[0] + suffix, (then, then))


def test_what_was_used_last_stays(bucket, config) -> None:
    limited = Config(remote_cache=config.remote_cache, remote_cache_bytes=3 * MIB)
    a, b, c, d = urls(bucket, 4)
    paths = [fill(limited, url) for url in (a, b, c)]
    for path, seconds in zip(paths, (3000, 5000, 4000), strict=True):
        age(path, seconds)
    assert locate(a, limited) == paths[0]  # uses it
    fill(limited, d)
    assert [os.path.exists(path) for path in paths] == [True, False, True]


def test_what_was_just_used_is_not_pushed_out(bucket, config, caplog) -> None:
    limited = Config(remote_cache=config.remote_cache, remote_cache_bytes=2 * MIB)
    a, b, c = urls(bucket, 3)
    paths = [fill(limited, url) for url in (a, b)]
    source = locate(c, limited)
    assert isinstance(source, MemorySource)
    assert "remote_cache_bytes=2097152" in caplog.text
    assert all(map(os.path.exists, paths))


def test_a_file_larger_than_the_limit_pushes_nothing_out(bucket, config) -> None:
    limited = Config(remote_cache=config.remote_cache, remote_cache_bytes=2 * MIB)
    (a,) = urls(bucket, 1)
    path = fill(limited, a)
    age(path, 5000)
    assert isinstance(locate(URL, limited), MemorySource)
    assert os.path.exists(path)


def test_files_of_others_are_neither_counted_nor_removed(bucket, config) -> None:
    folder = Path(config.remote_cache)
    folder.mkdir(parents=True)
    names = ("model.safetensors", "config.json", "a.part", f"{'0' * 24}.safetensors")
    others = [folder / name for name in names]
    for path in others:
        path.write_bytes(bytes(MIB))
        os.utime(path, (1, 1))
    limited = Config(remote_cache=config.remote_cache, remote_cache_bytes=2 * MIB)
    a, b, c = urls(bucket, 3)
    for path in [fill(limited, url) for url in (a, b)]:
        age(path, 3000)
    fill(limited, c)
    assert all(path.read_bytes() == bytes(MIB) for path in others)
    assert len(list(folder.glob("*-*.safetensors"))) == 2


def test_what_is_being_filled_counts_whole_and_stays(bucket, config, monkeypatch) -> None:
    monkeypatch.setattr(store, "FRESH", -10)
    limited = Config(remote_cache=config.remote_cache, remote_cache_bytes=6 * MIB)
    a, b = urls(bucket, 2, 2 * MIB)
    first = locate(URL, limited)
    assert isinstance(first, CachedSource)
    assert isinstance(locate(a, limited), MemorySource)
    assert read_all(first) == content()
    first.close()
    settled()
    assert isinstance(locate(b, limited), CachedSource)  # the complete one made room


def test_what_a_killed_process_left_makes_room(bucket, config, monkeypatch) -> None:
    monkeypatch.setattr(store, "FRESH", -10)
    limited = Config(remote_cache=config.remote_cache, remote_cache_bytes=6 * MIB)
    (a,) = urls(bucket, 1, 2 * MIB)
    source = locate(URL, limited)
    source.close()
    assert isinstance(locate(a, limited), CachedSource)
    assert len(list(Path(limited.remote_cache).glob("*.part"))) == 1


def test_without_a_limit_a_twentieth_of_the_disk_stays_free(bucket, config, monkeypatch) -> None:
    disk = os.statvfs("/tmp")
    little = os.statvfs_result((4096, 4096, 1000, 60, 60, 1, 1, 1, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: little)
    assert disk.f_blocks > 1000
    assert isinstance(locate(URL, config), MemorySource)


# ---- other processes


def test_what_has_become_complete_is_not_begun_again(bucket, config) -> None:
    """As in a process that found no complete file a moment ago, or opens its source again."""
    fill(config)
    source = open_kept(URL, config)
    assert isinstance(source, MemorySource)
    source.close()
    assert kept(config) == [".json", ".safetensors"]


def test_what_a_process_has_just_found_is_not_removed(bucket, config, monkeypatch) -> None:
    limited = Config(remote_cache=config.remote_cache, remote_cache_bytes=6 * MIB)
    path = fill(limited)
    age(path, 5000)
    (other,) = urls(bucket, 1, 2 * MIB)
    found: list[str | None] = []
    folder = Store(str(limited.remote_cache))
    finding = threading.Thread(target=lambda: found.append(folder.complete(URL)))
    room = Store._room

    def slow(self: Store, entries: list[store._Entry]) -> int:
        finding.start()
        finding.join(0.3)  # it is done, or waits until the file is removed
        return room(self, entries)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_room", slow)
        locate(other, limited).close()
    finding.join()
    assert found == [path if os.path.exists(path) else None]


def test_another_machine_does_not_see_our_locks(bucket, config, monkeypatch) -> None:
    """As on file systems whose locks hold within a machine: each gets its own bytes right."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    ours = locate(URL, config)
    assert ours.read(0, 3 * MIB) == content()[: 3 * MIB]
    monkeypatch.setattr(partial, "_BOOT", b"another boot id!")
    theirs = locate(URL, config)
    assert isinstance(theirs, CachedSource)
    assert read_all(ours) == content()
    ours.close()
    settled()
    assert read_all(theirs) == content()
    theirs.close()
    settled()
    assert Path(locate(URL, config)).read_bytes() == content()


@pytest.mark.parametrize(("mode", "of_files"), [(0o700, 0o600), (0o755, 0o644), (0o750, 0o640)])
def test_files_are_for_those_whom_the_folder_is_for(bucket, config, mode, of_files) -> None:
    os.mkdir(config.remote_cache)
    os.chmod(config.remote_cache, mode)
    mask = os.umask(0o022)
    try:
        path = fill(config)
    finally:
        os.umask(mask)
    assert os.stat(path).st_mode & 0o777 == of_files
    assert os.stat(os.path.join(config.remote_cache, ".lock")).st_mode & 0o777 == of_files


def test_a_complete_file_that_cannot_be_read(bucket, config, monkeypatch) -> None:
    fill(config)
    monkeypatch.setattr(os, "access", lambda *_: False)  # another user's
    source = locate(URL, config)
    assert not isinstance(source, str)
    assert read_all(source) == content()
    source.close()


def test_what_kills_have_left_goes_with_its_file(bucket, config, monkeypatch) -> None:
    path = fill(config)
    monkeypatch.setattr(store, "FRESH", -10)
    Path(f"{os.path.splitext(path)[0]}.json.new").write_text("{")
    limited = Config(remote_cache=config.remote_cache, remote_cache_bytes=6 * MIB)
    (other,) = urls(bucket, 1, 2 * MIB)
    locate(other, limited).close()
    assert not [one for one in os.listdir(config.remote_cache) if one.endswith(".new")]


# ---- kills

STEPS = (
    "open", "pwrite", "write", "truncate", "replace", "rename", "unlink", "fsync", "fdatasync",
    "utime",
)  # fmt: skip


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do work in a forked child that is killed before one of its steps; False: it had fewer."""
    pid = os.fork()
    if not pid:
        steps = itertools.count(1)

        def stepping(act: Any) -> Any:
            def step(*args: Any, **kwargs: Any) -> Any:
                if next(steps) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(*args, **kwargs)

            return step

        for name in STEPS:
            setattr(os, name, stepping(getattr(os, name)))
        try:
            work()
            settled()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def assert_kept_in_the_end(url: str, config: Config, want: bytes) -> None:
    found = locate(url, config)
    if not isinstance(found, str):
        assert read_all(found) == want
        found.close()
        settled()
        found = locate(url, config)
    assert Path(found).read_bytes() == want


def test_a_kill_at_any_step(bucket, tmp_path, monkeypatch) -> None:
    """While a file is kept for which another one has to go."""
    monkeypatch.setattr(store, "FRESH", -10)
    a, b = urls(bucket, 2, MIB + 1000)
    for number in itertools.count(1):
        config = Config(remote_cache=str(tmp_path / str(number)), remote_cache_bytes=2 * MIB)
        fill(config, a)

        def work(config: Config = config) -> None:
            source = locate(b, config)
            read_all(source, MIB // 2)
            source.close()

        killed = killed_at(number, work)
        assert_kept_in_the_end(b, config, bucket.files[b])
        assert_kept_in_the_end(a, config, bucket.files[a])
        if not killed:
            break
    assert number > 20


# ---- secrets


def test_a_lock_that_is_refused_leaves_nothing(bucket, config, monkeypatch) -> None:
    """A file system without locks keeps no file open, and the next load tries again."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    with monkeypatch.context() as patched:
        patched.setattr(store.fcntl, "flock", refuse)
        source = locate(URL, config)
    assert isinstance(source, MemorySource)  # streamed, and not kept
    source.close()
    assert not any(
        os.path.realpath(f"/proc/self/fd/{fd}").endswith("/.lock")
        for fd in os.listdir("/proc/self/fd")
    )
    fill(config)


def test_no_secret_is_written(bucket, config) -> None:
    bucket.files["https://host/model.safetensors"] = content()
    signed = "https://host/model.safetensors?X-Amz-Signature=hunter2"
    fill(config, signed)
    for path in Path(config.remote_cache).iterdir():
        assert "hunter2" not in path.name
        assert b"hunter2" not in path.read_bytes()
    other = "https://host/model.safetensors?X-Amz-Signature=another"
    assert isinstance(locate(other, config), str)


def test_keeping_is_logged_only_where_it_fails(bucket, config, caplog) -> None:
    with caplog.at_level(logging.INFO):
        fill(config)
    assert caplog.text == ""


def test_the_folder_is_marked_for_backups(bucket, config) -> None:
    fill(config)
    tag = Path(config.remote_cache, "CACHEDIR.TAG").read_text()
    assert tag.startswith("Signature: 8a477f597d28d172789f06886806bc55")


def test_the_store_is_usable_by_itself(bucket, config) -> None:
    found = fill(config)
    folder = Store(str(config.remote_cache))
    assert folder.complete(URL) == found
    assert folder.complete(URL, "another identity") is None
