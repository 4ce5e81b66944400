"""The pages of the reference: one for each room that holds public names, written from the packages' own lists."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

from citations import Source, cited, sources

ROOT = Path(__file__).parents[1]
PATHS = ("curvature", "curvature.linalg", "curvature.per_example", "curvature.layerwise", "optimizers", "analysis")
SHARED = {  # modules beside the rooms: the room whose page they are on
    "curvature.errors": "curvature.objective",
    "curvature.generators": "curvature.objective",
    "curvature.parameters": "curvature.objective",
    "curvature.linop": "curvature.operators",
    "curvature.solve": "curvature.linalg.systems",
    "analysis.registry": "analysis.run",
}
BASES = {
    "optimizers.diagonal": ("optimizers.diagonal.shell.CurvatureOptimizer", "optimizers.shared.base.Shared"),
    "optimizers.kronecker": ("optimizers.kronecker.shell.MatrixOptimizer", "optimizers.kronecker.shell.MatrixCommon"),
}
"""What public docstrings refer to for what several of them share."""
BLOCK = "::: {}\n    options:\n      heading: {}\n      toc_label: {}\n{}"
INDEX = """# Reference

Public are the names below, by these paths: {paths}. Whatever takes a matrix takes an operator, an objective, a tensor
or a NumPy array; whatever draws random numbers takes `generator=`, a `torch.Generator` or a seed.

"""


@cache
def _tree(module: str) -> ast.Module:
    place = ROOT / module.replace(".", "/")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def origins(path: str) -> dict[str, str]:
    """Return the module that defines each public name of a path."""
    found, listed = {}, None
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {alias.asname or alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "__all__" and isinstance(node.value, ast.List):
                listed = ast.literal_eval(node.value)
            elif node.targets[0].id == "_PLACES":
                places = ast.literal_eval(node.value)
                found = {name: f"{path}.{module}" for module, names in places.items() for name in names.split()}
    return {name: found[name] for name in (found if listed is None else listed) if name in found}


def rooms() -> dict[str, dict[str, str]]:
    """Return, for each room, the public path of each of its names and where it is defined."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    seen = set()
    for path in PATHS:
        for name, module in origins(path).items():
            if (name, module) not in seen:
                seen.add((name, module))
                depth = 3 if module.startswith("curvature.linalg.") else 2
                room = SHARED.get(module, ".".join(module.split(".")[:depth]))
                found[room][f"{path}.{name}"] = f"{module}.{name}"
    for room, bases in BASES.items():
        found[room] |= {base: base for base in bases}
    return dict(sorted(found.items(), key=lambda entry: (entry[0].split(".")[0] != "curvature", entry[0])))


def _sources(own: list[Source], of_module: list[Source]) -> str:
    """What stands below an entry whose docstring leaves the sources to its module."""
    return "" if own or not of_module else f"\nSources: {'; '.join(source.short for source in of_module)}.\n"


def formula_sources() -> dict[str, tuple[list[Source], list[Source]]]:
    """Return, for each public name, what its own docstring cites and what that of its module does."""
    known, found = sources(), {}
    for names in rooms().values():
        for public, place in names.items():
            module, name = place.rsplit(".", 1)
            tree = _tree(module)
            own = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
            texts = (ast.get_docstring(own[0]) if own else "", ast.get_docstring(tree))
            found[public] = (cited(texts[0] or "", known), cited(texts[1] or "", known))
    return found


def pages() -> dict[str, str]:
    """Return the text of each page by its place in the site."""
    made, lines, found = {}, [], formula_sources()
    for room, names in rooms().items():
        uri, title = f"reference/{room.replace('.', '/')}.md", room
        about = (ast.get_docstring(_tree(room)) or "").split("\n")[0]
        order = sorted(names, key=lambda n: ("plot_" in n, n.rsplit(".", 1)[1][0].isupper(), n))
        blocks = [BLOCK.format(names[n], n, n.rsplit(".", 1)[1], _sources(*found[n])) for n in order]
        made[uri] = f"# {title}\n\n{about}\n\n" + "\n".join(blocks)
        links = ", ".join(f"[`{n.rsplit('.', 1)[1]}`]({uri.removeprefix('reference/')}#{names[n]})" for n in order)
        lines.append(f"**[{title}]({uri.removeprefix('reference/')})** {about}\n: {links}\n")
    paths = ", ".join(f"`{path}`" for path in PATHS)
    return {"reference/index.md": INDEX.format(paths=paths) + "\n".join(lines)} | made
