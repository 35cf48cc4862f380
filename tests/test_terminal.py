"""What stands in files from strangers is text wherever it is shown: terminal, progress, JSON, Markdown, the page."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import finish_images, made_as_it_is
from PIL import Image
from safetensors.torch import save_file

from sd_erase import cli, markdown, terminal
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.metrics.tables import render_markdown, render_table
from sd_erase.progress import RichProgress
from sd_erase.report import build_report
from sd_erase.rundir import RunDir, read_json, read_jsonl, write_json_atomic, write_jsonl_atomic

ACTING = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\x00\u202egnp.exe\u2066\u2028\u200b\ud800\x7f"
HOSTILE = f"{ACTING}[red]x[/red] :bike: \"><script>alert(1)</script><img src=x onerror=alert(1)> ' | `rm` {{{{ 7 * 7 }}}} ${{y}}"
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\u200b\ud800-\udfff]")


def test_control_characters_are_written_out_and_words_of_all_languages_stay() -> None:
    assert terminal.one_line("a\x1b[31m\n\u202eb\tc") == "a\\x1b[31m\\n\\u202eb\\tc"
    assert terminal.printable("a\nb\tc") == "a\nb\tc"
    assert not RAW.search(terminal.one_line(HOSTILE)) and not RAW.search(terminal.printable(HOSTILE))
    for words in ("ünï 自転車\u3000 велосипед", "👨\u200d👩\u200d👧", "می\u200cخواهم", "क्\u200dष", "a\u00a0b"):
        assert terminal.one_line(words) == words
    assert terminal.one_line("x" * 50_000).endswith("(50000 characters)")


def test_json_on_the_terminal_is_escaped_and_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.echo_json({HOSTILE: [HOSTILE, "ünï\n"]})
    shown = capsys.readouterr().out
    assert not RAW.search(shown) and "ünï" in shown and shown.count("\n") == 1
    assert json.loads(shown) == {HOSTILE: [HOSTILE, "ünï\n"]}


def test_to_rich_every_string_is_text() -> None:
    from rich.table import Table

    stream = io.StringIO()
    console = terminal.console(file=stream, width=200, force_terminal=False)
    table = Table("name", title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    console.print(HOSTILE)
    assert "[red]x[/red] :bike:" in stream.getvalue() and not RAW.search(stream.getvalue())


def test_the_progress_bar_shows_markup_as_text() -> None:
    stream = io.StringIO()
    console = terminal.console(file=stream, width=400, force_terminal=False)
    with RichProgress(console)(f"training ({HOSTILE})", 2) as task:
        task.advance(2)
    assert "[red]x[/red]" in stream.getvalue() and not RAW.search(stream.getvalue())


@pytest.mark.parametrize("what", ["sentence", "bug", "flag", "warning"])
def test_no_command_passes_them_on(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def inspect(path: Path, progress: Any = None) -> dict[str, Any]:
        if what == "warning":
            cli.warn({"warnings": [HOSTILE]})
        raise UserError(HOSTILE)

    monkeypatch.setattr("sd_erase.export.metadata.inspect_file", inspect)
    result = CliRunner().invoke(cli.main, ["inspect", *(["--no" + ACTING] if what == "flag" else []), "x"])
    assert result.exit_code == 2 and not RAW.search(result.output)
    shown = [line for line in result.output.splitlines() if line.startswith(("Error", "Warning"))]
    assert len(shown) == 1 + (what == "warning")


def test_a_traceback_is_escaped() -> None:
    code = "import sys; from sd_erase.cli import main\nmain.callback = lambda: 1 / 0\ntry: main(['--version'])\nexcept SystemExit: raise ValueError('\\x1b[2J')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: \\x1b[2J" in result.stderr and "\x1b" not in result.stderr


def test_inspect_shows_a_strangers_metadata_as_text(tmp_path: Path) -> None:
    path = tmp_path / "[red]lora.safetensors"
    long = "x" * 300_000
    names = {"lora_unet_[red]a.lora_up.weight": torch.ones(1, 1), "lora_unet_[red]a.lora_down.weight": torch.ones(1, 1)}
    hostile = HOSTILE.replace("\ud800", "")
    save_file(names, path, {"title\x1b": hostile, "line\nproblems: none": "1", "long": long, "sd_erase.concept": hostile})
    for arguments in ([str(path)], [str(path), "--json"]):
        result = CliRunner().invoke(cli.main, ["inspect", *arguments])
        assert result.exit_code == 0, result.output
        assert not RAW.search(result.output) and "[red]x[/red]" in result.output
        assert "\nproblems: none" not in result.output


def test_a_tensors_name_of_control_characters_is_refused(tmp_path: Path) -> None:
    save_file({"text_model.\x1b[2J.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    result = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "x.safetensors")])
    assert result.exit_code == 2 and "control characters" in result.output and not RAW.search(result.output)


def test_markdown_cells_stay_cells() -> None:
    lines = markdown.table(["a", "b"], [[HOSTILE, "c|d"], ["[x](javascript:1)", "`e`\n| f |"]])
    assert len(lines) == 4
    for line in lines[2:]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 3 and not re.search(r"(?<!\\)[`<]", line) and not RAW.search(line)
    assert "](" not in lines[3].replace("\\](", "")
    assert markdown.text("0.0 % [0–3]") == "0.0 % [0–3]" and markdown.sentence("run `sd-erase report`") == "run `sd-erase report`"


class Page(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes


def poisoned(run: RunDir) -> None:
    """Every text in the run's files that a stranger may have written."""
    hostile = HOSTILE.replace("\ud800", "")  # no file in UTF-8 holds a lone surrogate
    rows = [{**row, "prompt": f"{row['prompt']} {hostile}"} for row in read_jsonl(run.images / "index.jsonl")]
    for number, row in enumerate(rows):
        name = f'erased/"><svg onload=alert(1)>{number}.png'
        Image.new("RGB", (8, 8)).save(run.images / name)
        row["erased"] = name
    write_jsonl_atomic(run.images / "index.jsonl", rows)
    finish_images(run)
    (concept,) = read_json(run.concepts)
    write_json_atomic(run.concepts, [{**concept, "name": hostile}])
    result = read_json(run.report / "evaluation.json")
    result["warnings"] = [hostile]
    result["detector"] |= {"name": hostile, "weights": hostile}
    for row in result["rows"]:
        row["name"] = hostile
    result["per_prompt"] = [{"prompt": hostile, "images": 1, "targets": {hostile: {"original": 1}}, "others": {}}]
    write_json_atomic(run.report / "evaluation.json", result)
    write_json_atomic(run.manifest("evaluate"), {**read_json(run.manifest("evaluate")), "warnings": [hostile]})
    train = read_json(run.manifest("train"))
    write_json_atomic(run.manifest("train"), {**train, "anchor": {"bicycle": hostile}, "objective": hostile})
    write_json_atomic(run.run, {"versions": {hostile: hostile}, "hardware": {"system": hostile}})
    for stage in ("harvest", "train", "generate", "evaluate"):
        made_as_it_is(run, stage)  # a stranger's manifests fit what the stranger wrote


def test_the_page_runs_no_script_and_breaks_no_attribute(settings: RunConfig, evaluated: RunDir) -> None:
    build_report(settings, evaluated)
    clean = Page((evaluated.report / "report.html").read_text(encoding="utf-8"))
    poisoned(evaluated)
    build_report(settings, evaluated)
    text = (evaluated.report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "[red]x[/red]" in text and "{{ 7 * 7 }}" in text and not RAW.search(text)
    assert set(page.tags) <= {*clean.tags, "p"} and page.tags.count("img") == clean.tags.count("img")
    assert {name for name, _ in page.attributes} <= {name for name, _ in clean.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_the_tables_of_an_evaluation_are_text(evaluated: RunDir) -> None:
    poisoned(evaluated)
    result = read_json(evaluated.report / "evaluation.json")
    written = render_markdown(result)
    assert not RAW.search(written) and not re.search(r"(?<!\\)<(script|img)", written)
    tables = [line for line in written.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {4, 5, 8, 9}
    shown = cli.as_text(render_table(result))
    assert not RAW.search(shown) and "[red]" in shown.replace("\n", "").replace(" ", "")
