"""The page of an evaluation in a browser: what is coloured, keys, widths, light and dark, and that it loads nothing.

Needs selenium, and Chromium with its driver (Debian: apt-get install chromium chromium-driver).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, data, report  # noqa: E402

FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
]
LONG = "/folder/" + 40 * "long" + ".txt"
TEXT = [
    "The first line.\n\tIndented </script> & <b>é</b> 漢字 😀\n\n" + "word " * 60 + "x" * 300 + "\n",
    "".join(f"Line {number} of the second document, where nothing happens.\n" for number in range(400)),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver or subprocess.run([chromium, "--version"], capture_output=True).returncode:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


def make_report(folder: Path, documents: list[str], tokenizer: Any) -> Path:
    """A model that was not trained, and losses that were not measured."""
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(
        num_tokens=tokenizer.num_tokens, dim=16, depth=3, heads=2, dim_head=8, block_width=16, max_seq_len=32,
        num_state_vectors=8, recurrent_layers=(2,), gate="lstm", use_compressed_mem=True,
    ).eval()  # fmt: skip
    contents = [document.encode() for document in documents]
    names = ["/folder/0.txt", LONG]
    found = [data.Document(name, lambda x=x: x, len(x), "") for name, x in zip(names, contents)]
    corpus = data.Corpus.from_tokens([tokenizer.encode(x) for x in contents], tokenizer.num_tokens)
    text = report.spell(found, tokenizer, corpus, most=2**17)
    draw, count = np.random.default_rng(0), len(text.tokens)
    carried = draw.gamma(0.6, 2, count)
    nats = {"carried": carried} | {way: carried + draw.laplace(0.05, 0.4, count) for way in report.WITHOUT}
    positions = [[0, 64, 64, 5.0, 5.1, 5.2, 5.3], [64, 128, 64, 4.0, 4.2, 4.4, 4.6], [128, "", 99, 3.0, 3.2, 3.4, 3.6]]
    report.write(folder / "report.html", "a run, valid", model, text, nats, positions, "Dependence, not worth.")
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return make_report(tmp_path_factory.mktemp("page"), TEXT, data.ByteTokenizer())


def show(driver: Any, page: Path, width: int = 1200, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    driver.get_log("performance")
    driver.get(page.as_uri())
    until(lambda: driver.find_element(By.ID, "main").get_attribute("aria-busy") == "false")


def until(holds: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def colours(driver: Any) -> list[str]:
    """Backgrounds of the visible characters."""
    return driver.execute_script(
        "return [...document.querySelectorAll('#lines span')].flatMap("
        "s => Array(s.textContent.length).fill(getComputedStyle(s).backgroundColor))"
    )


def cursor(driver: Any) -> int:
    return int(driver.find_element(By.ID, "here").get_attribute("data-byte"))


def press(driver: Any, *keys: str) -> None:
    driver.switch_to.active_element.send_keys(*keys)
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2, of 'rgb(r, g, b)'."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def requested(driver: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 800, 1600])
def test_it_fits_is_legible_and_loads_nothing(driver, page, width, scheme):
    show(driver, page, width, scheme)
    driver.execute_script("moveTo(bytes.length - 1)")  # the name of a document is shown
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    for button in range(5):
        press(driver, str(button + 1))
        pairs = driver.execute_script(
            "return [...document.querySelectorAll('#lines span:not(.mark), #scale i, .card *, .chart p, #explained')]"
            ".map(s => [getComputedStyle(s).color, getComputedStyle(s).backgroundColor])"
        )
        for ink, ground in {tuple(pair) for pair in pairs if not pair[1].startswith("rgba(0, 0, 0, 0")}:
            low, high = sorted([luminance(ink), luminance(ground)])
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)
    assert requested(driver) == [page.as_uri()]
    assert driver.get_log("browser") == []
    paper = luminance(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert paper > 0.9 if scheme == "light" else paper < 0.05


def test_the_text_is_all_there(driver, page):
    show(driver, page)
    first = driver.find_element(By.ID, "lines").get_property("textContent")
    for piece in ("0.txt", "The first line.↵", "→   Indented </script> & <b>é</b> 漢字 😀↵", "word word"):
        assert piece in first
    most = driver.execute_script("return columns") + 1  # the space or newline that ends a line
    lines = driver.find_elements(By.CSS_SELECTOR, "#lines div:not(.title)")
    assert max(len(line.get_property("textContent")) for line in lines) <= most
    driver.find_element(By.ID, "text").click()
    press(driver, Keys.CONTROL, Keys.END)
    until(lambda: "Line 399 of the second document" in driver.find_element(By.ID, "lines").get_property("textContent"))
    assert cursor(driver) == len("".join(TEXT).encode()) - 1


def test_colourings_by_mouse_and_by_key(driver, page):
    show(driver, page)
    seen = [colours(driver)]
    for choice in driver.find_elements(By.CSS_SELECTOR, "#choices label")[2:]:
        choice.click()
        seen.append(colours(driver))
    press(driver, "1")
    seen.append(colours(driver))
    assert len({tuple(one) for one in seen}) == 5
    press(driver, "2")
    assert colours(driver) == seen[0]
    assert driver.find_element(By.CSS_SELECTOR, "#choices input:checked").get_attribute("value") == "1"
    assert "states" in driver.find_element(By.ID, "explained").text
    ticks = driver.find_element(By.ID, "ticks").text.split()
    assert ticks == ["−1", "−0.25", "−0.05", "+0.05", "+0.25", "+1", "+2", "+4"]


def test_colours_are_those_of_the_numbers(driver, page):
    """Bits of each visible byte, from what the page holds, fall into the class of its colour."""
    show(driver, page)
    classes, bits = driver.execute_script(
        "const spans = [...document.querySelectorAll('#lines div:not(.title)')].slice(0, 1)[0].children;"
        "const classes = [...spans].flatMap(s => Array(s.textContent.length).fill(s.classList[0]));"
        "return [classes, classes.map((_, i) => bitsOf(1, i, i + 1))]"
    )
    edges = [-1, -0.25, -0.05, 0.05, 0.25, 1, 2, 4]
    assert classes == [f"d{int(np.searchsorted(edges, one, side='right'))}" for one in bits] and len(classes) == 16


def test_keys(driver, page):
    show(driver, page)
    for _ in range(40):
        if driver.switch_to.active_element.get_attribute("id") == "text":
            break
        driver.switch_to.active_element.send_keys(Keys.TAB)
    assert driver.switch_to.active_element.get_attribute("id") == "text"
    press(driver, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert cursor(driver) == 2 and '"e"' in driver.find_element(By.ID, "here").text
    assert '"e"' in driver.find_element(By.ID, "said").get_property("textContent")
    assert driver.find_element(By.CSS_SELECTOR, "#lines .cursor").text == "e"
    press(driver, Keys.ARROW_DOWN)
    assert cursor(driver) == 16 + 2
    press(driver, Keys.HOME)
    assert cursor(driver) == 16
    press(driver, Keys.END)
    assert cursor(driver) == TEXT[0].encode().index(b"\n", 16)
    press(driver, Keys.PAGE_DOWN, Keys.PAGE_DOWN)
    line = driver.execute_script("return [lineOf(cursor), firstLine, linesVisible()]")
    assert line[1] <= line[0] < line[1] + line[2] and line[0] > 20
    press(driver, "n")
    place = cursor(driver)
    press(driver, "n", "p")
    assert cursor(driver) == place
    press(driver, "t")
    assert driver.find_element(By.ID, "theme").text == "Theme: light"
    press(driver, "/")
    press(driver, "Line 300", Keys.ENTER)
    assert cursor(driver) == "".join(TEXT).encode().index(b"Line 300")
    chosen = driver.find_element(By.CSS_SELECTOR, "#choices input:checked")
    assert chosen.get_attribute("value") == "1"  # the digits went into the field
    assert driver.get_log("browser") == []


def test_one_character_of_several_bytes_is_one_step(driver, page):
    show(driver, page)
    at = TEXT[0].encode().index("漢".encode())
    driver.execute_script(f"moveTo({at - 1})")
    driver.find_element(By.ID, "text").send_keys(Keys.ARROW_RIGHT)
    assert cursor(driver) == at and '"漢"' in driver.find_element(By.ID, "here").text
    driver.find_element(By.ID, "text").send_keys(Keys.ARROW_RIGHT)
    assert cursor(driver) == at + 3
    driver.find_element(By.ID, "text").send_keys(Keys.ARROW_LEFT)
    assert cursor(driver) == at
    whole, *parts = (
        driver.execute_script(f"return bitsOf(0, {start}, {end})")
        for start, end in ((at, at + 3), (at, at + 1), (at + 1, at + 2), (at + 2, at + 3))
    )
    assert whole == pytest.approx(sum(parts)) and f"{whole:.2f}" in driver.find_element(By.ID, "here").text


def test_a_click_chooses_the_character(driver, page):
    show(driver, page)
    for index in (1, 5, 12):
        box = driver.execute_script(
            f"const row = document.querySelectorAll('#lines div')[1], r = document.createRange(); let n = {index};"
            "for (const s of row.children) { const l = s.textContent.length;"
            "if (n < l) { r.setStart(s.firstChild, n); r.setEnd(s.firstChild, n + 1); break; } n -= l; }"
            "const b = r.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]"
        )
        for share in (0.2, 0.8):
            point = {"x": box[0] + share * box[2], "y": box[1] + box[3] / 2, "button": "left", "clickCount": 1}
            for kind in ("mousePressed", "mouseReleased"):
                driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, **point})
            assert cursor(driver) == index


def test_charts_read_off_and_lead_to_the_text(driver, page):
    show(driver, page)
    charts = driver.find_elements(By.CSS_SELECTOR, ".chart")
    titles = [chart.find_element(By.TAG_NAME, "h3").text for chart in charts]
    assert titles == [
        "Bits per byte by position in the document", "How long states keep, layer 2", "Which states are read, layer 2",
        "How many states share the attention, layer 2", "Length of the states, layer 2",
        "Movement of the states, layer 2",
    ]  # fmt: skip
    for chart in charts:
        view, read = chart.find_element(By.CLASS_NAME, "view"), chart.find_element(By.CLASS_NAME, "read")
        assert view.get_attribute("tabindex") == "0" and len(view.get_attribute("aria-label")) > 20
        driver.execute_script("arguments[0].focus()", view)
        before = read.text
        view.send_keys(Keys.HOME)
        first = read.text
        view.send_keys(Keys.ARROW_RIGHT)
        assert first and read.text not in ("", first) and before
    charts[0].find_element(By.CLASS_NAME, "view").send_keys(Keys.HOME)
    assert "carried 5.000, state reset 5.100" in charts[0].find_element(By.CLASS_NAME, "read").text
    view = charts[4].find_element(By.CLASS_NAME, "view")
    view.send_keys(Keys.END, Keys.ENTER)
    assert cursor(driver) == driver.execute_script("return facts.columns.at(-1)") > 1000
    assert driver.switch_to.active_element.get_attribute("id") == "text"


def test_documents_and_strongest_places(driver, page):
    show(driver, page)
    names = [option.text for option in driver.find_elements(By.CSS_SELECTOR, "#documents option")]
    assert names == ["0.txt", LONG.removeprefix("/folder/")]
    driver.find_element(By.CSS_SELECTOR, "#documents option:nth-child(2)").click()
    assert cursor(driver) == len(TEXT[0].encode())
    best = driver.execute_script("return colourings[1].places[0]")
    bits = driver.execute_script("return [...colourings[1].stored].map(q => colourings[1].table[q])")
    assert best["bits"] == max(bits) == bits[best["byte"]]
    driver.find_element(By.CSS_SELECTOR, "#places button").click()
    assert cursor(driver) == driver.execute_script("return unitAt(colourings[1].places[0].byte).from")


def test_tokens_of_several_bytes_and_a_part_of_a_character(driver, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator([TEXT[1]], tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = data.FileTokenizer(tmp_path / "tokenizer.json")
    show(driver, make_report(tmp_path, ["漢 the second second document 漢"], tokenizer))
    units = driver.execute_script(
        "const found = []; for (let byte = 0; byte < bytes.length;) { const u = unitAt(byte);"
        "found.push([decoder.decode(bytes.subarray(u.from, u.to)), u.token, u.end]); byte = u.to; } return found"
    )
    assert "".join(piece for piece, _, _ in units) == "漢 the second second document 漢"
    assert units[0] == ["漢", 0, 3] and units[-1][0].endswith("漢")  # three tokens, a byte each
    assert any(len(piece) > 3 for piece, _, _ in units)
    assert [start for _, start, _ in units[1:]] == [end for _, _, end in units[:-1]]
    assert driver.get_log("browser") == []


def test_ten_megabytes_stay_usable(driver, tmp_path):
    """Only what is visible is in the page, and the last line can be reached. No time is tested."""
    content = b"A line of the text, which is long.\n" * (10**7 // 35)
    count = len(content)
    draw = np.random.default_rng(0)
    text = report.Text(content, np.arange(count + 1), [("long.txt", 0)], np.zeros(count, np.int64))
    coloured = [
        report.Colouring("surprise", "", draw.gamma(0.6, 3, count)),
        report.Colouring("states", "the states", draw.laplace(0.05, 0.3, count)),
    ]
    made = report.make_page("long", "", "", 512, text, coloured, [], [], {}, {})
    (tmp_path / "long.html").write_text(made, encoding="utf-8")
    show(driver, tmp_path / "long.html")
    assert driver.execute_script("return numLines") == count // 35
    assert driver.execute_script("return document.querySelectorAll('*').length") < 3000
    driver.execute_script("pane.scrollTop = pane.scrollHeight")
    until(lambda: driver.execute_script("return firstLine + linesVisible() === numLines"))
    driver.find_element(By.ID, "text").send_keys(Keys.CONTROL, Keys.HOME)
    until(lambda: driver.execute_script("return firstLine === 0 && pane.scrollTop === 0"))
    press(driver, "1")
    assert len(set(colours(driver))) > 5 and driver.get_log("browser") == []
