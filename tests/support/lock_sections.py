"""Functions of the package that take a lock: which scenario of `lock_strikes` runs each."""

SECTIONS = {
    "open": {
        "layout.py get", "layout.py put", "report.py __enter__", "report.py __exit__",
        "files/base.py count", "files/cpu.py map", "report.py emit", "report.py count",
        "report.py tell",
        "report.py totals", "report.py profile", "config.py push", "config.py pop",
        "config.py config",
    },
    "dtypes": {"tensors.py _try_all", "tensors.py _dtypes"},
    "handles": {"report.py count_small", "dropin/prefetch_loader.py close"},
    "patch": {
        "patching/patcher.py _settle", "patching/patcher.py patch",
        "patching/patcher.py unpatch", "patching/patcher.py __enter__",
        "patching/patcher.py __exit__", "patching/patcher.py patch_map",
    },
    "device": {"files/prefetcher.py hand_out", "files/prefetcher.py drop"},
    "loader": {
        "files/prefetcher.py expect", "files/prefetcher.py hand_out", "files/prefetcher.py drop",
        "loader/local_files.py close",
    },
    "requests": {
        "files/prefetcher.py expect", "files/prefetcher.py hand_out", "files/prefetcher.py drop",
    },
    "groups": {"sharding/groups.py of"},
}  # fmt: skip
"""Functions that take a lock, by scenario."""

NOT_RUN = {
    "patching/patcher.py imported": "as _settle, where a module is imported",
    "integrations/hook.py whole": "once in a process: tests/patching/test_late.py",
    "locks.py _renew": "in every forked child that uses what it inherited",
    "sources/loop.py acquire": "it starts obstore, which refuses to work in forked children",
    "sources/loop.py release": "as acquire",
    "sources/stream.py read": "it needs a server: tests/sources/test_transport_life.py",
    "sources/partial.py refresh": "it needs a server: tests/sources/test_cache.py",
    "sources/partial.py write": "as refresh",
    "integrations/deferred.py plain": "it needs an engine: tests/engines/test_parallel_ranks.py",
    "integrations/parts.py _pairs_of": "as plain",
    "integrations/parts.py count": "as plain",
    "engine/feeds.py ready": "where a remote file is opened again, after Ctrl-C or in a child",
}
