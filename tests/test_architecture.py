"""Arrows between the rooms of the package go down only, as docs/architecture.md draws them."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import megatron_longact

PACKAGE = Path(megatron_longact.__file__).parent

FLOORS = [
    {"config", "flags", "attention_layout", "tokens", "reduction", "safetensors_files", "versions"},
    {"qkv_layout", "mla_layout"},
    {"layouts", "selection", "refusals", "masked_update", "mask_history", "trainers"},
    {"qkv_layers", "optimizer_shards", "saliency", "state", "metrics", "imported_masks", "arguments"},
    {"frozen_rows"},
    {"longact"},
    {"conversion"},
    {"megatron", "preflight", "planning"},
    {"run", "tasks", "reporting"},
    {"generation"},
    {"rl", "evaluation"},
    {"analysis"},
    {"commands"},
    {"__main__"},
]
"""From the ground up. A room may import what lies below it, and itself; on the lower floors also its neighbours."""

NEIGHBOURS = {
    ("reduction", "config"),
    ("mask_history", "selection"),
    ("saliency", "qkv_layers"),
    ("preflight", "megatron"),
}


def room_of(module: str) -> str:
    """reduction_triton and reduction_grid are parts of reduction."""
    name = module.split(".")[1] if "." in module else ""
    return "reduction" if name.startswith("reduction_") else name


def name_of(path: Path) -> str:
    """The dotted name; that of a package for its __init__.py."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "megatron_longact":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "megatron_longact"}
    return found


def test_arrows_go_down_only() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {room_of(f".{name}") for name in names - {"__init__"}} == set(floor)
    upwards = []
    for path in sorted(PACKAGE.rglob("*.py")):
        here = room_of(name_of(path))
        for module in sorted(imports(path)) if here else ():
            there = room_of(module)
            aside = (here, there) in NEIGHBOURS or there == here
            if there in floor and not aside and floor[there] >= floor[here]:
                upwards.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not upwards, "\n" + "\n".join(upwards)


def test_no_modules_import_each_other() -> None:
    """No circle, neither at the top of modules nor inside functions."""
    modules = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in modules.items():
        found = {module if module in modules else module.rpartition(".")[0] for module in imports(path)}
        graph[name] = found - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' <- '.join(error.args[1])}") from None


def test_no_module_is_longer_than_it_can_be_read() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_function_is_longer_than_it_can_be_read() -> None:
    functions = {
        f"{path.relative_to(PACKAGE)} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: length for name, length in functions.items() if length > 60} == {}
