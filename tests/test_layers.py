"""The layers of docs/design.md §2: who may import whom, imports inside functions included, and no import cycles."""

import ast
from pathlib import Path
from typing import get_args

from detour.config.job import ModelArch

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "detour"

# The first prefix that fits decides. A module may import its own layer and those below, unless `ONLY` says less.
LAYERS = (
    ("detour.cli", 6), ("detour.__main__", 6), ("detour.console", 6), ("detour.queue_commands", 6),
    ("detour.ui_command", 6),
    ("detour.web", 5), ("detour.jobs", 4),
    ("detour.train", 3), ("detour.adapter", 3), ("detour.plan", 3), ("detour.checking", 3), ("detour.demo", 6),
    ("detour.data", 2), ("detour.sample", 2), ("detour.draw", 2), ("detour.export", 2), ("detour.report", 2),
    ("detour.lora_formats", 2), ("detour.nano", 2),
    ("detour.archs", 1),
    ("detour.events", 0), ("detour.files", 0), ("detour.seeds", 0), ("detour.weights", 0), ("detour.trackers", 0),
    ("detour.config", 0), ("detour.nn", 0), ("detour", 0),
)  # fmt: skip
ONLY = {
    "detour.jobs": ("detour.config", "detour.events", "detour.files", "detour.steering", "detour.jobs"),
    "detour.web": (
        "detour.config", "detour.events", "detour.files", "detour.steering", "detour.jobs", "detour.archs",
        "detour.data", "detour.report", "detour.web",
    ),
}  # fmt: skip
TORCH_FREE = (
    "detour", "detour.cli", "detour.console", "detour.events", "detour.files", "detour.seeds", "detour.trackers",
    "detour.config", "detour.archs", "detour.nn.quiet", "detour.checking",
    "detour.data.images", "detour.data.clips", "detour.data.caption_files", "detour.data.scan", "detour.data.buckets",
    "detour.data.captions", "detour.data.order", "detour.data.own_pictures", "detour.data.everyday",
    "detour.jobs", "detour.queue_commands",
    "detour.steering", "detour.web", "detour.report", "detour.data.health",
)  # fmt: skip
EXTERNAL_ONLY_IN_FUNCTIONS = ("diffusers", "transformers")


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> int:
    return next(number for prefix, number in LAYERS if module == prefix or module.startswith(prefix + "."))


def type_only(tree: ast.Module) -> set[ast.AST]:
    """Nodes under `if TYPE_CHECKING:`, which never run."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(path: Path) -> list[tuple[str, bool, bool]]:
    """(module, at the top level, for types only) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed, found = type_only(tree), []
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top, node in typed) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import; write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((full if full in MODULES else node.module, node in top, node in typed))
    return found


def test_every_module_has_a_layer_and_imports_only_downwards() -> None:
    assert len(MODULES) > 20
    wrong = []
    for module, path in MODULES.items():
        allowed = next((names for prefix, names in ONLY.items() if module.startswith(prefix)), None)
        for target, _, _ in imports(path):
            if not target.startswith("detour"):
                continue
            outside = allowed is not None and not target.startswith(allowed) and target != "detour"
            if layer(target) > layer(module) or outside:
                wrong.append(f"{module} (layer {layer(module)}) imports {target} (layer {layer(target)})")
    assert not wrong, "\n".join(wrong)


SHARED = ("detour.archs.base", "detour.archs.parts", "detour.archs.ldm", "detour.archs.unet_names")


def test_architectures_do_not_know_each_other() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, path in MODULES.items()
        if module.startswith("detour.archs.")
        for target, _, _ in imports(path)
        if target.startswith("detour.archs.") and target not in (*SHARED, module, f"{module}_parts")
    ]
    assert not wrong, "\n".join(wrong)


KNOW_NAMES = ("detour.archs", "detour.nano", "detour.config", "detour.demo")


def test_the_engine_does_not_know_the_names_of_architectures() -> None:
    """Its behaviour hangs on the spec. The schema lists the names, ai-toolkit's files are translated by them."""
    names = get_args(ModelArch)
    wrong = [
        f"{module}:{node.lineno}: {node.value!r}"
        for module, path in MODULES.items()
        if not module.startswith(KNOW_NAMES)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] in names
    ]
    # What `detour nano` writes when nothing is said.
    assert [entry for entry in wrong if not entry.startswith("detour.cli:") or "'zimage'" not in entry] == []


def test_no_import_cycles() -> None:
    graph = {m: {t for t, _, typed in imports(p) if t in MODULES and t != m and not typed} for m, p in MODULES.items()}
    seen: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "import cycle: " + " -> ".join([*trail[trail.index(module) :], module])
        if seen.get(module):
            return
        for target in sorted(graph[module]):
            visit(target, (*trail, module))
        seen[module] = 1

    for module in graph:
        visit(module, ())


def test_torch_stays_out_of_what_must_start_fast() -> None:
    free = {m for m in MODULES if any(m == p or (p != "detour" and m.startswith(p + ".")) for p in TORCH_FREE)}
    heavy = ("torch", "safetensors.torch", "diffusers", "transformers", "peft")
    wrong = [
        f"{module} imports {target} at the top"
        for module in free
        for target, top, typed in imports(MODULES[module])
        if top and not typed and target.split(".")[0] in heavy
    ]
    assert len(free) > 10
    assert not wrong, "\n".join(wrong)


def test_diffusers_and_transformers_are_imported_only_inside_functions() -> None:
    wrong = [
        f"{module} imports {target} at the top"
        for module, path in MODULES.items()
        for target, top, typed in imports(path)
        if top and not typed and target.split(".")[0] in EXTERNAL_ONLY_IN_FUNCTIONS
    ]
    assert not wrong, "\n".join(wrong)
