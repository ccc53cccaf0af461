"""Reads classes, signatures and routes from the source of a package, without importing it."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

Method = ast.FunctionDef | ast.AsyncFunctionDef
_VERBS = ("get", "post", "put", "delete", "patch", "head", "options", "websocket", "api_route")


class Source:
    """A wheel, or a folder with packages. Names are ``module:Class`` or ``module:Class.method``."""

    def __init__(self, place: Path) -> None:
        files: dict[str, Callable[[], str]] = {}
        if place.is_dir():
            for path in place.glob("vllm/**/*.py"):
                files[str(path.relative_to(place))] = path.read_text
        else:
            wheel = zipfile.ZipFile(place)
            for name in wheel.namelist():
                if name.startswith("vllm/") and name.endswith(".py"):
                    files[name] = _reader(wheel, name)
        self._files = files
        if not files:
            raise ValueError(f"{place} holds no package vllm")
        self._tree = cache(self._parsed)

    def _parsed(self, module: str) -> tuple[str, ast.Module] | None:
        """The package that relative imports count from, and the module's tree."""
        path = module.replace(".", "/")
        for name, package in (
            (f"{path}.py", module.rpartition(".")[0]),
            (f"{path}/__init__.py", module),
        ):
            if name in self._files:
                return package, ast.parse(self._files[name]())
        return None

    def has(self, name: str) -> bool:
        """Whether ``module:name`` can be imported."""
        module, _, wanted = name.partition(":")
        return wanted in self._names(module) or self._parsed(f"{module}.{wanted}") is not None

    def _names(self, module: str) -> set[str]:
        found = self._tree(module)
        if found is None:
            return set()
        package, tree = found
        out: set[str] = set()
        for node in _statements(tree.body):
            if isinstance(node, ast.ClassDef | Method):
                out.add(node.name)
            elif isinstance(node, ast.ImportFrom):
                if node.names[0].name == "*":
                    out |= self._names(_absolute(package, node))
                out |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Assign):
                out |= {t.id for t in node.targets if isinstance(t, ast.Name)}
                if isinstance(node.value, ast.Dict):  # of a module that imports as it is asked
                    keys = node.value.keys
                    out |= {str(k.value) for k in keys if isinstance(k, ast.Constant)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                out.add(node.target.id)
        return out

    def _class(self, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """A class, wherever it is imported from within the package."""
        found = self._tree(module)
        if found is None:
            return None
        package, tree = found
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._class(_absolute(package, node), alias.name)
        return None

    def _line(self, name: str) -> Iterator[ast.ClassDef]:
        """The class and those that it inherits from, of this package."""
        module, _, wanted = name.partition(":")
        found = self._class(module, wanted)
        if found is None:
            return
        where, node = found
        yield node
        for base in node.bases:
            if isinstance(base, ast.Name):
                yield from self._line(f"{where}:{base.id}")

    def fields(self, name: str, private: bool = False) -> list[str]:
        """Annotated fields, inherited ones included, sorted."""
        out = set()
        for node in self._line(name):
            for item in node.body:
                if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                    continue
                kept = private or not item.target.id.startswith("_")
                if kept and "ClassVar" not in ast.unparse(item.annotation):
                    out.add(item.target.id)
        return sorted(out)

    def methods(self, name: str) -> dict[str, list[str]]:
        """Own methods to their parameters, without the instance or the class."""
        nodes = next(iter(self._line(name))).body
        return {n.name: _parameters(n) for n in nodes if isinstance(n, Method)}

    def parameters(self, name: str) -> list[str] | None:
        """Of ``module:Class.method``; None where there is none."""
        place, _, method = name.rpartition(".")
        for node in self._line(place):
            for item in node.body:
                if isinstance(item, Method) and item.name == method:
                    return _parameters(item)
        return None

    def attributes(self, name: str) -> set[str]:
        """What instances and the class have."""
        out = set(self.fields(name, private=True))
        for node in self._line(name):
            for item in ast.walk(node):
                if isinstance(item, Method):
                    out.add(item.name)
                elif isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store):
                    out.add(item.attr)
                elif isinstance(item, ast.Assign):
                    out |= {t.id for t in item.targets if isinstance(t, ast.Name)}
        return out

    def routes(self) -> list[str]:
        """``METHOD path`` of every route that is declared by a decorator."""
        out = set()
        for name in self._files:
            if not name.startswith(("vllm/entrypoints/", "vllm/plugins/")):
                continue
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            found = self._tree(module)
            for node in ast.walk(found[1]) if found else ():
                for call in node.decorator_list if isinstance(node, Method) else ():
                    out |= set(_routes(call))
        return sorted(out)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module, those under a condition included."""
    for node in body:
        yield node
        for part in ("body", "orelse", "handlers", "finalbody"):
            inner = getattr(node, part, ())
            if not isinstance(node, ast.ClassDef | Method):
                yield from _statements(inner)


def _reader(wheel: zipfile.ZipFile, name: str) -> Callable[[], str]:
    return lambda: wheel.read(name).decode()


def _routes(call: ast.expr) -> Iterator[str]:
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or not call.args:
        return
    verb, path = call.func.attr, call.args[0]
    if verb in _VERBS and isinstance(path, ast.Constant) and str(path.value).startswith("/"):
        methods = [verb.upper()]
        for keyword in call.keywords:
            if keyword.arg == "methods":
                methods = list(ast.literal_eval(keyword.value))
        yield from (f"{method} {path.value}" for method in methods)


def _parameters(node: Method) -> list[str]:
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args)]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    return [*(names if static else names[1:]), *(a.arg for a in given.kwonlyargs)]


def _absolute(package: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def imports_of(folder: Path) -> list[str]:
    """What the modules of a folder import of vLLM, as ``module:name``, sorted."""
    out = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                out |= {f"{node.module}:{alias.name}" for alias in node.names}
    return sorted(out)
