"""The page that a person looks at: whole, honest, and with every picture; checked as a file and in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pose2id import evaluate
from pose2id.centralization.diagnostics import GenerationDiagnostics
from pose2id.plots.content import pair_distances
from pose2id.report import Row, compare
from pose2id.report import page as page_module
from pose2id.report.lists import change, chosen_queries
from pose2id.report.page import check_folder, write_page
from pose2id.retrieval import protocols
from pose2id.retrieval.protocols import LEAVE_ONE_OUT, MARKET1501

PEOPLE = 12
VOID = {"img", "br", "meta", "link", "input", "hr"}


class Tree(HTMLParser):
    """Elements of a page: tag, attributes, tags that are open around them, and text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [tag for tag, _ in self.open]))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [tag for tag, _ in self.open]))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Features before and after, labels, and images of several sizes, each of one colour."""
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((PEOPLE, 16))
    q_pids, g_pids = np.repeat(np.arange(1, PEOPLE + 1), 2), np.repeat(np.arange(1, PEOPLE + 1), 4)
    q_camids, g_camids = np.tile([1, 2], PEOPLE), np.tile([1, 2, 3, 3], PEOPLE)
    g_pids[-1] = -1

    def features(pids, noise):
        return (centres[pids - 1] + noise * rng.standard_normal((len(pids), 16))).astype(np.float32)

    before, after = ((features(q_pids, noise), features(g_pids, noise)) for noise in (1.1, 1.0))
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for side, count in (("q", len(q_pids)), ("g", len(g_pids))):
        paths.append([folder / f"{side}{i}.png" for i in range(count)])
        for i, path in enumerate(paths[-1]):
            size = [(64, 128), (300, 100), (20, 30)][i % 3]
            Image.new("RGB", size, (5 * i, 200 if side == "q" else 20, 90)).save(path)
    return before, after, (q_pids, g_pids, q_camids, g_camids), paths


def rows_of(before, after, labels):
    return [Row("baseline", evaluate(*before, *labels), 0.5), Row("auto", evaluate(*after, *labels), None)]


@pytest.fixture(scope="module")
def written(material, tmp_path_factory):
    """A page with all it can show."""
    before, after, labels, paths = material
    rows = rows_of(before, after, labels)
    rows[0] = Row("baseline", rows[0].result, 0.5, {"mAP": 0.7988})
    rows.append(Row("<script>alert(1)</script>", rows[0].result, 0.25))
    folder = tmp_path_factory.mktemp("page") / "report"
    path = write_page(
        folder,
        rows,
        before=before,
        after=after,
        labels=labels,
        query_paths=paths[0],
        gallery_paths=paths[1],
        sheets=[(paths[0][0], [Image.open(paths[1][1]), np.asarray(Image.open(paths[1][2]))])],
        curves={"mAP & <eta>": {"<b>NFC</b>": ([0, 1, 2], [0.5, 0.6, 0.55]), "flat": ([0, 1], [0.5, 0.5])}},
        title='A "title" & <i>more</i>',
        facts=["<script>fact</script>"],
    )
    assert path == folder / "index.html"
    return path


@pytest.fixture(scope="module")
def tree(written):
    return Tree(written.read_text(encoding="utf-8"))


def test_every_picture_is_there_small_and_described(tree, written):
    images = tree.all("img")
    assert len(images) > 12 * 20
    for image in images:
        assert image["alt"].strip()
        with Image.open(written.parent / image["src"]) as picture:
            picture.load()
            assert picture.width <= 112
            assert picture.height <= 192
    used = {image["src"] for image in images}
    assert used == {f"images/{path.name}" for path in (written.parent / "images").iterdir()}
    assert sorted(path.name for path in written.parent.iterdir()) == ["images", "index.html"]


def test_pictures_keep_their_shape_and_are_those_of_the_images(tree, written, material):
    _, _, (q_pids, _, q_camids, _), _ = material
    found = {image["alt"]: image["src"] for image in tree.all("img") if image["alt"].startswith("Query")}
    assert len(found) >= 8
    for i, (pid, camera) in enumerate(zip(q_pids, q_camids, strict=True)):
        source = found.get(f"Query, identity {pid}, camera {camera}")
        if source is not None:
            with Image.open(written.parent / source) as picture:
                width, height = [(64, 128), (300, 100), (20, 30)][i % 3]
                assert picture.width / picture.height == pytest.approx(width / height, rel=0.03)
                np.testing.assert_allclose(picture.convert("RGB").getpixel((3, 3)), (5 * i, 200, 90), atol=8)


def test_nothing_is_asked_of_the_network_and_no_script_runs(tree, written):
    text = written.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|url\(|@import", text)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _, _ in tree.elements}
    assert not [name for _, attributes, _ in tree.elements for name in attributes if name.startswith("on")]
    assert not [attributes for attributes in tree.all("a") if not attributes["href"].startswith("#")]


def test_what_people_wrote_is_text(tree):
    assert not tree.open
    for given in ("<script>alert(1)</script>", "<script>fact</script>", 'A "title" & <i>more</i>', "<b>NFC</b>"):
        assert given in tree.text
    assert not {"i", "b", "eta"} & {tag for tag, _, _ in tree.elements}
    assert any("mAP & <eta>" in attributes.get("aria-label", "") for attributes in tree.all("svg"))


def test_headings_and_charts_are_named(tree):
    levels = [int(tag[1]) for tag, _, _ in tree.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for attributes in tree.all("svg"):
        assert attributes.get("aria-hidden") == "true" or attributes["aria-label"]
    assert tree.all("html")[0]["lang"] == "en"
    assert "width=device-width" in [meta.get("content", "") for meta in tree.all("meta")][1]


def test_the_table_has_gains_losses_and_published_figures(tree, material):
    before, after, labels, _ = material
    first, second = (row.result for row in rows_of(before, after, labels))
    assert f"{100 * first.mAP:.2f}" in tree.text
    assert "79.88" in tree.text
    gain = 100 * (second.mAP - first.mAP)
    assert f"{'▲ +' if gain > 0 else '▼ −'}{abs(gain):.2f}" in tree.text  # noqa: RUF001
    counted = sum(second.average_precision > first.average_precision)
    assert f"▲ {counted} queries helped" in tree.text


def test_a_row_that_loses_is_said_to(material, tmp_path):
    before, after, labels, _ = material
    worse = tuple(np.random.default_rng(0).standard_normal(x.shape) for x in after)
    rows = rows_of(before, worse, labels)
    tree = Tree(write_page(tmp_path / "r", rows, before=before, after=worse, labels=labels).read_text(encoding="utf-8"))
    lost = 100 * (rows[0].result.mAP - rows[1].result.mAP)
    assert f"auto: mAP ▼ −{lost:.2f}" in tree.text  # noqa: RUF001
    assert "queries harmed," in tree.text
    same = Tree(
        write_page(tmp_path / "s", rows[:1], before=before, after=before, labels=labels).read_text(encoding="utf-8")
    )
    assert "Not everything gains" not in same.text
    assert "No query has a lower average precision." in same.text
    assert "No query has a higher average precision." in same.text


def precision_of(distances, right, dropped):
    """Average precision of one query, literally."""
    order = [i for i in sorted(range(len(distances)), key=lambda i: (distances[i], i)) if not dropped[i]]
    hits, found = 0, []
    for rank, i in enumerate(order, 1):
        if right[i]:
            hits += 1
            found.append(hits / rank)
    return sum(found) / len(found) if found else float("nan")


def literal(pair, labels):
    """Average precision of each query by Market1501's rules, literally."""
    q, g = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float64) for x in pair)
    q_pids, g_pids, q_camids, g_camids = labels
    values = []
    for i in range(len(q)):
        dropped = (g_pids == -1) | ((g_pids == q_pids[i]) & (g_camids == q_camids[i]))
        distances = np.linalg.norm(g - q[i], axis=1)
        values.append(precision_of(distances, (g_pids == q_pids[i]) & ~dropped, dropped))
    return np.array(values)


def test_the_queries_shown_are_those_that_lost_and_gained_most(tree, material):
    before, after, (q_pids, g_pids, q_camids, g_camids), _ = material
    labels = q_pids, g_pids, q_camids, g_camids
    gain = literal(after, labels) - literal(before, labels)
    order = np.argsort(gain)
    assert gain[order[3]] < 0 < gain[order[-4]]
    wanted = [*order[:4], *order[::-1][:4]]
    queries = [image["alt"] for image in tree.all("img") if image["alt"].startswith("Query")]
    assert queries[:16:2] == [f"Query, identity {q_pids[i]}, camera {q_camids[i]}" for i in wanted]
    assert queries[::2] == queries[1::2]
    assert len(queries) == 24
    assert len(set(queries)) == 12


def test_change_counts_and_chooses():
    before = np.array([0.5, np.nan, 0.2, 0.9, 0.4, 0.4])
    after = np.array([0.6, 0.3, 0.1, 0.9, 0.4 + 1e-12, 0.7])
    found = change(before, after)
    assert (found.helped, found.same, found.harmed) == (2, 2, 1)
    chosen = chosen_queries(before, after, most=4)
    assert (chosen["harmed"], chosen["helped"], sorted(chosen["random"])) == ([2], [5, 0], [3, 4])
    many = chosen_queries(np.zeros(100), np.zeros(100), most=3, seed=1)
    assert many["random"] != chosen_queries(np.zeros(100), np.zeros(100), most=3, seed=2)["random"]


def cards(text):
    """Kind, and identity and camera, of the cards of the first list."""
    first = text[text.index('<div class="list">') :]
    first = first[: first.index("</ol>")]
    found = re.findall(r'class="card (\w+)">\s*<\w+ [^>]*(?:alt|aria-label)="([^"]*)"', first)
    return [(kind, *map(int, re.search(r"identity (-?\d+), camera (\d+)", alt).groups())) for kind, alt in found]


def test_distances_are_euclidean(written, material):
    before, _, labels, _ = material
    text = written.read_text(encoding="utf-8")
    first = text[text.index('<div class="list">') :]
    pid, camera = map(int, re.search(r"Query, identity (\d+), camera (\d+)", first).groups())
    query = int(np.flatnonzero((labels[0] == pid) & (labels[2] == camera))[0])
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in before]
    nearest = np.sort(np.linalg.norm(unit[1] - unit[0][query], axis=1)).astype(np.float64)
    shown = [float(value) for value in re.findall(r"distance ([\d.]+)", first[: first.index("</ol>")])]
    assert shown[0] == round(float(nearest[0]), 3)
    assert set(shown) <= set(np.round(nearest, 3))


def test_junk_is_greyed_and_has_no_rank(written, tree):
    text = written.read_text(encoding="utf-8")
    (_, pid, camera), *others = cards(text)
    for kind, of, taken in others:
        is_junk = of == -1 or (of, taken) == (pid, camera)
        assert kind == ("junk" if is_junk else "right" if of == pid else "wrong")
    assert re.search(r"\.card\.junk img \{ filter: grayscale\(1\)", text)
    junk = [image["alt"] for image in tree.all("img") if "Not counted" in image["alt"]]
    assert junk
    assert not [alt for alt in junk if "Rank" in alt]


def test_without_paths_labels_are_shown(material, tmp_path):
    before, after, labels, _ = material
    names = [np.array([f"<script>{pid}" if pid > 0 else "-1" for pid in side]) for side in labels[:2]]
    rows = rows_of(before, after, labels)
    found = GenerationDiagnostics(0.5, 0.3, None, 3)
    path = write_page(tmp_path / "r", rows, before=before, after=after, labels=(*names, *labels[2:]), diagnostics=found)
    tree = Tree(path.read_text(encoding="utf-8"))
    assert not tree.all("img")
    assert "script" not in {tag for tag, _, _ in tree.elements}
    assert "identity <script>3, camera" in tree.text
    assert found.summary in tree.text
    assert found.reading in tree.text
    assert "First the reference" not in tree.text  # there are no sheets
    assert not list((path.parent / "images").iterdir())


def test_several_trials_show_the_first_one(material, tmp_path):
    rng = np.random.default_rng(0)
    pids, camids = np.repeat(np.arange(1, 9), 6), np.tile([1, 2, 3, 6, 3, 6], 8)
    x = rng.standard_normal((48, 8)) + 2 * rng.standard_normal((8, 8))[pids - 1]
    q, g = np.flatnonzero(camids > 2), np.flatnonzero(camids < 3)
    pair, labels = (x[q], x[g]), (pids[q], pids[g], camids[q], camids[g])
    protocol = protocols.sysu_mm01("indoor", num_trials=3)
    rows = [Row(name, protocol.evaluate(*pair, *labels), None) for name in ("baseline", "again")]
    trial = protocol.trials(*labels)[0]
    after = trial.of((pair[0] + 0.1, pair[1] + 0.1))
    path = write_page(tmp_path / "r", rows, before=pair, after=after, labels=labels, protocol=protocol)
    text = Tree(path.read_text(encoding="utf-8")).text
    assert "Of the first of 3 trials." in text
    expected = protocol.measure(after, *trial.of(labels[:2]), *trial.of(labels[2:]))
    assert f"{expected.mAP:.2%}" in text
    with pytest.raises(ValueError, match="before must hold features of 32 queries and 16 gallery"):
        write_page(tmp_path / "s", rows, before=(x, x), after=after, labels=labels, protocol=protocol)


def test_the_image_itself_is_junk_when_left_out(material, tmp_path):
    before, _, labels, _ = material
    x, pids = before[1], labels[1]
    rows = [Row("baseline", LEAVE_ONE_OUT.evaluate(x, x, pids, pids), None)]
    given = {"before": (x, x), "after": (x, x), "labels": (pids, pids, None, None), "protocol": LEAVE_ONE_OUT}
    text = write_page(tmp_path / "r", rows, **given).read_text(encoding="utf-8")
    assert re.search(r"Not counted, identity \d+, distance 0\.0", text)


def test_an_existing_folder_is_refused_before_any_work(material, tmp_path):
    before, after, labels, _ = material
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        check_folder(tmp_path)
    with pytest.raises(FileExistsError, match="not empty"):
        write_page(tmp_path, [], before=before, after=after, labels=labels)
    with pytest.raises(FileExistsError, match="is a file"):
        check_folder(tmp_path / "kept.txt" / "report", overwrite=True)
    check_folder(tmp_path / "new")
    check_folder(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_without_the_extra_it_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "pose2id\[report\]"'):
        check_folder(tmp_path / "r")


@pytest.mark.parametrize("at", ["a picture", "the template", "writing"])
def test_after_a_failure_nothing_is_left(at, material, tmp_path, monkeypatch):
    before, after, labels, paths = material
    paths = [list(side) for side in paths]
    if at == "a picture":
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no picture")
        paths[1] = [broken] * len(paths[1])
    elif at == "the template":
        monkeypatch.setattr(page_module, "_rendered", lambda content: 1 / 0)
    else:
        write = Path.write_text

        def fail(self, *args, **kwargs):
            if self.name == "index.html" or "index.html" in self.name:
                raise OSError("disk full")
            return write(self, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", fail)
    given = {"before": before, "after": after, "labels": labels, "query_paths": paths[0], "gallery_paths": paths[1]}
    rows = rows_of(before, after, labels)
    with pytest.raises((ValueError, ZeroDivisionError, OSError)):
        write_page(tmp_path / "r", rows, **given)
    assert not (tmp_path / "r").exists()
    (tmp_path / "r" / "images").mkdir(parents=True)
    (tmp_path / "r" / "index.html").write_bytes(b"former")
    (tmp_path / "r" / "images" / f"{'a' * 16}.jpg").write_bytes(b"former")
    with pytest.raises((ValueError, ZeroDivisionError, OSError)):
        write_page(tmp_path / "r", rows, **given, overwrite=True)
    left = sorted(path for path in (tmp_path / "r").rglob("*") if path.is_file())
    assert [path.read_bytes() for path in left] == [b"former", b"former"]


def test_overwriting_replaces_the_page_and_its_pictures_alone(material, tmp_path):
    before, after, labels, paths = material
    rows = rows_of(before, after, labels)
    (tmp_path / "images").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "images" / "mine.jpg").write_text("mine")
    (tmp_path / "images" / f"{'a' * 16}.jpg").write_text("of a former page")
    given = {"before": before, "after": after, "labels": labels, "overwrite": True}
    path = write_page(tmp_path, rows, **given, query_paths=paths[0], gallery_paths=paths[1])
    assert len(list((tmp_path / "images").iterdir())) > 12
    path = write_page(tmp_path, rows, **given)
    assert not Tree(path.read_text(encoding="utf-8")).all("img")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["images", "index.html", "mine.jpg", "mine.txt"]


def test_arguments_that_cannot_be(material, tmp_path):
    before, after, labels, paths = material
    rows = rows_of(before, after, labels)

    def write(rows=rows, **changed):
        given = {"before": before, "after": after, "labels": labels} | changed
        write_page(tmp_path / "r", rows, **given)

    with pytest.raises(ValueError, match="rows must hold"):
        write(rows=[])
    with pytest.raises(ValueError, match="one of them is missing"):
        write(query_paths=paths[0])
    with pytest.raises(ValueError, match="gallery_paths must hold 48 images"):
        write(query_paths=paths[0], gallery_paths=paths[1][:-1])
    with pytest.raises(ValueError, match="labels must be"):
        write(labels=labels[:3])
    with pytest.raises(ValueError, match=r"curves\['t'\]\['n'\] must be"):
        write(curves={"t": {"n": ([1, 2], [0.5])}})
    assert not (tmp_path / "r").exists()


def test_rows_of_compare_go_in(material, tmp_path):
    before, after, labels, _ = material
    path = write_page(tmp_path / "r", compare(before, labels), before=before, after=after, labels=labels)
    text = Tree(path.read_text(encoding="utf-8")).text
    for name in ("NFC + re-ranking", "auto, cameras"):
        assert name in text


def test_threshold_of_equal_error_by_all_pairs(material):
    """Counted in bins as the page does, against sorted distances of all pairs that count."""
    before, _, labels, _ = material
    q_pids, g_pids, q_camids, g_camids = labels
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in before]
    distances = np.linalg.norm(unit[0][:, None] - unit[1][None], axis=2)
    same = q_pids[:, None] == g_pids
    counted = ~(same & (q_camids[:, None] == g_camids)) & (g_pids != -1)
    positive, negative = distances[counted & same], distances[counted & ~same]
    counts = pair_distances(before, MARKET1501.rule(*distances.shape, *labels))
    assert (counts.positive.sum(), counts.negative.sum()) == (len(positive), len(negative))
    missed, accepted = (positive > counts.threshold).mean(), (negative <= counts.threshold).mean()
    assert abs(missed - accepted) < 1 / len(positive)
    assert counts.equal_error == pytest.approx((missed + accepted) / 2, abs=2 / len(positive))
    few = pair_distances(before, MARKET1501.rule(*distances.shape, *labels), max_queries=5)
    assert few.num_queries == 5
    assert few.negative.sum() < counts.negative.sum() / 3


def test_a_browser_loads_every_picture(written, tree, tmp_path):
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("needs chromium on PATH")
    copy = tmp_path / "copy"
    shutil.copytree(written.parent, copy)
    script = (
        "<script>addEventListener('load', () => { const p = document.createElement('pre'); p.id = 'found';"
        "p.textContent = [...document.images].map(i => i.naturalWidth).join(' ') + ' | ' +"
        " document.documentElement.scrollWidth + ' ' + innerWidth; document.body.append(p); });</script></body>"
    )
    page = (copy / "index.html").read_text(encoding="utf-8").replace("</body>", script)
    (copy / "index.html").write_text(page, encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=500,900",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    done = subprocess.run(
        [browser, *options, "--dump-dom", (copy / "index.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r'<pre id="found">([\d ]+) \| (\d+) (\d+)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    widths = [int(width) for width in found[1].split()]
    assert len(widths) == len(tree.all("img"))
    assert min(widths) > 0
    assert int(found[2]) <= int(found[3])  # no page wider than the window
