"""The house's own rules: what may import what, what an import costs, and that the manifest is one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import napari_recon

PACKAGE = Path(napari_recon.__file__).parent
ROOT = PACKAGE.parent
# Arrows point down this list only: a room imports what stands after it (learning uses physics and reconstruction).
FLOORS = {"scans": 0, "measures": 1, "physics": 1, "reconstruction": 2, "learning": 3, "sample_data": 3, "jobs": 4}
FLOORS |= {"cli": 5, "widgets": 5}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_neither_torch_nor_qt():
    out = run_python(
        "import sys, napari_recon; print([m for m in ('torch', 'qtpy', 'napari', 'numpy') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_the_job_is_described_without_torch():
    out = run_python("import sys, napari_recon.jobs.job; print('torch' in sys.modules)")
    assert out.strip() == "False"


def test_everything_but_the_docks_works_without_qt_and_napari():
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in sorted(PACKAGE.rglob("*.py"))
        if "widgets" not in p.parts
    ]
    run_python(
        "import sys, importlib\n"
        "for name in ('qtpy', 'PyQt6', 'PySide6', 'PyQt5', 'napari', 'vispy', 'superqt', 'magicgui'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "import napari_recon\n"
        "for name in napari_recon.__all__:\n"
        "    getattr(napari_recon, name)\n"
    )


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("napari_recon."):
                yield name.split(".")[1], node.lineno


@pytest.mark.parametrize("room", sorted(FLOORS))
def test_arrows_point_one_way(room):
    files = [PACKAGE / f"{room}.py"] if room == "cli" else sorted((PACKAGE / room).rglob("*.py"))
    for path in files:
        for other, line in imports_of(path):
            # The command line opens the demo's window; that is the one door from below into the docks.
            if (room, other) == ("cli", "widgets"):
                continue
            if other in FLOORS and other != room:
                assert FLOORS[other] < FLOORS[room], f"{path.relative_to(ROOT)}:{line} imports {other}"


def test_the_roots_manifest_is_the_packages():
    assert (ROOT / "napari.yaml").read_bytes() == (PACKAGE / "napari.yaml").read_bytes()


def test_public_names_have_docstrings():
    for name in napari_recon.__all__:
        if name != "__version__":
            assert getattr(napari_recon, name).__doc__, name
