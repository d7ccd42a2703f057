"""Writes requirements.txt anew from requirements.in: the newest version of everything that it needs and the SHA-256 of its
wheels, for CPython 3.11 to 3.14 on Linux x86-64. Needs uv: python3 -m pip install uv; python3 lock.py
"""

import pathlib
import subprocess
import tomllib

HERE = pathlib.Path(__file__).parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
HEAD = "# Made by lock.py from requirements.in: wheels for CPython {} to {} on Linux x86-64.\n"


def packages(python):
    """Yields each package's version and the hash of its wheel for one Python."""
    lock = subprocess.run(
        ["uv", "pip", "compile", "--quiet", "--format", "pylock.toml", "--only-binary", ":all:", "--python-version", python,
         "--python-platform", "x86_64-manylinux_2_28", HERE / "requirements.in"],
        check=True, capture_output=True, text=True)  # fmt: skip
    for package in tomllib.loads(lock.stdout)["packages"]:
        for wheel in package["wheels"]:
            yield f"{package['name']}=={package['version']}", wheel["hashes"]["sha256"]


def main():
    found = [set(packages(python)) for python in PYTHONS]
    names = [{name for name, _ in some} for some in found]
    if any(some != names[0] for some in names):
        raise SystemExit(f"not the same versions for every Python: {set.union(*names) - set.intersection(*names)}")
    hashes = set.union(*found)
    lines = [HEAD.format(PYTHONS[0], PYTHONS[-1])]
    for name in sorted(names[0]):
        own = sorted(f" \\\n    --hash=sha256:{sha256}" for n, sha256 in hashes if n == name)
        lines.append(name + "".join(own) + "\n")
    (HERE / "requirements.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
