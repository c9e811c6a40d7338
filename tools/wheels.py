"""Builds the wheels that are published: manylinux, for x86_64 and aarch64, on either.

    pip install -r tools/wheels.txt && python tools/wheels.py [DIR]

zig is the C compiler, for it links against an old glibc of another architecture. Each wheel is
built twice, in other folders with other caches, and must come out the same bit for bit. Fails
where it does not, where auditwheel finds that the wheel does not keep what its tag says, or where
it is too large. SOURCE_DATE_EPOCH is the time of the last commit unless it is set.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("x86_64", "aarch64")
GLIBC = (2, 28)  # of 2018, as torch's own wheels; preadv2 is not in glibc before 2.26
LARGEST = 2 << 20
MODULE = "_native.abi3.so"


def main(arguments: list[str]) -> int:
    """Build into a folder; return the exit status."""
    into = Path(arguments[0] if arguments else "dist").resolve()
    os.umask(0o022)  # files' modes are in the wheel
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = built(work / "sdist", "--sdist", str(ROOT), environment=dict(os.environ))
        wheels = [twice(source, architecture, work) for architecture in ARCHITECTURES]
        into.mkdir(exist_ok=True, parents=True)
        for file in (source, *wheels):
            shutil.copy(file, into)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            print(f"{digest}  {into / file.name}  {file.stat().st_size} bytes")
    return 0


def twice(source: Path, architecture: str, work: Path) -> Path:
    """Return the wheel for an architecture, when both builds of it are the same."""
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{architecture}"
    first, second = (wheel(source, architecture, tag, work / tag / turn) for turn in ("a", "other"))
    if first.read_bytes() != second.read_bytes():
        sys.exit(f"{first.name} is not reproducible: {first} and {second} differ")
    judge(first, tag)
    return first


def wheel(source: Path, architecture: str, tag: str, work: Path) -> Path:
    """Build from the unpacked sdist, so that the folder's path is another each time."""
    work.mkdir(parents=True)
    with tarfile.open(source) as archive:
        archive.extractall(work, filter="data")
    (unpacked,) = (path for path in work.iterdir() if path.is_dir())
    compiler = (
        f"{sys.executable} -m ziglang cc -target {architecture}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    )
    environment = os.environ | {
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared -s",
        "CFLAGS": f"-g0 -ffile-prefix-map={unpacked}=.",
        "FASTST_WERROR": "1",
        "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH") or last_commit(),
        "ZIG_GLOBAL_CACHE_DIR": str(work / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(work / "zig"),
    }
    return built(
        work / "out", "--wheel", f"-C--build-option=--plat-name={tag}", str(unpacked),
        environment=environment,
    )  # fmt: skip


def built(into: Path, *arguments: str, environment: dict[str, str]) -> Path:
    """Run `build` with what is installed here, whose versions are in wheels.txt."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(into), *arguments]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        last = "\n".join(done.stdout.splitlines()[-40:])
        sys.exit(f"{last}\n{' '.join(command)} failed")
    (made,) = into.iterdir()
    return made


def last_commit() -> str:
    """Seconds since the epoch."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def judge(made: Path, tag: str) -> None:
    """Fail where the wheel is not what its name says, too large, or without its list of parts."""
    command = [sys.executable, "-m", "auditwheel", "show", str(made)]
    verdict = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(verdict)
    if f'"{tag}"' not in verdict:
        sys.exit(f"{made.name}: auditwheel does not find it consistent with {tag}")
    if made.stat().st_size > LARGEST:
        sys.exit(f"{made.name} has {made.stat().st_size} bytes, more than {LARGEST}")
    with zipfile.ZipFile(made) as archive:
        unknown = unresolved(archive.read(f"fastst_patch/{MODULE}"))
        if unknown:
            sys.exit(f"{made.name}: not in glibc {GLIBC}: {', '.join(unknown)}")
        if not any(".dist-info/sboms/" in name for name in archive.namelist()):
            sys.exit(f"{made.name} has no bill of materials")


def unresolved(module: bytes) -> list[str]:
    """What neither Python nor that glibc has: the linker of a module accepts it in silence.

    Symbols of glibc have a version. One that its stubs lack has none, and auditwheel passes it.
    """
    from elftools.elf.elffile import ELFFile  # auditwheel needs it, too

    file = ELFFile(io.BytesIO(module))
    versions = file.get_section_by_name(".gnu.version")
    return [
        symbol.name
        for i, symbol in enumerate(file.get_section_by_name(".dynsym").iter_symbols())
        if symbol["st_shndx"] == "SHN_UNDEF"
        and symbol["st_info"]["bind"] == "STB_GLOBAL"
        and not symbol.name.lstrip("_").startswith("Py")
        and versions.get_symbol(i)["ndx"] in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
