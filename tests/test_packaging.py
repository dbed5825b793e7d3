import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEIGHBOURS = {"agents", "envs", "scripts", "tests", "configs", "docs"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what packaging reads: a build in place would leave build/ behind, which leaks into later wheels."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("dni_rl", "agents", "envs", "scripts", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, checkout)
    (path,) = folder.glob("*.whl")
    return path


def _run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_wheel_carries_the_whole_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dni_rl").rglob("*.py")} | {"dni_rl/py.typed"}
    assert names == expected


def test_the_wheel_carries_its_licence_and_needs_torch_and_numpy_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(line.split()[1].partition(">")[0] for line in required) == ["numpy", "torch"]
    assert "License-Expression: Apache-2.0" in metadata


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = "import dni_rl; print(dni_rl.__file__)"
    found = _run(sys.executable, "-c", program, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert Path(found.strip()) == tmp_path / "dni_rl" / "__init__.py"


def test_an_editable_install_makes_agents_and_envs_importable_from_any_folder(checkout, tmp_path):
    target = tmp_path / "site"
    _run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--disable-pip-version-check", "--target", target, "--editable", checkout),
    )
    # -S and addsitedir: nothing but this installation is on the path, its .pth file included
    program = (
        f"import site, sys; site.addsitedir({str(target)!r}); import importlib.util as u;"
        "print([u.find_spec(name).origin for name in ('dni_rl', 'agents', 'envs')])"
    )
    found = _run(sys.executable, "-I", "-S", "-c", program, cwd=tmp_path)
    assert ast.literal_eval(found) == [str(checkout / name / "__init__.py") for name in ("dni_rl", "agents", "envs")]


def test_importing_the_library_has_no_side_effects():
    program = """
import json, locale, logging, random, signal, sys, warnings
import numpy as np, torch

def world():
    return {
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": [str(part) for part in np.random.get_state()[1]],
        "python generator": str(random.getstate()),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "grad": [torch.is_grad_enabled(), torch.is_anomaly_enabled()],
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark],
        "cuda": torch.cuda.is_initialized(),
        "logging": [str(logging.getLogger().handlers), logging.getLogger().level],
        "warnings": str(warnings.filters),
        "path": list(sys.path),
        "signals": str(signal.getsignal(signal.SIGINT)),
    }

torch.manual_seed(1), np.random.seed(2), random.seed(3)
before, modules = world(), set(sys.modules)
import dni_rl
after = world()
roots = sorted({name.partition(".")[0] for name in set(sys.modules) - modules})
print(json.dumps({"changed": [name for name in before if before[name] != after[name]], "roots": roots}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["changed"] == []
    third_party = set(found["roots"]) - sys.stdlib_module_names - {"dni_rl", "torch", "numpy"}
    assert third_party == set()


@pytest.mark.parametrize(("package", "forbidden"), [("dni_rl", NEIGHBOURS), ("envs", {"agents", "scripts", "tests"})])
def test_imports_point_one_way(package, forbidden):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {name.partition(".")[0] for name in names} & forbidden
            assert not found, f"{path.relative_to(ROOT)}, line {node.lineno}: {package} must not import {found}"
