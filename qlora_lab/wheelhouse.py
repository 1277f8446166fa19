"""The hashes of a wheelhouse, the folder of wheels from which a room without internet is set up.

    python qlora_lab/wheelhouse.py sum FOLDER      write SHA256SUMS
    python qlora_lab/wheelhouse.py check FOLDER    compare; exit code 2 and one sentence if a file differs

`make wheelhouse` and `make lab WHEELHOUSE=FOLDER` call it. It runs before anything is installed, so it imports the
standard library only. `sha256sum -c SHA256SUMS` does the same where it exists.
"""

import hashlib
import pathlib
import sys

SUMS = "SHA256SUMS"


def sha256(path: pathlib.Path) -> str:
    """The hex sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_sums(folder: pathlib.Path) -> None:
    """Write the sha256 of each wheel, in the format of sha256sum."""
    wheels = sorted(folder.glob("*.whl"))
    (folder / SUMS).write_text("".join(f"{sha256(wheel)}  {wheel.name}\n" for wheel in wheels), encoding="utf-8")


def find_fault(folder: pathlib.Path) -> str:
    """What is wrong with the folder, in one sentence; empty if its wheels are those that were listed."""
    if not (folder / SUMS).is_file():
        return f"{folder} is no wheelhouse: it has no {SUMS}; `make wheelhouse` makes one where there is internet"
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        return f"{folder} lacks {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}: copy it again"
    strange = [wheel.name for wheel in sorted(folder.glob("*.whl")) if wheel.name not in expected]
    if strange:
        return f"{folder} holds {strange[0]}, which {SUMS} does not know: remove it"
    damaged = [name for name, digest in expected.items() if sha256(folder / name) != digest]
    return f"{folder / damaged[0]} is damaged: its sha256 is another; copy it again" if damaged else ""


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("sum", "check"):
        print(__doc__, file=sys.stderr)
        return 2
    folder = pathlib.Path(arguments[1])
    if arguments[0] == "sum":
        write_sums(folder)
        return 0
    fault = find_fault(folder)
    if fault:
        print(f"error: {fault}", file=sys.stderr)
    return 2 if fault else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
