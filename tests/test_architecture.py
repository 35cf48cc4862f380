"""What holds for the code as a whole: the order of imports, the catalog, and that no setting is without effect."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import sd_erase
from sd_erase import catalog
from sd_erase.cli import main
from sd_erase.config import RunConfig
from sd_erase.flags import FLAGS

PACKAGE = Path(sd_erase.__file__).parent
FOUNDATION = {
    "errors",
    "terminal",
    "forms",
    "jsonfile",
    "quiet",
    "yamlfile",
    "markdown",
    "headers",
    "formats",
    "fingerprints",
    "checkpoint",
    "fitting",
    "parallel",
    "sharding",
    "folders",
    "interrupts",
    "rundir",
    "config",
    "schema",
    "catalog",
    "clients",
    "concepts",
    "mismatch",
    "hosts",
    "weights",
    "hub",
    "modelfiles",
    "onefile",
    "bases",
    "components",
    "denoiser",
    "lora",
    "digests",
    "chain",
    "drawing",
    "progress",
    "resources",
    "provenance",
    "pocket",
    "prompts",
}
# a stage may import itself and what stands before it; stages of one row do not know each other
ORDER = [
    {"blip"}, {"clip"}, {"captions"}, {"pairs"}, {"asked"}, {"erasure"}, {"pipeline"}, {"images"}, {"detection"}, {"metrics"}, {"judging"}, {"evaluation"},
    {"report", "export", "attacks", "probes"}, {"auditing"}, {"preflight"}, {"stages"}, {"runs"}, {"comparison_recipe", "comparison_table"}, {"api"}, {"comfyui", "demo", "comparison", "reproduce"}, {"flags"}, {"listing"}, {"doctor", "template"}, {"commands"}, {"launch"}, {"cli"}, {"__main__"},
]  # fmt: skip
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "ultralytics", "PIL", "matplotlib", "pandas", "numpy", "accelerate"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The stage or foundation module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, inside functions too."""
    package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_stage_imports_only_what_stands_before_it(path: Path) -> None:
    own = part_of(path)
    if own == "__init__":
        return
    assert own in RANK or own in FOUNDATION, f"{own} has no place in the order of stages"
    parts = {
        name.split(".")[1] for name in imports(ast.parse(path.read_text(encoding="utf-8")), path) if name.startswith("sd_erase.")
    }
    others = {part for part in parts if part in RANK and part != own}
    if own == "pocket":  # the builder stands beside the stages and may measure its model with them
        return
    if own in FOUNDATION:
        assert not others, f"foundation must not import {others}"
    allowed = {part for part in others if RANK[part] < RANK[own]}
    assert others == allowed, f"{own} imports {others - allowed}, which come later"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    names = {name.split(".")[0] for name in imports(top, path)}
    eager = part_of(path) in {
        *FOUNDATION,
        "__init__",
        "cli",
        "flags",
        "demo",
        "stages",
        "runs",
        "commands",
        "listing",
        "doctor",
        "template",
        "__main__",
    }
    if eager and part_of(path) not in {"pocket", "fitting", "sharding"}:  # which only a training and the pocket's builder import
        assert not names & HEAVY


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unpickles_loads_leniently_or_prints_past_the_terminals_guard(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"torch.load", "pickle.load", "pickle.loads", "eval", "exec"}
            if part_of(path) != "pocket":  # whose builder reads its own files
                assert not name.endswith(("safe_open", "load_file")) or path.name == "formats.py", (
                    "formats.read_tensors is the one way"
                )
            if path.name != "terminal.py" and part_of(path) != "pocket":
                assert name not in {"click.echo", "print", "sys.stdout.write", "sys.stderr.write"}, "terminal.echo is the one way"
            if part_of(path) not in {"yamlfile", "pocket"}:
                assert name not in {"yaml.load", "yaml.safe_load", "yaml.load_all", "yaml.full_load"}, (
                    "yamlfile.read is the one way"
                )
            lenient = [key for key in node.keywords if key.arg == "strict" and getattr(key.value, "value", None) is False]
            assert not (lenient and name.endswith("load_state_dict"))


@pytest.mark.parametrize(
    "row",
    [
        *catalog.METHODS.items(),
        *catalog.READERS.items(),
        *catalog.DETECTORS.items(),
        *catalog.EXPORTS.items(),
        *catalog.EXPERIMENTS.items(),
        *catalog.PROBES.items(),
    ],
)
def test_every_row_of_the_catalog_resolves(row: tuple[str, str]) -> None:
    name, target = row
    assert callable(catalog.resolve({name: target}, name, "Row"))


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    heavy = sorted(HEAVY | {"yaml", "rich", "jinja2", "sd_erase.concepts", "sd_erase.metrics"})
    code = (
        "import sys; from sd_erase.cli import main; main(['--help'], standalone_mode=False); "
        f"sys.exit(', '.join(set({heavy}) & set(sys.modules)) or 0)"
    )
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0, result.stderr
        assert "sd-erase demo" in result.stdout
    # processor time, 0.15 s on two busy cores of a server: the room is for slower ones, and no heavy package fits into it
    assert min(times) < 0.4


def all_settings() -> dict[str, set[str]]:
    """Dotted name of every setting -> names that it is read by."""
    found = {}
    for field in dataclasses.fields(RunConfig):
        default = getattr(RunConfig(), field.name)
        if dataclasses.is_dataclass(default):
            found |= {f"{field.name}.{inner.name}": {inner.name} for inner in dataclasses.fields(default)}
        else:
            found[field.name] = {field.name}
    return found


def test_every_setting_has_a_flag_with_help() -> None:
    assert set(FLAGS) == set(all_settings())
    offered = {parameter.name.replace("__", ".") for command in main.commands.values() for parameter in command.params}
    assert set(all_settings()) <= offered
    assert all(flag.help.endswith(".") for flag in FLAGS.values())


@pytest.mark.parametrize("dotted", all_settings())
def test_every_setting_is_read_by_a_stage(dotted: str) -> None:
    assert any({*dotted.split(".")} <= attributes for attributes in read_attributes().values()), (
        f"no stage reads {dotted}: a setting that does nothing is worse than none"
    )


@functools.cache
def read_attributes() -> dict[str, set[str]]:
    """The attributes that each part's files read; passing a setting on or showing it has no effect."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        if part_of(path) not in {"config", "flags", "preflight", "cli", "report"}:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            found.setdefault(part_of(path), set()).update(node.attr for node in nodes if isinstance(node, ast.Attribute))
    return found
