"""What a wheel holds, and what its build says about kernels that were left out."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "focuskernels", "focusnet"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def setup(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def wheel(tree: Path) -> zipfile.ZipFile:
    done = setup(tree, "bdist_wheel", "--dist-dir", "dist", FOCUSKERNELS_BUILD="0")
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").iterdir()
    assert path.name == "focuskernels-0.1.0-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_wheel_holds_both_packages_and_their_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in ("focuskernels", "focusnet"):
        sources = {str(p.relative_to(ROOT)) for p in (ROOT / package).rglob("*.py")}
        assert sources <= names
    presets = {str(p.relative_to(ROOT)) for p in (ROOT / "focusnet/presets").glob("*.yaml")}
    assert {"focusnet/presets/paper.yaml", "focusnet/presets/released.yaml"} <= presets <= names
    assert {"focuskernels/py.typed", "focusnet/report.html"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "bench/", "csrc/")) for name in names)


def test_metadata(wheel: zipfile.ZipFile) -> None:
    info = "focuskernels-0.1.0.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == ("focuskernels", "0.1.0", ">=3.10")
    required = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert required == ["torch>=2.11"]
    assert "focusnet = focusnet.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_build_without_a_compiler_says_so_once(tree: Path) -> None:
    done = setup(tree, "build_ext", "--inplace", FOCUSKERNELS_BUILD="auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "focuskernels: the compiled kernels were left out: no C++ compiler (no-such-compiler is not on the PATH)"
    ]
    assert not list((tree / "focuskernels").glob("*.so"))


def test_build_without_a_compiler_fails_where_it_is_demanded(tree: Path) -> None:
    done = setup(tree, "build_ext", "--inplace", FOCUSKERNELS_BUILD="1", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "FOCUSKERNELS_BUILD=1, but no C++ compiler" in done.stderr


def test_failing_compiler_is_reported_and_the_rest_is_built(tree: Path) -> None:
    done = setup(tree, "build_ext", "--inplace", FOCUSKERNELS_BUILD="auto", CXX="false")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the compiled kernels were left out") == 1


def test_unknown_build_mode(tree: Path) -> None:
    done = setup(tree, "--version", FOCUSKERNELS_BUILD="yes")
    assert done.returncode != 0
    assert "must be auto, 0 or 1, not 'yes'" in done.stderr


@pytest.mark.parametrize("build", ["0", pytest.param("1", marks=pytest.mark.nightly)])
def test_a_wheel_built_twice_is_the_same_to_the_bit(tree: Path, tmp_path: Path, build: str) -> None:
    """In folders of other names, from files of other times."""
    wheels = []
    for name in ("one", "another"):
        copied = shutil.copytree(tree, tmp_path / name, ignore=shutil.ignore_patterns("build", "dist", "*.egg-info"))
        for path in copied.rglob("*"):
            os.utime(path, (10**9 + len(wheels), 10**9 + len(wheels)))
        environment = {"FOCUSKERNELS_BUILD": build, "SOURCE_DATE_EPOCH": "1700000000", "MAX_JOBS": "1"}
        done = setup(copied, "bdist_wheel", "--dist-dir", "dist", **environment)
        assert done.returncode == 0, done.stderr
        (wheel,) = (copied / "dist").iterdir()
        wheels.append((wheel.name, wheel.read_bytes()))
    assert ("abi3" in wheels[0][0]) == (build == "1")
    assert wheels[0] == wheels[1]
