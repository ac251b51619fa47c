"""The documentation site: no warnings, links lead somewhere, its tutorials run in an empty folder."""

import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "html", "-d", folder / "trees"]
    done = subprocess.run([*command, ROOT / "docs", folder / "html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_links_and_anchors_lead_somewhere(site):
    pages = {page.resolve(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    ids = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    checked = 0
    for page, text in pages.items():
        for link in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text):
            path, _, anchor = unquote(unescape(link)).partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), (page.name, link)
            assert not anchor or target not in ids or anchor in ids[target], (page.name, link)
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    """Python in one go of names, commands by the modules behind them, so that nothing needs to be installed."""
    text = page.read_text(encoding="utf-8")
    if "transformers import" in text:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names: dict = {"__name__": page.stem}
    code = re.findall(r"^```(python|sh)\n(.*?)^```", text, flags=re.S | re.M)
    assert code
    for language, block in code:
        if language == "python":
            exec(compile(block, str(page), "exec"), names)
            continue
        command = re.sub(r"^brt-(\w+)", rf"{sys.executable} -m block_recurrent_transformer_pytorch.commands.\1", block)
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
