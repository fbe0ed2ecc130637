"""The documentation site: it builds without a warning, is whole, and asks no other host."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml

import fallow
from fallow.cli import app
from fallow.models import architectures
from fallow.models.capture import Histograms

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_every_document_is_a_page(site: Path) -> None:
    for source in (ROOT / "docs").rglob("*.md"):
        page = site / source.relative_to(ROOT / "docs").with_suffix(".html")
        assert page.exists(), f"{source} has no page"


def test_figures_are_there(site: Path) -> None:
    figures = re.findall(r'<img [^>]*src="([^"]+)"', (site / "results/tradeoff.html").read_text())
    assert len(figures) == 4
    for figure in figures:
        assert (site / "results" / figure).resolve().is_file()


def test_nothing_is_fetched_from_other_hosts(site: Path) -> None:
    fetched = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"([^\"]+)\"")
    addresses = {found for page in pages(site) for found in fetched.findall(page.read_text())}
    assert len(addresses) > 5
    for sheet in site.rglob("*.css"):
        addresses |= set(re.findall(r"url\(\"?([^)\"]+)", sheet.read_text()))
    assert [a for a in addresses if re.match(r"(https?:)?//", a)] == []


def command_names(group: Any, prefix: str = "fallow") -> list[str]:
    found = []
    for name, command in group.commands.items():
        found.append(f"{prefix} {name}")
        if hasattr(command, "commands"):
            found += command_names(command, f"{prefix} {name}")
    return found


def test_every_command_is_described(site: Path) -> None:
    text = (site / "commands.html").read_text()
    names = command_names(typer.main.get_command(app))
    assert {"fallow doctor", "fallow plan show"} <= set(names)
    for name in names:
        assert f"<code>{name}</code>" in text, name
    # Lists of commands have whole sentences.
    assert "Print what a plan is for, how it was made, and its arrays.</li>" in text


AGREES = ("yes", "no", "partly", "not tested")


def claims() -> list[list[str]]:
    """The rows of docs/claims.md, by cell; a bar inside a cell is escaped."""
    lines = (ROOT / "docs" / "claims.md").read_text().splitlines()
    cells = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in lines if line[:1] == "|"]
    return [
        [cell.strip() for cell in row] for row in cells if row[0].strip() not in ("claim", "---")
    ]


def test_every_claim_has_its_answer() -> None:
    """No cell is empty, and commands exist."""
    names = command_names(typer.main.get_command(app))
    commands = [n for n in names if not any(other.startswith(f"{n} ") for other in names)]
    rows = claims()
    assert len(rows) > 50
    for row in rows:
        assert len(row) == 6, row[0]
        assert all(len(cell) > 1 for cell in row), row
        assert row[4] in AGREES, row
        command = row[2].strip("`").split()
        if command[0] == "python":
            assert (ROOT / command[1]).exists(), row[2]
        else:
            assert any(" ".join(command[:n]) in commands for n in (2, 3)), row[2]


RESULT_LINK = re.compile(r"results/(\w+)\.md")


def missing_figures(text: str, where: str) -> list[str]:
    """Decimal numbers of a text that another does not have."""
    figures = re.findall(r"(?<![\w.])\d+\.\d+(?!\w|\.\d)", text)
    return [f for f in figures if not re.search(rf"(?<![\d.]){re.escape(f)}(?!\d)", where)]


def linked_results(text: str) -> str:
    """All pages of results that a text links to, in one."""
    names = RESULT_LINK.findall(text)
    return "".join((ROOT / "docs" / "results" / f"{name}.md").read_text() for name in names)


def test_figures_of_claims_are_on_the_pages_they_link_to() -> None:
    """On those that come next behind them. Those of the last cell too, unless the claim's own."""
    links = re.compile(r"(?:\[[^]]*\]\(results/\w+\.md\)[^\d.;]{0,25})+")
    for claim, protocol, _, result, agrees, why in claims():
        assert links.search(result + why) or agrees == "not tested", claim
        start = 0
        for group in links.finditer(result):
            text = result[start : group.start()]
            assert missing_figures(text, linked_results(group[0])) == [], (claim, group[0])
            start = group.end()
        assert missing_figures(result[start:], "") == [], claim
        assert missing_figures(why, linked_results(result + why) + claim + protocol) == [], claim


def test_figures_are_on_the_pages_of_results_that_they_cite() -> None:
    """In every paragraph, item or row with such a link; code and generated tables are left out."""
    generated = r"<!-- (\w+) -->.*?<!-- /\1 -->"
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        if path.name == "claims.md" or path.parent.name == "results":
            continue
        text = re.sub(rf"```.*?```|`[^`]+`|arXiv:\S+|{generated}", "", path.read_text(), flags=re.S)
        for paragraph in re.split(r"\n\s*\n|\n(?=[-|] )", text):
            if RESULT_LINK.search(paragraph):
                found = missing_figures(paragraph, linked_results(paragraph))
                assert found == [], (path.name, paragraph[:80])


def test_every_public_name_is_described(site: Path) -> None:
    text = (site / "python.html").read_text()
    for name in fallow.__all__:
        assert f'<h2 id="fallow.{name}"' in text, name
    assert "max_ppl_increase" in text
    assert "::: fallow" not in text


def test_every_architecture_has_its_models() -> None:
    text = (ROOT / "docs" / "how-to" / "models.md").read_text()
    for architecture in architectures():
        assert f"`{architecture.model_type}`" in text


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script of benchmarks/, whose names are not left behind."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name: str) -> Any:
        for script in ("tradeoff", "engine", "optimize", "first_screen"):
            monkeypatch.delitem(sys.modules, script, raising=False)
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    ("mark", "script"),
    [
        ("results", "tradeoff"),
        ("engine", "engine"),
        ("optimize", "optimize"),
        ("speed", "first_screen"),
    ],
)
def test_tables_of_the_readme_are_those_of_the_results(
    mark: str, script: str, benchmarks: Callable[[str], Any]
) -> None:
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"<!-- {mark} -->\n(.*)\n<!-- /{mark} -->", text, re.DOTALL)
    assert found
    assert found[1] == benchmarks(script).summary()


def test_the_first_picture_is_that_of_the_results(
    benchmarks: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = benchmarks("first_screen")
    assert script.PICTURE.read_text() == script.picture()
    for name, result, _ in script.runs():
        turns = [r["decode_tps"] for r in result["runs"]["dense"]]
        said = f"{np.median(turns):.1f}"
        assert f">{said} tok/s<" in script.picture()
        assert f"{script.MODELS[name]}: " in script.alternative()
        assert f"fallow dense {said}" in script.alternative()
    # What was not measured has no bar.
    found = script.runs()
    for _, result, _ in found:
        for key in script.SPARSE:
            result["runs"].pop(key, None)
    monkeypatch.setattr(script, "runs", lambda: found)
    assert 'class="sparse"' not in script.picture()
    assert script.picture().count(">not measured here<") == len(found) == 3


def test_figures_of_the_first_screen_are_of_one_machine() -> None:
    """Those of engine.md's section of the model on the processor that the README names."""
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:25])
    sections = (ROOT / "docs" / "results" / "engine.md").read_text().split("\n## ")
    processor = "AMD EPYC (family 25, model 17, stepping 1)"
    assert processor in screen
    rows = {"SmolLM2": "smollm2", "Gemma": "gemma3", "Qwen2.5": "qwen2.5-1.5b"}
    for name, model in rows.items():
        (row,) = re.findall(rf"^\| {name}\S+ (.*)$", screen, re.MULTILINE)
        (section,) = (s for s in sections if s.startswith(f"{model}, ") and processor in s)
        figures = re.findall(r"\d+\.\d+", row)
        assert len(figures) == 13 + ("shortlist" in row)
        for figure in figures:
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", section), (name, figure)


def test_figures_name_the_processor() -> None:
    """A virtual machine's "AMD EPYC" may be any of Zen 1 to 5."""
    unnamed = re.compile(r"AMD EPYC(?!\s+\((?:family \d+, model \d+|model\s+not\s+recorded)).*")
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert unnamed.findall(path.read_text()) == [], path


def test_benchmarks_record_family_and_model(
    benchmarks: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, cpuinfo = benchmarks("tradeoff"), tmp_path / "cpuinfo"
    core = (
        "processor\t: {}\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n"
        "model name\t: AMD EPYC\nstepping\t: 1\nflags\t\t: fpu vme\n\n"
    )
    cpuinfo.write_text(core.format(0) + core.format(1))
    assert script.processor(cpuinfo) == "AMD EPYC (family 25, model 17, stepping 1)"
    cpuinfo.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\n")
    assert script.processor(cpuinfo).endswith(" (model not recorded)")
    # A run that goes on from one whose model was not recorded, on another machine.
    path = tmp_path / "machine.json"
    old = {"cpu": "AMD EPYC", "threads": 2, "torch": "2", "commits": ["0040463"]}
    path.write_text(json.dumps(old))
    monkeypatch.setattr(script, "processor", lambda: "AMD EPYC (family 26, model 2, stepping 1)")
    script.record_machine(path)
    line = script.machine_line(json.loads(path.read_text()))
    assert line.startswith(
        "AMD EPYC (model not recorded), AMD EPYC (family 26, model 2, stepping 1), "
    )
    assert "commits 0040463, " in line


def test_magnitudes_are_counted(benchmarks: Callable[[str], Any]) -> None:
    values = np.random.default_rng(0).normal(size=(64, 256)).astype("f4")
    values[0, :16] = 0
    found = Histograms("gate_pre", 1)
    found.add(0, torch.from_numpy(values))
    below = benchmarks("magnitudes").below
    assert below(found.counts[0], 0.5) == pytest.approx((abs(values) < 0.5).mean(), abs=1e-3)
    assert below(found.counts[0], 1e-7) == 16 / values.size


def test_settings_fetch_no_fonts() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False


def test_tables_of_speed_agree(
    benchmarks: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README, engine.md and optimize.md take a processor's figures from one run."""
    optimize = benchmarks("optimize")
    engine = importlib.import_module("engine")
    folders = [tmp_path / kind / "tiny" / "amd-epyc-family-25-model-17" for kind in "et"]
    for module in (engine, optimize):
        monkeypatch.setattr(module, "OPTIMIZED", tmp_path / "e")
    monkeypatch.setattr(engine, "RESULTS", tmp_path / "t")
    monkeypatch.setattr(optimize, "TIMED", tmp_path / "t")
    where = {"processors": ["AMD EPYC (family 25, model 17)"], "threads": 2, "commits": ["abc"]}
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "machine.json").write_text(json.dumps(where))
    run = {"prefill_tps": 50.0, "bytes_per_token": 1e6, "gbps": 1.0, "overhead": 0.1}
    run |= {"sparsity": 0.0}
    run |= {f"ms_{k}": 1.0 for k in ("attention_proj", "attention", "ffn", "select", "head")}
    run |= {"ms_other": 1.0}
    speeds = {"llama.cpp": 80.0, "ik_llama.cpp": 96.0, "dense": 120.0, "shortlist": 132.0}
    speeds["plan"] = 165.0
    kl = {"mean": 0.01}
    change = {"ppl_change_percent": 0.5, "ppl_change_se": 0.1, "kl_to_dense": kl}
    missing = dict.fromkeys(("ik_llama.cpp-rtr", "openvino"), "is not installed")
    timed = {"kernels": "avx2", "file_mb": 1, "source_mb": 1, "stream_gbps": 2, "peak_rss_mb": 3}
    timed |= {"runs": {name: [run | {"decode_tps": s}] * 3 for name, s in speeds.items()}}
    for told, joules in (("plan", 1.5), ("dense", 2.25)):
        timed["runs"][told] = [r | {"joules_per_token": joules} for r in timed["runs"][told]]
    timed |= {"missing": missing, "greedy": {"agreement": 1, "same": 64}, "prompt_kl": 0.001}
    quality = {"blocks": change, "decode": change}
    timed["quality"] = dict.fromkeys(("dense", "shortlist", "plan"), quality)
    (folders[1] / "result.json").write_text(json.dumps(timed))
    chosen = {"selector": "two_stage+shortlist", "seconds": 600.0, "calibration_text": "c"}
    chosen |= {"seconds_by_stage": {"pack": 100.0}}
    read = {"ratio_to_source": 0.7, "ffn_ratio": 0.8, "ratio_to_dense": 0.75}
    found = {"optimize": chosen, "bytes": read, "decode": change}
    found["quality"] = change | {"windows": 40, "achieved_sparsity": 0.4}
    (folders[0] / "result.json").write_text(json.dumps(found))

    over_fastest, shortlist, neurons, whole = (
        f"**{ratio}** ({ratio} to {ratio})" for ratio in ("1.25", "1.10", "1.25", "1.38")
    )
    gains = f"| {over_fastest}, ik_llama.cpp | {shortlist} | {neurons} | {whole} |"
    assert gains in optimize.report()
    assert gains in optimize.summary()
    assert f"| ik_llama.cpp | **1.00** (1.00 to 1.00) | {over_fastest} |" in engine.report()
    assert f"| plan | 165.0 | {whole} |" in engine.report()
    assert "of the whole processor: dense 2.25, plan 1.5." in engine.report()
    assert f"{over_fastest}; 1.00" in engine.summary()
