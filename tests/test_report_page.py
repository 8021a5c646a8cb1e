"""`flexdistill report`: a page that holds everything, tells the metrics' numbers, and fits a phone and the dark."""

import functools
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from flexdistill import positions, report_figures, report_page
from flexdistill.errors import FlexdistillError
from flexdistill.pipeline import convert
from flexdistill.recipe import EvaluationRecipe, Recipe
from flexdistill.report_page import Text, write_report
from tests import tiny

# the browser of the environment, else the first that is on the path
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# elements that have no end
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """The words, elements and attributes of a page, whose elements must be closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.ids, self.words, self._open = [], [], [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder with a converted model, the model it came from, and a text."""
    folder = tmp_path_factory.mktemp("report")
    tiny.save_tiny(folder / "gpt2", tiny.tiny_gpt2(), tiny.tiny_tokenizer())
    (folder / "notes.txt").write_text("The village had slept badly, and so had we. " * 200)
    settings = {
        "model": str(folder / "gpt2"),
        "kernel.window": 4,
        "data.source": str(folder / "notes.txt"),
        "data.sequence_length": 32,
        "evaluation.sequences": 2,
    }
    for stage in ("attention_transfer", "logit_distillation"):
        settings |= {f"{stage}.steps": 3, f"{stage}.batch_size": 2}
    convert(Recipe().override(settings), folder / "out")
    return folder


@pytest.fixture(scope="module")
def page(converted) -> str:
    """The page with everything."""
    return write_report(converted / "out", converted / "whole.html", text=text_of(converted)).read_text(
        encoding="utf-8"
    )


def text_of(folder: Path, **settings) -> Text:
    return Text(EvaluationRecipe(source=str(folder / "notes.txt"), sequence_length=40, sequences=2), **settings)


def headings(text: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", text)


def test_sections_and_numbers(converted, page):
    metrics = json.loads((converted / "out" / "metrics.json").read_text())
    assert headings(page) == [
        "Teacher, student and ablations",
        "Attention per layer",
        "Training",
        "Frequencies",
        "Memory",
        "Attention maps",
        "Perplexity by position",
    ]
    text = Page(page).text
    for row in metrics["rows"]:
        assert row["name"] in text and f"{row['perplexity']:.4g}" in text
    assert {row["name"] for row in metrics["rows"]} >= {"kernel only", "window only", "no attention"}
    assert "Attention transfer, 3 steps." in text and "Logit distillation, 3 steps." in text
    for layer in (0, 1):
        for head in (0, 3):
            assert f"h.{layer}.attn, head {head}" in text


def test_nothing_comes_from_elsewhere(page):
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    references = [value for _, name, value in parsed.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert references and all(value.startswith(("#", "data:image/png;base64,")) for value in references)
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_names_inside_figures_are_unique_and_found(page):
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    used = re.findall(r'(?:url\(|href=")#([^")]+)', page)
    assert used and set(used) <= set(parsed.ids)


def test_ink_is_the_pages(page):
    assert report_figures._INK not in page and page.count("currentColor") > 50
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    figures = [value for tag, name, value in Page(page).attributes if tag == "svg" and name == "aria-label"]
    assert len(figures) == page.count("<figure>") and all(figures)


def test_without_text(converted, tmp_path):
    shown = headings(write_report(converted / "out", tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Memory" in shown and "Attention maps" not in shown


def test_chosen_layers_and_heads(converted, tmp_path):
    text = text_of(converted, layers=[1], heads=[2, 1])
    page = write_report(converted / "out", tmp_path / "page.html", text=text).read_text(encoding="utf-8")
    assert re.findall(r"<figcaption>(h\..*?)</figcaption>", page) == ["h.1.attn, head 2", "h.1.attn, head 1"]


def test_maps_are_those_of_teacher_and_student(converted, tmp_path, monkeypatch):
    """What is drawn are rows of softmax and of the kernel, which see no later key."""
    drawn = []
    monkeypatch.setattr(report_page, "maps", lambda weights: drawn.append(weights) or "<svg></svg>")
    write_report(converted / "out", tmp_path / "page.html", text=text_of(converted))
    assert len(drawn) == 4
    for weights in drawn:
        for name in ("teacher", "student"):
            torch.testing.assert_close(weights[name].sum(-1), torch.ones(40), rtol=1e-4, atol=1e-4)
            assert not weights[name].triu(1).any()
        assert not torch.equal(weights["teacher"], weights["student"])


def test_perplexity_spans_cover_every_token_once(converted, tmp_path, monkeypatch):
    drawn, real = {}, report_page.lines

    def lines(series, **settings):
        drawn[settings["y_label"]] = series
        return real(series, **settings)

    losses = torch.arange(39.0).repeat(2, 1) / 10
    monkeypatch.setattr(report_page, "lines", lines)
    monkeypatch.setattr(positions, "token_losses", lambda model, batch, *settings: losses[: len(batch)])
    write_report(converted / "out", tmp_path / "page.html", text=text_of(converted))
    starts, values = drawn["perplexity"]["teacher"]
    assert starts == [1, 2, 4, 8, 16, 32]
    # tokens with 4 to 7 before them have the losses 0.3 to 0.6, those with 32 to 39 the losses 3.1 to 3.8
    expected = torch.tensor([0.0, 0.15, 0.45, 1.05, 2.25, 3.45]).exp()
    torch.testing.assert_close(torch.tensor(values), expected)


def test_kernel_without_frequencies_or_decay(converted, tmp_path):
    settings = {"model": str(converted / "gpt2"), "kernel.variant": "rfa", "data.source": str(converted / "notes.txt")}
    settings |= {"data.sequence_length": 32, "evaluation.sequences": 2, "logit_distillation.steps": 0}
    settings |= {"attention_transfer.steps": 1, "attention_transfer.batch_size": 1}
    convert(Recipe().override(settings), tmp_path / "out")
    page = write_report(tmp_path / "out", tmp_path / "page.html", text=text_of(converted)).read_text(encoding="utf-8")
    assert "no learned frequencies" in page and "Memory" not in headings(page) and "Attention maps" in headings(page)


def test_names_are_escaped(converted, tmp_path):
    folder = shutil.copytree(converted / "out", tmp_path / "out")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["model"] = "<script>alert('x')</script> & co"
    (folder / "metrics.json").write_text(json.dumps(metrics))
    page = write_report(folder, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    Page(page)


def test_gaps_in_a_log(converted, tmp_path):
    """A step of fp16 that overflowed has no finite loss part."""
    folder = shutil.copytree(converted / "out", tmp_path / "out")
    log = folder / "logit_distillation.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 4, "loss": None}) + "\n")
    assert "4 steps" in write_report(folder, tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "metrics.json").unlink(), "flexdistill convert"),
        (lambda folder: (folder / "metrics.json").write_text("{}"), "it lacks attention_kl"),
        (lambda folder: (folder / "metrics.json").write_text("[" * 3), "metrics.json"),
        (lambda folder: (folder / "logit_distillation.jsonl").write_text('{"step": 1'), "no training log"),
        (lambda folder: (folder / "logit_distillation.jsonl").write_text('{"step": 1}\n'), "no training log"),
        (lambda folder: (folder / "config.json").unlink(), "not a converted checkpoint"),
    ],
)
def test_damaged_folder(converted, tmp_path, run, change, words):
    folder = shutil.copytree(converted / "out", tmp_path / "out")
    change(folder)
    result = run("report", str(folder))
    assert result.code == 2 and words in result.err and result.err.count("\n") == 1
    assert not Path("report.html").exists()


def test_bad_choices(converted, tmp_path):
    for settings, words in (({"layers": [2]}, "--layers names 2"), ({"heads": [-1]}, "--heads names -1")):
        with pytest.raises(FlexdistillError, match=words):
            write_report(converted / "out", tmp_path / "page.html", text=text_of(converted, **settings))
    with pytest.raises(FlexdistillError, match="is a folder; name a file"):
        write_report(converted / "out", tmp_path, overwrite=True)
    tiny.save_tiny(tmp_path / "llama", tiny.tiny_llama(), tiny.tiny_tokenizer())
    with pytest.raises(FlexdistillError, match="--teacher"):
        write_report(
            converted / "out", tmp_path / "page.html", text=text_of(converted, teacher=str(tmp_path / "llama"))
        )
    assert not (tmp_path / "page.html").exists()


def test_command(converted, run):
    out = str(converted / "out")
    result = run("report", out)
    assert (result.code, result.out) == (0, "report.html\n")
    again = run("report", out)
    assert again.code == 2 and "--overwrite" in again.err
    data = ("--data", str(converted / "notes.txt"), "--sequence-length", "40", "--heads", "0")
    assert run("report", out, "--overwrite", *data).code == 0
    assert "Attention maps" in Path("report.html").read_text(encoding="utf-8")
    assert "--heads is for --data" in re.sub(r"\s+", " ", run("report", out, "--heads", "0").err)
    assert "nowhere does not exist" in run("report", out, "--output", "nowhere/report.html").err


def test_matplotlib_is_missing(converted, run, monkeypatch):
    monkeypatch.setattr(report_page, "has_matplotlib", lambda: False)
    result = run("report", str(converted / "out"))
    assert result.code == 2 and "install the extra [report]" in result.err and result.err.count("\n") == 1


def chromium(*arguments: str, home: Path) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    environment = os.environ | {"HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    return done.stdout


# of a page in a frame: what its parts take up, in pixels of the frame, and which of them lie over one another
MEASURE = """<script>addEventListener('load', () => {
  const box = x => { const r = x.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] };
  const all = query => [...document.querySelectorAll(query)];
  const both = (a, b, low) => Math.min(a[low + 2], b[low + 2]) - Math.max(a[low], b[low]) > 1;
  const over = (a, b) => both(a, b, 0) && both(a, b, 1);
  const overlapping = parts => parts.flatMap((one, n) =>
    parts.slice(n + 1).filter(other => over(box(one), box(other))).map(other => [one.textContent, other.textContent]));
  const root = document.documentElement, wide = document.querySelector('.wide');
  parent.postMessage(JSON.stringify({
    sideways: [root.scrollWidth - innerWidth, wide.scrollWidth - wide.clientWidth],
    height: root.scrollHeight,
    overlaps: [...overlapping(all('h1, h2, p, table, figure svg, figcaption, footer')),
      ...overlapping(all('td, th')), ...all('figure svg').flatMap(x => overlapping([...x.querySelectorAll('text')]))],
    figures: all('figure svg').map(box), headings: all('h2').map(box), tables: all('table').map(box),
  }), '*') })</script></body>"""


@pytest.fixture(scope="module")
def framed(page, tmp_path_factory):
    """Gives a page that shows the report in a frame of some width, which a window of a phone's width cannot, and its
    measurements."""
    folder = tmp_path_factory.mktemp("framed")
    without_policy = re.sub('<meta http-equiv="Content-Security-Policy".*?">', "", page)
    (folder / "page.html").write_text(without_policy.replace("</body>", MEASURE), encoding="utf-8")

    @functools.cache
    def frame(width, height=900):
        file = folder / f"{width}-{height}.html"
        style = f"border: 0; width: {width}px; height: {height}px"
        listen = "<script>onmessage = event => document.title = event.data</script>"
        file.write_text(
            f"<title></title><body style='margin: 0'>{listen}<iframe src=page.html style='{style}'></iframe>",
            encoding="utf-8",
        )
        dump = chromium("--dump-dom", "--virtual-time-budget=5000", f"file://{file}", home=folder)
        return file, json.loads(html.unescape(re.search("<title>(.*?)</title>", dump)[1]))

    return frame


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_fits_the_screen(framed, width):
    _, found = framed(width)
    assert found["sideways"] == [0, 0] and found["overlaps"] == []
    assert len(found["figures"]) >= 10 and min(right - left for left, _, right, _ in found["figures"]) > 250


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_blank(framed, tmp_path, width, scheme):
    """In a screenshot of the whole page, everything has ink that stands out from its paper."""
    from matplotlib.image import imread

    height = framed(width)[1]["height"]
    file, found = framed(width, height)
    options = ["--force-dark-mode"] if scheme == "dark" else []
    options += [f"--window-size={max(width, 500)},{height}", f"--screenshot={tmp_path}/shot.png"]
    chromium(*options, f"file://{file}", home=tmp_path)
    shot = imread(tmp_path / "shot.png")[:height, :width, :3].mean(-1)
    paper = shot[2, 2]
    assert paper > 0.9 if scheme == "light" else paper < 0.2
    for part, least_contrast in {"figures": 0.4, "headings": 0.6, "tables": 0.6}.items():
        for left, top, right, bottom in found[part]:
            inside = shot[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
            assert inside.max() - inside.min() > least_contrast, (part, left, top)
            assert abs(inside - paper).max() > least_contrast, (part, left, top)
