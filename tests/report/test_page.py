"""The page: what it shows of whom, that it is whole, and that a browser finds every picture."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import reference
from PIL import Image

from pose2id import Centralizer, evaluate
from pose2id.report import compare, page
from pose2id.retrieval import protocols

pytest.importorskip("sklearn", reason="needs scikit-learn")
PEOPLE = 12


@pytest.fixture
def material(rng, tmp_path):
    centres = rng.standard_normal((PEOPLE, 12))
    q_pids, g_pids = np.repeat(np.arange(1, PEOPLE + 1), 2), np.repeat(np.arange(1, PEOPLE + 1), 4)
    labels = [q_pids, g_pids, np.tile([1, 2], PEOPLE), np.tile([1, 2, 3, 3], PEOPLE)]
    features = [(centres[x - 1] + 0.9 * rng.standard_normal((len(x), 12))).astype(np.float32) for x in labels[:2]]
    paths = []
    for side, pids in zip("qg", labels[:2], strict=True):
        paths.append([tmp_path / f"{side}{i}.png" for i in range(len(pids))])
        for i, path in enumerate(paths[-1]):
            size = (30, 50) if i % 2 else (80, 40)
            Image.new("RGB", size, tuple(int(x) for x in rng.integers(0, 256, 3))).save(path)
    return features, labels, paths


def written(material, folder, **options):
    features, labels, paths = material
    rows = compare(features, labels)
    after = Centralizer(method="nfc", k1=2).enhance(*features)
    given = {"query_paths": paths[0], "gallery_paths": paths[1], "names": ("as they are", "nfc"), **options}
    index = page.write_page(folder, rows, before=features, after=after, labels=labels, **given)
    return index.read_text(encoding="utf-8"), after


class Reader(HTMLParser):
    """Tags, their attributes, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta", "br", "line", "rect", "circle", "polygon", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "rect", "circle", "polygon", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.filterwarnings("ignore:method='nfc' may harm")
def test_every_picture_is_there_and_nothing_comes_from_elsewhere(material, tmp_path):
    sheets = [(material[2][0][i], material[2][1][:3]) for i in range(2)]
    curves = {"mAP by M": {"IPG of both": ([0, 1, 2], [0.2, 0.5, 0.6]), "IPG of <one>": ([0, 1, 2], [0.2, 0.3, 0.1])}}
    text, _ = written(material, tmp_path / "page", sheets=sheets, curves=curves)
    reader = Reader(text)
    assert reader.open == []
    pictures = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(pictures) > 50
    for attributes in pictures:
        with Image.open(tmp_path / "page" / attributes["src"]) as picture:
            assert picture.size == (64, 128)
        assert attributes["alt"]
    used = {attributes["src"] for attributes in pictures}
    assert {f"images/{path.name}" for path in (tmp_path / "page" / "images").iterdir()} == used
    assert not re.search(r"https?:|//|url\(|<script|@import", text)
    assert text.count("<svg") == 1 + 2 + 2 + 1
    assert "IPG of &lt;one&gt;" in text
    headings = [tag for tag, _ in reader.tags if tag in ("h1", "h2", "h3")]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


@pytest.mark.filterwarnings("ignore:method='nfc' may harm")
def test_the_queries_that_were_helped_and_harmed(material, tmp_path):
    features, labels, _ = material
    text, after = written(material, tmp_path / "page")
    gain = evaluate(*after, *labels).average_precision - evaluate(*features, *labels).average_precision
    up, same, down = int((gain > 1e-9).sum()), int((abs(gain) <= 1e-9).sum()), int((gain < -1e-9).sum())
    assert down > 0
    expected = f"Of {up + same + down} queries, nfc helped {up}, left {same} as they were and harmed {down}."
    assert expected in text
    sections = re.split(r"<h3>", text)
    asked = {
        section.partition("</h3>")[0]: [int(i) for i in re.findall(r'alt="query (\d+):', section)][::2]
        for section in sections
        if "query" in section
    }
    order = np.argsort(gain, kind="stable")
    assert asked["Most harmed"] == [i for i in order[:4] if gain[i] < 0]
    assert asked["Most helped"] == [i for i in order[::-1][:4] if gain[i] > 0]
    assert not set(asked["At random"]) & {*asked["Most harmed"], *asked["Most helped"]}
    assert len(asked["At random"]) == 4


@pytest.mark.filterwarnings("ignore:method='nfc' may harm")
def test_lists_are_the_ranking_with_what_is_dropped_in_grey(material, tmp_path):
    (q, g), labels, _ = material
    text, _ = written(material, tmp_path / "page")
    x, y = reference.unit(q), reference.unit(g)
    distances = np.sqrt(((x[:, None] - y[None]) ** 2).sum(2))
    card = re.compile(r'<figure class="(\w+)">.*?(?:query|gallery image) (\d+):.*?<figcaption>(.*?)</figcaption>')
    checked = 0
    for shown in re.findall(r'<div class="list">(.*?)</div>', text, re.DOTALL)[::2]:
        (_, query, _), *cards = card.findall(shown)
        query = int(query)
        expected, counted, grey = [], 0, 0
        for i in np.argsort(distances[query], kind="stable"):
            same = labels[1][i] == labels[0][query]
            junk = same and labels[3][i] == labels[2][query]
            if counted == 8:
                break
            counted, grey = counted + (not junk), grey + junk
            if not junk or grey <= 2:
                state = "junk" if junk else "right" if same else "wrong"
                sign = {"junk": "~ ", "right": "✓ ", "wrong": "✗ "}[state]
                expected.append((state, str(i), f"{sign}{distances[query, i]:.3f}"))
        assert cards == expected
        checked += len(cards)
    assert checked > 50


@pytest.mark.filterwarnings("ignore:method='nfc' may harm")
def test_figures_gains_and_losses(material, tmp_path):
    features, labels, _ = material
    text, _ = written(material, tmp_path / "page")
    rows = compare(features, labels)
    for row in rows[1:]:
        gain = round(100 * row.result.mAP, 2) - round(100 * rows[0].result.mAP, 2)
        kind = "gain" if gain > 1e-9 else "loss" if gain < -1e-9 else "even"
        assert re.search(rf'{100 * row.result.mAP:.2f} <small class="{kind}">\{gain:+.2f}</small>', text)
    worse = [row.name for row in rows[1:] if row.result.rank1 < rows[0].result.rank1]
    if worse:
        assert f"Rows with a lower Rank-1 than the features as they are: {', '.join(worse)}." in text


@pytest.mark.filterwarnings("ignore:method='nfc' may harm")
def test_text_from_data_is_escaped(material, tmp_path):
    features, labels, _ = material
    words = np.array([f"<b>{i}" for i in range(PEOPLE + 1)])
    text, _ = written(
        (features, [words[labels[0]], words[labels[1]], *labels[2:]], (None, None)),
        tmp_path / "page",
        query_paths=None,
        gallery_paths=None,
        title="<script>alert(1)</script>",
        facts=["a & b", "1 < 2"],
    )
    assert "<script" not in text
    assert "<b>1" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "a &amp; b" in text
    assert "identity &lt;b&gt;1" in text
    assert "<img" not in text
    assert list((tmp_path / "page" / "images").iterdir()) == []


@pytest.mark.filterwarnings("ignore:method='nfc' may harm")
def test_of_several_trials_the_first_is_shown(material, tmp_path):
    features, labels, _ = material
    x, pids = features[1], labels[1]
    protocol = protocols.vehicleid(num_trials=3)
    rows = compare((x, x), (pids, pids), protocol=protocol)
    index = page.write_page(
        tmp_path / "page", rows, before=(x, x), after=(x, x), labels=(pids, pids), protocol=protocol
    )
    text = index.read_text(encoding="utf-8")
    assert "Figures are means of 3 trials; lists, distances and map are of the first one." in text
    assert "Of 36 queries, auto helped 0, left 36 as they were and harmed 0." in text


@pytest.mark.filterwarnings("ignore:method='nfc' may harm")
def test_folders_are_kept_unless_told(material, tmp_path):
    folder = tmp_path / "page"
    written(material, folder, title="first")
    with pytest.raises(FileExistsError, match="page exists and is not empty"):
        written(material, folder)
    text, _ = written(material, folder, title="second", overwrite=True)
    assert "<h1>second</h1>" in text
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.html").write_text("mine")
    with pytest.raises(FileExistsError, match="must be a page of pose2id to be overwritten"):
        written(material, other, overwrite=True)
    assert (other / "index.html").read_text() == "mine"


@pytest.mark.filterwarnings("ignore:method='nfc' may harm")
@pytest.mark.parametrize("there", [False, True])
def test_a_page_that_fails_leaves_nothing_behind(there, material, tmp_path):
    features, labels, paths = material
    folder = tmp_path / "page"
    if there:
        written(material, folder, title="first")
    before = sorted(path.name for path in tmp_path.iterdir())
    for path in paths[1]:
        path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"image g\d+ cannot be read: .*g\d+\.png"):
        written(material, folder, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in before or not path.exists()) == before
    if there:
        assert "<h1>first</h1>" in (folder / "index.html").read_text(encoding="utf-8")
    else:
        assert not folder.exists() or not list(folder.iterdir())
    assert len(labels) == 4
    assert len(features) == 2


CHECK = """
<pre id="found"></pre><script>
window.addEventListener("load", () => {
  const images = [...document.images], wide = document.documentElement.scrollWidth > window.innerWidth + 1;
  document.getElementById("found").textContent =
    `images ${images.length} loaded ${images.filter(x => x.complete && x.naturalWidth == 64).length} wide ${wide}`;
});
</script></body>"""


@pytest.mark.filterwarnings("ignore:method='nfc' may harm")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_finds_every_picture(width, material, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs Chromium on the PATH")
    text, _ = written(material, tmp_path / "page")
    count = text.count("<img")
    copy = tmp_path / "page" / "checked.html"
    copy.write_text(text.replace("</body>", CHECK), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    found = subprocess.run(
        [*command, profile, copy.as_uri()], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert f"images {count} loaded {count} wide false" in found


def test_the_style_is_part_of_the_package():
    assert (Path(page.__file__).parent / "page.css").is_file()
