"""The package as a user meets it: what importing does, and what installs."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_is_quick_and_changes_nothing_but_adds_a_name():
    out = python(
        "import time, torch, transformers\n"
        "from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel\n"
        "before = [set(AttentionInterface()), set(AttentionMaskInterface())]\n"
        "threads = torch.get_num_threads()\n"
        "start = time.process_time(); import hf_kvattn; seconds = time.process_time() - start\n"  # others may run too
        "after = [set(AttentionInterface()), set(AttentionMaskInterface())]\n"
        "assert after == [names | {'kvattn'} for names in before]\n"
        "assert threads == torch.get_num_threads()\n"
        "print(seconds)"
    )
    assert float(out) < 0.3


def test_one_openmp_runtime_is_shared_with_torch():
    if sys.platform != "linux":
        pytest.skip("reads /proc")  # the question itself is Linux's: which libgomp is mapped
    out = python(
        "import torch, hf_kvattn\n"
        "from hf_kvattn.kernels import native\n"
        "assert native.unavailable() is None, native.unavailable()\n"
        "print(native.variant())\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({m for m in maps if 'libgomp' in m or 'libiomp' in m or 'libomp' in m}))"
    )
    variant, runtimes = out.splitlines()
    assert "no OpenMP" not in variant and runtimes == "1"


ROOMS = {  # file or folder of the package: the others that it may import from
    "quant": set(),
    "kernels": {"quant"},
    "autograd": set(),
    "masks": set(),
    "caches": {"autograd", "quant"},
    "alike": {"caches", "kernels"},
    "machine": set(),
    "attention": {"alike", "autograd", "caches", "kernels", "masks"},  # of caches: types, and what layers store
    "latents": {"attention", "autograd", "caches", "kernels"},
    "paged": {"attention", "kernels", "masks"},
    "compiling": {"attention", "caches", "kernels", "masks", "quant"},
    "models": {"caches"},
    "hooks": {"attention", "caches", "compiling", "latents", "paged"},
    "generation": {"caches", "compiling"},
    "plugin": {
        "attention",
        "caches",
        "compiling",
        "generation",
        "hooks",
        "latents",
        "machine",
        "masks",
        "models",
        "paged",
        "quant",
    },
    "modules": {"attention", "caches"},
    "planning": {"caches"},
    "describe": {"caches", "kernels"},
    "teaching": set(),
    "tools": {"caches", "describe", "planning"},  # of caches: their table
    "tools/commands": {"evaluation", "tools"},  # the table of commands: above whatever is one
    "evaluation": {"caches", "compiling", "kernels", "modules", "planning", "quant", "tools"},
    "integrations": {"attention", "caches", "evaluation", "generation", "kernels", "models", "planning", "plugin"}
    | {"tools"},
    "convert": {"attention", "caches", "evaluation", "kernels", "models", "plugin", "quant", "tools"},
}


def imports(path: Path) -> set[str]:
    """The full names of what a file imports, wherever in it."""
    package = ["hf_kvattn", *path.relative_to(ROOT / "hf_kvattn").parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            names |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    """convert -> evaluation -> tools; plugin -> caches, attention -> kernels -> quant; nothing of these upwards."""
    folder = ROOT / "hf_kvattn" / room
    own = [ROOT / "hf_kvattn" / f"{other}.py" for other in ROOMS if other.startswith(f"{room}/")]
    for path in set(folder.glob("**/*.py")) - {*own} if folder.is_dir() else [folder.with_suffix(".py")]:
        used = {name.split(".")[1] for name in imports(path) if name.startswith("hf_kvattn.")}
        assert used <= ROOMS[room] | {room}, path


def test_no_file_imports_itself_in_a_circle():
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("hf_kvattn/**/*.py")}
    graph = {}
    for name, path in files.items():
        used = {module for full in imports(path) for module in (full, full.rpartition(".")[0]) if module in files}
        graph[name] = used - {name}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(files)  # CycleError where there is one


def test_transformers_cache_module_is_met_in_the_caches_bases_alone():
    for path in ROOT.glob("hf_kvattn/**/*.py"):
        if re.search(r"transformers\.cache_utils|transformers import .*cache_utils", path.read_text()):
            assert path.relative_to(ROOT / "hf_kvattn/caches").as_posix() in (
                "base.py",
                "layer.py",
                "configs.py",
                "recurrent.py",
            )


def test_the_runtime_imports_no_measurement_and_none_of_their_packages():
    loaded = python("import sys, hf_kvattn; print(*sys.modules)").split()
    assert "hf_kvattn.plugin" in loaded
    above = r"hf_kvattn\.(convert|evaluation|integrations|tools)\b|matplotlib\b"
    assert not {name for name in loaded if re.match(above, name)}
    theirs = {"accelerate", "datasets", "gguf", "matplotlib", "tqdm"}  # transformers itself loads some of them
    for path in ROOT.glob("hf_kvattn/**/*.py"):
        if path.relative_to(ROOT / "hf_kvattn").parts[0] not in ("convert", "evaluation", "integrations", "tools"):
            assert not {name.split(".")[0] for name in imports(path)} & theirs, path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name in ("hf_kvattn", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(source, folder / name, ignore=ignore) if source.is_dir() else shutil.copy(source, folder)
    return folder


def build_wheel(sources: Path, out: Path, **environment: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(sources)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert run.returncode == 0, run.stderr
    (wheel,) = out.glob("*.whl")
    return [wheel.name, *zipfile.ZipFile(wheel).namelist()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is Linux's")
def test_the_wheel_is_whole_and_its_kernels_run_where_there_is_no_compiler(tmp_path):
    some = "openmp or (rings or any_number) and not avx512 or quantizes_bit and portable"  # the whole takes minutes
    command = ["bash", "scripts/wheel.sh", "-k", some]
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert re.search(r"^  native +usable$", run.stdout, re.M) and re.search(r"^[1-9]\d\d+ passed", run.stdout, re.M)

    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-manylinux_2_\d+_\w+\.whl$", wheel.name)  # one for every Python
    files = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    packed = {name for name in files if ".dist-info/" not in name}
    texts = [*(ROOT / "hf_kvattn/integrations").rglob("*.txt"), ROOT / "hf_kvattn/py.typed"]
    sources = {*(ROOT / "hf_kvattn").rglob("*.py"), *texts}
    library = {"hf_kvattn/kernels/libkvattn.so"}  # and no other, such as a second OpenMP runtime
    assert packed == {path.relative_to(ROOT).as_posix() for path in sources} | library

    (sdist,) = tmp_path.glob("*.tar.gz")  # which the wheel was built from
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    above = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    csrc = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_kvattn/kernels/csrc").iterdir()}
    assert names == packed - library | csrc | above


@pytest.mark.slow
def test_without_a_compiler_the_package_installs_and_sdpa_serves(sources, tmp_path):
    _, *files = build_wheel(sources, tmp_path / "wheel", CXX="/no/such/compiler", CC="/no/such/compiler")
    assert "hf_kvattn/plugin.py" in files and not [f for f in files if f.endswith(".so")]
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    out = python(
        "import sys; sys.path[:] = [p for p in sys.path if p]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if isinstance(f, type)]\n"  # no finder of an editable install
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import hf_kvattn\n"
        "from hf_kvattn.kernels import native\n"
        "native._candidates = lambda here=native._candidates: here()[:1]\n"  # not the installed package's library
        f"assert hf_kvattn.__file__.startswith({str(tmp_path)!r})\n"
        "print(hf_kvattn.describe())\n"
        "try: hf_kvattn.set_backend('native')\n"
        "except ValueError as error: print(error)"
    )
    assert "native     not usable: the C++ kernels were not built" in out
    assert re.search(r"decode, 1 token +sdpa  \(the C\+\+ kernels were not built", out)
    assert "'native' in set_backend cannot be used here" in out


@pytest.mark.slow
def test_simd_variants_share_no_code(sources, tmp_path):
    """A weak function compiled for AVX-512 could replace its portable twin at link time, and crash older CPUs."""
    if not all(map(shutil.which, ("g++", "nm"))):
        pytest.skip("needs g++ and nm")  # only where the package itself was built elsewhere
    flags = {"portable": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
    for variant, extra in flags.items():
        if variant != "portable" and os.uname().machine != "x86_64":
            continue
        source = sources / "hf_kvattn/kernels/csrc/variant.cpp"
        made_of = [f"-DKVATTN_VARIANT={variant}", f'-DKVATTN_SIMD="simd_{variant}.h"', *extra]
        # -O1 inlines less than a build does, so that it shows all that could be shared, sooner.
        command = ["g++", "-std=c++17", "-O1", "-c", *made_of, str(source), "-o", str(tmp_path / "v.o")]
        subprocess.run(command, check=True, capture_output=True)
        symbols = subprocess.run(["nm", "-C", str(tmp_path / "v.o")], check=True, capture_output=True, text=True).stdout
        weak = [line for line in symbols.splitlines() if re.search(r" [Wu] ", line)]
        assert not weak, weak
        functions = re.findall(r" T (\w+)\(", symbols)  # the variant's own names, and nothing else, can be linked to
        assert sorted(functions) == [f"kvattn_{name}_{variant}" for name in ("attend", "linear", "quantize")]
