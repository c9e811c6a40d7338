"""Remote files that are kept: what streams past is complete on the disk, or not used at all."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

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
from places import SUPPORT
from remote_bucket import MemorySource

from fastst_patch.config import Config
from fastst_patch.sources import base, partial, standin
from fastst_patch.sources.cache import CachedSource
from fastst_patch.sources.store import Store


def test_second_load_is_of_a_local_file(bucket, config) -> None:
    source = locate(URL, config)
    assert read_all(source) == content()
    assert bucket.fetched() == source.size  # every byte once
    source.close()
    settled()
    assert kept(config) == [".json", ".safetensors"]
    found = locate(URL, config)
    assert Path(found).read_bytes() == content()
    assert os.stat(found).st_mode & 0o077 == 0
    assert os.stat(config.remote_cache).st_mode & 0o077 == 0
    assert bucket.fetched() == len(content())  # opened, to ask whether it has changed; not read
    assert len(bucket.opened) == 2
    assert all(one.closed for one in bucket.opened)


def test_properties_are_those_of_the_source(bucket, config) -> None:
    source = locate(URL, config)
    inner = bucket.opened[0]
    for name in ("scheme", "name", "size", "identity", "sequential", "stats"):
        assert getattr(source, name) == getattr(inner, name)
    with pytest.raises(ValueError):
        source.read(source.size - 1, 2)
    source.cancel()
    with pytest.raises(base.RemoteCancelledError):
        source.read(3 * MIB, 10)
    source.close()


def test_without_the_option_nothing_is_kept(bucket, tmp_path) -> None:
    assert isinstance(locate(URL, Config()), MemorySource)
    assert os.listdir(tmp_path) == []


def test_only_what_is_missing_is_fetched(bucket, config) -> None:
    first = locate(URL, config)
    want = content()
    assert bytes(first.read(2 * MIB, MIB)) == want[2 * MIB : 3 * MIB]
    first.close()
    settled()
    assert kept(config) == [".journal", ".json", ".part"]
    second = locate(URL, config)
    before = bucket.fetched()
    assert read_all(second) == want
    assert bucket.fetched() - before == len(want) - 2 * MIB  # without the head and that piece
    second.close()
    settled()
    assert Path(locate(URL, config)).read_bytes() == want


def test_small_pieces_between_missing_ones_are_fetched_with_them(bucket, config) -> None:
    source = locate(URL, config)
    source.read(2 * MIB, 1000)
    inner = bucket.opened[0]
    inner.ranges.clear()
    source.read(2 * MIB - 5000, 20_000)
    assert inner.ranges == [(2 * MIB - 5000, 20_000)]
    source.read(2 * MIB, 1000)
    assert len(inner.ranges) == 1
    source.close()


def test_threads_fill_one_file(bucket, config) -> None:
    source = locate(URL, config)
    want, step = content(), 100_000
    wrong: list[int] = []

    def run(seed: int) -> None:
        offsets = list(range(0, len(want), step))
        random.Random(seed).shuffle(offsets)
        for offset in offsets:
            got = bytes(source.read(offset, min(step, len(want) - offset)))
            if got != want[offset : offset + step]:
                wrong.append(offset)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    source.close()
    settled()
    assert Path(locate(URL, config)).read_bytes() == want


def test_it_stays_readable_when_it_is_complete(bucket, config) -> None:
    source = locate(URL, config)
    read_all(source)
    settled()
    before = bucket.fetched()
    assert read_all(source) == content()
    assert bucket.fetched() == before
    source.close()


def test_a_changed_file_is_another_file(bucket, config) -> None:
    old = fill(config)
    bucket.version += 1
    bucket.files[URL] = changed = content()[::-1]
    source = locate(URL, config)
    assert isinstance(source, CachedSource)
    assert read_all(source) == changed
    source.close()
    settled()
    new = locate(URL, config)
    assert new != old
    assert Path(new).read_bytes() == changed
    assert Path(old).read_bytes() == content()  # may still be mapped by somebody


def test_a_file_that_changes_while_it_is_kept_in_part_is_not_mixed(bucket, config) -> None:
    source = locate(URL, config)
    source.read(0, 3 * MIB)
    source.close()
    bucket.version += 1
    bucket.files[URL] = changed = content()[::-1]
    source = locate(URL, config)
    assert read_all(source) == changed
    source.close()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def stand_in(tmp_path: Path, folder: str | None = None) -> str:
    """The URL of a stand-in for the file."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    path = str(tmp_path / "stand-in.safetensors")
    source = MemorySource(URL, content(), ("etag", '"1"', len(content())))
    standin.write(path, source, {}, folder)
    return standin.url_of(path)


def test_a_stand_in_wants_the_file_that_it_was_made_for(bucket, config, tmp_path) -> None:
    fill(config)
    stands = stand_in(tmp_path)
    assert Path(locate(stands, config)).read_bytes() == content()
    bucket.version += 1
    for options in (config, Config()):
        with pytest.raises(base.RemoteChangedError, match="make the folder again"):
            locate(stands, options)
    assert all(one.closed for one in bucket.opened)


def test_a_stand_in_names_the_folder(bucket, tmp_path) -> None:
    folder = tmp_path / "named"
    source = locate(stand_in(folder / "models" / "x" / "model", str(folder)), Config())
    read_all(source)
    source.close()
    settled()
    assert any(name.endswith(".safetensors") for name in os.listdir(folder))


@pytest.mark.parametrize("how", ["revision", "option", "environment"])
def test_no_request_where_nothing_can_change(bucket, config, monkeypatch, how) -> None:
    url = URL if how == "option" else f"hf://org/repo@{'a' * 40 if how == 'revision' else 'main'}/m"
    bucket.files[url] = content()
    found = fill(config, url)
    options = config
    if how == "option":
        options = Config(remote_cache=config.remote_cache, remote_offline=True)
    elif how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    opened = len(bucket.opened)
    assert locate(url, options) == found
    assert len(bucket.opened) == opened


def test_a_server_that_does_not_tell_of_changes(bucket, config, caplog, monkeypatch) -> None:
    source = MemorySource(URL, content(), ("modified", None, len(content())))
    monkeypatch.setattr(base, "open_source", lambda *_, **__: source)
    assert locate(URL, config) is source
    assert "does not tell when it changes" in caplog.text


# ---- kills, crashes, full disks


CHILD = """
import os, signal, sys
sys.path.insert(0, {support!r})
from remote_bucket import Bucket
from fastst_patch.config import Config
from fastst_patch.sources import base, cache, store
bucket = Bucket({{{url!r}: open({data!r}, "rb").read()}})
base.open_source = bucket.open_source
config = Config(remote_cache={folder!r})
"""


def start(code: str, tmp_path: Path, config: Config) -> subprocess.Popen[str]:
    data = tmp_path / "data"
    data.write_bytes(content())
    begin = CHILD.format(support=str(SUPPORT), url=URL, data=str(data), folder=config.remote_cache)
    return subprocess.Popen(
        [sys.executable, "-c", begin + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=tmp_path,
    )  # fmt: skip


def test_a_kill_loses_nothing_that_was_written(bucket, config, tmp_path) -> None:
    code = f"""
source = cache.open_kept({URL!r}, config)
source.read({2 * MIB}, {2 * MIB})
os.kill(os.getpid(), signal.SIGKILL)
"""
    child = start(code, tmp_path, config)
    assert child.wait() == -signal.SIGKILL
    assert kept(config) == [".journal", ".json", ".part"]
    source = locate(URL, config)
    assert read_all(source) == content()
    assert bucket.fetched() == len(content()) - 3 * MIB
    source.close()
    settled()
    assert Path(locate(URL, config)).read_bytes() == content()


def test_a_kill_before_the_complete_file_has_its_name(bucket, config, tmp_path) -> None:
    code = f"""
store.Store.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
source = cache.open_kept({URL!r}, config)
source.read(0, source.size)
import time; time.sleep(60)
"""
    child = start(code, tmp_path, config)
    assert child.wait() == -signal.SIGKILL
    found = locate(URL, config)
    assert Path(found).read_bytes() == content()
    assert bucket.fetched() == 0
    assert kept(config) == [".json", ".safetensors"]


def test_a_kill_before_the_journal_is_removed(bucket, config, tmp_path) -> None:
    code = f"""
unlink = os.unlink
def after_rename(path):
    if any(name.endswith(".safetensors") for name in os.listdir(os.path.dirname(path))):
        os.kill(os.getpid(), signal.SIGKILL)
    unlink(path)
store.os.unlink = after_rename
source = cache.open_kept({URL!r}, config)
source.read(0, source.size)
import time; time.sleep(60)
"""
    child = start(code, tmp_path, config)
    assert child.wait() == -signal.SIGKILL
    assert kept(config) == [".journal", ".json", ".safetensors"]
    assert Path(locate(URL, config)).read_bytes() == content()
    assert kept(config) == [".json", ".safetensors"]


def test_a_pair_that_cannot_be_begun_is_not_locked(tmp_path, monkeypatch) -> None:
    """Whoever keeps the exception keeps its frames, and would keep the lock."""

    def refuse(path: str) -> None:
        raise OSError(errno.EPERM, "it is another user's")

    stem = str(tmp_path / "pair")
    monkeypatch.setattr(partial.os, "unlink", refuse)
    with pytest.raises(OSError, match="another user") as caught:
        partial.Partial(stem, 100)
    with open(f"{stem}.journal", "rb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    del caught


def test_processes_fill_one_file(bucket, config, tmp_path) -> None:
    code = f"""
import random
source = cache.open_kept({URL!r}, config)
want, step = bucket.files[{URL!r}], 300_000
offsets = list(range(0, len(want), step))
random.Random(int(sys.stdin.readline())).shuffle(offsets)
print("ready", flush=True)
sys.stdin.readline()
for offset in offsets:
    assert bytes(source.read(offset, min(step, len(want) - offset))) == want[offset:offset + step]
source.close()
"""
    children = [start(code, tmp_path, config) for _ in range(2)]
    for seed, child in enumerate(children):
        child.stdin.write(f"{seed}\n")
        child.stdin.flush()
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.wait() for child in children] == [0, 0]
    assert Path(locate(URL, config)).read_bytes() == content()
    assert kept(config) == [".json", ".safetensors"]


def test_what_another_process_has_written_is_not_fetched(bucket, config) -> None:
    first, second = locate(URL, config), locate(URL, config)
    assert read_all(first) == content()
    before = bucket.fetched()
    assert read_all(second) == content()
    assert bucket.fetched() == before
    first.close()
    second.close()


def test_after_a_crash_of_the_machine_it_begins_anew(bucket, config, monkeypatch) -> None:
    source = locate(URL, config)
    source.read(0, 3 * MIB)
    source.close()
    part = next(Path(config.remote_cache).glob("*.part"))
    with open(part, "r+b") as file:  # what the crash has lost
        file.seek(MIB)
        file.write(b"\0" * MIB)
    monkeypatch.setattr(partial, "_BOOT", b"another boot id!")
    source = locate(URL, config)
    assert read_all(source) == content()
    source.close()


def test_another_machine_leaves_it_alone(bucket, config, monkeypatch, caplog) -> None:
    source = locate(URL, config)
    with monkeypatch.context() as patched:
        patched.setattr(partial, "_BOOT", b"another boot id!")
        other = locate(URL, config)
        assert isinstance(other, MemorySource)
        assert "another machine" in caplog.text
    assert read_all(source) == content()
    source.close()


def test_a_torn_record_is_ignored(bucket, config) -> None:
    source = locate(URL, config)
    journal = next(Path(config.remote_cache).glob("*.journal"))
    with open(journal, "ab") as file:
        file.write(b"\x01" * 24 + b"\x02" * 7)
    assert read_all(source) == content()
    source.close()
    again = locate(URL, config)
    if not isinstance(again, str):
        assert read_all(again) == content()
        again.close()


def test_a_part_that_was_cut_is_begun_anew(bucket, config) -> None:
    source = locate(URL, config)
    source.read(0, 3 * MIB)
    source.close()
    os.truncate(next(Path(config.remote_cache).glob("*.part")), 2 * MIB)
    source = locate(URL, config)
    assert read_all(source) == content()
    source.close()


def test_a_complete_file_that_was_cut_is_not_used(bucket, config) -> None:
    os.truncate(fill(config), 2 * MIB)
    source = locate(URL, config)
    assert read_all(source) == content()
    source.close()
    settled()
    assert Path(locate(URL, config)).read_bytes() == content()


def test_a_full_disk_ends_the_keeping_and_not_the_load(bucket, config, monkeypatch, caplog) -> None:
    source = locate(URL, config)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        assert read_all(source) == content()
    assert caplog.text.count("is not kept any more") == 1
    source.close()
    assert ".safetensors" not in kept(config)


def test_a_folder_that_cannot_be_made(bucket, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    source = locate(URL, Config(remote_cache=str(tmp_path / "file" / "cache")))
    assert isinstance(source, MemorySource)
    assert "streamed and not kept" in caplog.text
    assert read_all(source) == content()


def test_an_error_of_the_network_is_raised(bucket, config, monkeypatch) -> None:
    def fails(self: object, offset: int, into: object) -> None:
        raise base.RemoteError("memory", "/model", "reset")

    monkeypatch.setattr(MemorySource, "read_into", fails)
    with pytest.raises(base.RemoteError, match="reset"):
        locate(URL, config)
    assert all(one.closed for one in bucket.opened)


def test_no_thread_and_no_descriptor_is_left(bucket, config) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    fill(config)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not [one for one in threading.enumerate() if one.name == "fastst-cache"]


def test_a_handler_that_loads_while_its_thread_begins_a_file(
    bucket, config, monkeypatch, caplog
) -> None:
    make_room = Store._make_room
    nested: list[object] = []

    def interrupted(self: Store, nbytes: int) -> None:
        monkeypatch.setattr(Store, "_make_room", make_room)
        nested.append(locate(URL, config))
        make_room(self, nbytes)

    monkeypatch.setattr(Store, "_make_room", interrupted)
    source = locate(URL, config)
    assert isinstance(nested[0], MemorySource)
    assert "interrupts another load" in caplog.text
    assert read_all(source) == content()
    source.close()


def test_closing_at_once_still_finishes(bucket, config, monkeypatch) -> None:
    go = threading.Event()
    sync = partial.Partial.sync

    def slow(self: partial.Partial) -> None:
        go.wait()
        sync(self)

    monkeypatch.setattr(partial.Partial, "sync", slow)
    source = locate(URL, config)
    read_all(source)
    source.close()  # while the disk is still busy
    assert kept(config) == [".journal", ".json", ".part"]
    go.set()
    settled()
    assert kept(config) == [".json", ".safetensors"]
