"""The import table of docs/architecture.md, read off the source:
who may import whom, and no cycles.
"""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGES = ("model_factory", "data_pipeline", "training", "eval_encoder")
ALLOWED = {
    "model_factory": {"model_factory"},
    "data_pipeline": {"data_pipeline", "model_factory"},
    "training": {"training", "data_pipeline", "model_factory"},
    "eval_encoder": {"eval_encoder", "data_pipeline", "model_factory", "training"},
}
# optional heavy libraries and the only modules that may name them
HOMES = {
    "nvidia": {"data_pipeline.loading.dali_pipeline"},
    "faiss": {"data_pipeline.clustering.kmeans", "data_pipeline.clustering.search"},
    "flash_attn": {"model_factory.attention"},
    "decord": {"eval_encoder.clip_reader"},
    "torchcodec": {"eval_encoder.clip_reader"},
    "webdataset": {"data_pipeline.shards.writer"},
    "wandb": {"training.record.metrics"},
    "ray": {"data_pipeline.shards.pack"},
    "fsspec": {"data_pipeline.shards.inputs"},
    "peft": {"eval_encoder.lmm.model.lmm"},
    "gradio": {"eval_encoder.lmm.web.page"},
    "lmms_eval": {"eval_encoder.lmm.scoring.lmms_eval"},
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text())
    return found


def imports(name: str, tree: ast.Module, is_package: bool, top_only: bool = False) -> set[str]:
    """Absolute names of everything a module imports; relative imports resolved."""
    result = set()
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".") if is_package else name.split(".")[:-1]
            stem = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*stem, *([node.module] if node.module else [])])
            result |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return result


TREES = modules()
IS_PACKAGE = {name: (ROOT / name.replace(".", "/")).is_dir() for name in TREES}


@pytest.mark.parametrize("name", TREES)
def test_module_imports_only_what_its_layer_may(name):
    package = name.split(".")[0]
    for target in imports(name, TREES[name], IS_PACKAGE[name]):
        root = target.split(".")[0]
        if root in PACKAGES:
            assert root in ALLOWED[package], f"{name} imports {target}"
        if root in HOMES:
            assert name in HOMES[root], f"{name} imports {target}; only {HOMES[root]} may"
        if package == "eval_encoder" and root == "training":
            allowed = ("training.distributed", "training.log", "training.export")
            assert target.startswith(allowed), f"{name}: {target}"
        if name.startswith("eval_encoder.probe"):
            assert not target.startswith("eval_encoder.lmm"), f"{name} imports {target}"
        if name.startswith("eval_encoder.lmm"):
            assert not target.startswith("eval_encoder.probe"), f"{name} imports {target}"
        if name.startswith("data_pipeline.loading"):
            assert not target.startswith("data_pipeline.codec"), (
                f"a training node needs no PyAV: {name}"
            )
        if package == "training":
            forbidden = (
                "data_pipeline.codec",
                "data_pipeline.clustering",
                "data_pipeline.embedded",
            )
            assert not target.startswith(forbidden), f"{name} imports {target}"


def test_embedded_sets_need_neither_torch_nor_shards():
    for name, tree in TREES.items():
        if not name.startswith("data_pipeline.embedded"):
            continue
        for target in imports(name, tree, IS_PACKAGE[name]):
            forbidden = ("torch", "data_pipeline.loading", "data_pipeline.clustering")
            assert not target.startswith(forbidden), f"{name} imports {target}"
            if target.startswith("data_pipeline.shards"):
                assert target.startswith("data_pipeline.shards.inputs"), f"{name} imports {target}"


def test_model_factory_imports_its_siblings_relatively():
    for name, tree in TREES.items():
        if name.startswith("model_factory.") and "convert" not in name:
            for node in ast.walk(tree):
                absolute = isinstance(node, ast.ImportFrom) and node.level == 0
                assert not (absolute and node.module.startswith("model_factory")), name


def test_no_import_cycles_at_module_level():
    graph = {
        name: {
            target
            for target in imports(name, tree, IS_PACKAGE[name], top_only=True)
            if target in TREES and target != name
        }
        for name, tree in TREES.items()
    }
    done, active = set(), []

    def visit(name):
        assert name not in active, f"cycle: {' -> '.join([*active[active.index(name) :], name])}"
        if name not in done:
            active.append(name)
            for target in graph[name]:
                visit(target)
            active.pop()
            done.add(name)

    for name in graph:
        visit(name)


def test_only_the_edges_read_the_launcher_environment():
    for name in TREES:
        text = (
            ROOT / (name.replace(".", "/") + ("/__init__.py" if IS_PACKAGE[name] else ".py"))
        ).read_text()
        # the second: `torchrun -m data_pipeline features` divides shards, which needs no group
        if name not in ("training.distributed", "data_pipeline.commands"):
            assert (
                '"RANK"' not in text and '"WORLD_SIZE"' not in text and '"LOCAL_RANK"' not in text
            ), name


def test_every_module_imports_without_optional_libraries():
    """DALI, FAISS, flash-attn, decord and PyAV are made unimportable;
    every module must still import.
    """
    code = (
        "import sys, importlib\n"
        "for name in ('nvidia', 'nvidia.dali', 'faiss', 'flash_attn', 'decord', 'av', "
        "'webdataset', 'torchvision'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {[n for n in TREES if not n.endswith('__main__')]!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_module_shadows_a_library_when_its_folder_comes_first_on_the_path():
    """`torchrun eval_encoder/attentive_probe.py` puts eval_encoder/ first on sys.path."""
    from importlib.metadata import packages_distributions

    known = set(sys.stdlib_module_names) | set(packages_distributions())
    for package in ("eval_encoder", "model_factory"):
        for path in (ROOT / package).glob("*.py"):
            if path.stem != "__init__":
                assert path.stem not in known, f"{path} shadows the library {path.stem}"


@pytest.mark.parametrize(
    "forbidden",
    [
        "import pickle",
        "pickle.load",
        "shell=True",
        "weights_only=False",
        "allow_pickle=True",
        "trust_remote_code=True",
    ],
)
def test_nothing_executes_data(forbidden):
    for name in TREES:
        text = (
            ROOT / (name.replace(".", "/") + ("/__init__.py" if IS_PACKAGE[name] else ".py"))
        ).read_text()
        assert forbidden not in text, f"{name} contains {forbidden!r}"


def test_torch_load_reads_tensors_only():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", name
