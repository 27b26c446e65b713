"""Every example of examples/code_bases, end to end, on the code bases in miniature (`stand_ins`)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from stand_ins import bpbreid as stand_in_bpbreid
from stand_ins import deep_person_reid as stand_in_torchreid
from stand_ins import fastreid as stand_in_fastreid
from stand_ins import ranked
from stand_ins import roboflow_reid as stand_in_roboflow
from stand_ins import saai as stand_in_saai
from stand_ins import transreid as stand_in_transreid
from stand_ins.boxmot_reid import Backend, ReID

from pose2id import Centralizer, PictureFolder, evaluate, evaluate_rank, fuse, nfc
from pose2id.extractor import PRESETS

EXAMPLES = ROOT / "examples" / "code_bases"
METHODS = [Centralizer(), Centralizer(method="nfc")]
# Images that are each other's neighbours get equal sums, of which rounding ranks either first.
TIES = 3e-3
pytestmark = pytest.mark.filterwarnings("ignore:method='nfc' may harm here")


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sides(rng):
    """Features (40, 16) and (80, 16) of 20 people in 2 cameras, as a model makes them, and their labels."""
    pids, cams, shot = (x.ravel() for x in np.meshgrid(np.arange(20), [0, 1], range(3), indexing="ij"))
    noise = rng.standard_normal((120, 16))
    x = 3 * (rng.standard_normal((20, 16))[pids] + rng.standard_normal((2, 16))[cams] + 1.1 * noise)
    of_query = shot == 0
    both = [
        {"feats": torch.from_numpy(x[m]).float(), "pids": pids[m], "camids": cams[m]} for m in (of_query, ~of_query)
    ]
    return SimpleNamespace(q=both[0], g=both[1], labels=[both[i][name] for name in ("pids", "camids") for i in (0, 1)])


def tied(centralizer):
    """How far apart two roundings of a mAP may be."""
    return TIES if centralizer.method == "nfc" else 1e-9


def cameras(sides):
    return {"query_camids": sides.q["camids"], "gallery_camids": sides.g["camids"]}


def rows(sides, names=("feats", "pids", "camids"), size=32):
    """Query and gallery in one, in batches."""
    whole = {name: np.concatenate([sides.q[name], sides.g[name]]) for name in names}
    for start in range(0, 120, size):
        yield {name: values[start : start + size] for name, values in whole.items()}


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def imported():
    """The test's working directory is importable; what it imports from there is forgotten afterwards."""
    before, path = set(sys.modules), list(sys.path)
    importlib.invalidate_caches()
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("utils", "processor", "fastreid", "torchreid"):
            del sys.modules[name]


def run(name, tree, tmp_path, monkeypatch, capsys):
    """What an example prints that runs the script `test.py` of a tree of files with one argument."""
    for path, text in tree.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "test.py", "--argument"])
    example(name).main()
    return capsys.readouterr().out.split()


class TestTransReID:
    @staticmethod
    def evaluator(kind, sides, **options):
        found = kind(num_query=40, max_rank=50, **options)
        found.reset()
        for batch in rows(sides):
            found.update((torch.from_numpy(batch["feats"]), tuple(batch["pids"]), tuple(batch["camids"])))
        return found

    @pytest.mark.parametrize("feat_norm", [True, "yes", False])
    @pytest.mark.parametrize("centralizer", METHODS, ids=["auto", "nfc"])
    def test_centralized(self, centralizer, feat_norm, sides):
        kind = example("transreid").plug_in(stand_in_transreid.R1_mAP_eval, centralizer)
        evaluator = self.evaluator(kind, sides, feat_norm=feat_norm)
        expected = centralizer.enhance(sides.q["feats"], sides.g["feats"], **cameras(sides))
        for _ in range(2):  # as often as one likes
            cmc, mean, distances, pids, camids, qf, gf = evaluator.compute()
            assert mean == pytest.approx(evaluate(*expected, *sides.labels).mAP, abs=tied(centralizer))
            np.testing.assert_allclose(cmc, evaluate(*expected, *sides.labels).cmc, atol=10 * tied(centralizer) + 1e-6)
            torch.testing.assert_close((qf, gf), expected, atol=1e-6, rtol=0)
            np.testing.assert_allclose(distances, 2 - 2 * unit(qf) @ unit(gf).T, atol=1e-5)
            assert list(pids[:40]) == list(sides.q["pids"])
            assert list(camids[40:]) == list(sides.g["camids"])
        before = self.evaluator(stand_in_transreid.R1_mAP_eval, sides).compute()
        assert before[1] == pytest.approx(evaluate(sides.q["feats"], sides.g["feats"], *sides.labels).mAP, abs=1e-12)
        assert abs(mean - before[1]) > 0.01

    def test_nfc_is_of_each_set_apart(self, sides):
        kind = example("transreid").plug_in(stand_in_transreid.R1_mAP_eval, Centralizer(method="nfc"))
        *_, qf, gf = self.evaluator(kind, sides).compute()
        torch.testing.assert_close((qf, gf), (nfc(sides.q["feats"]), nfc(sides.g["feats"])), atol=1e-6, rtol=0)

    def test_reranked(self, sides):
        plug_in = example("transreid").plug_in_reranking
        kind = plug_in(stand_in_transreid.R1_mAP_eval, stand_in_transreid.eval_func)
        cmc, mean, distances, *_ = self.evaluator(kind, sides).compute()
        expected = Centralizer().rerank(sides.q["feats"], sides.g["feats"], **cameras(sides))
        np.testing.assert_array_equal(distances, expected)
        result = evaluate_rank(expected, *sides.labels)
        assert mean == pytest.approx(result.mAP, abs=1e-9)
        np.testing.assert_allclose(cmc, result.cmc, atol=1e-6)
        assert mean == pytest.approx(np.mean(ranked(expected, *sides.labels)[0]))

    @pytest.mark.parametrize("processor", ["processor", "processor_clipreid_stage2"])
    def test_its_own_script(self, processor, sides, tmp_path, monkeypatch, capsys, imported):
        feats = np.concatenate([sides.q["feats"], sides.g["feats"]])
        labels = {name: np.concatenate([sides.q[name], sides.g[name]]) for name in ("pids", "camids")}
        np.savez(tmp_path / "all.npz", feats=feats, **labels)
        inference = (
            "import numpy, torch\nfrom utils.metrics import R1_mAP_eval\n"
            "def do_inference():\n    x = numpy.load('all.npz')\n    evaluator = R1_mAP_eval(40, feat_norm='yes')\n"
            "    evaluator.reset()\n    evaluator.update((torch.from_numpy(x['feats']), x['pids'], x['camids']))\n"
            "    return evaluator.compute()[1]\n"
        )
        tree = {
            "utils/__init__.py": "",
            "utils/metrics.py": "from stand_ins.transreid import R1_mAP_eval\n",
            "processor/__init__.py": "",
            f"processor/{processor}.py": inference,
            "test.py": (
                f"import sys\nfrom processor.{processor} import do_inference\n"
                "if __name__ == '__main__':\n    print(sys.argv[1], do_inference())\n"
            ),
        }
        argument, mean = run("transreid", tree, tmp_path, monkeypatch, capsys)
        expected = Centralizer().enhance(sides.q["feats"], sides.g["feats"], **cameras(sides))
        assert argument == "--argument"
        assert float(mean) == pytest.approx(evaluate(*expected, *sides.labels).mAP, abs=1e-12)

    def test_that_a_processor_fails_to_import_is_told(self, tmp_path, monkeypatch, capsys, imported):
        tree = {"processor/__init__.py": "", "processor/processor.py": "import not_there_1", "test.py": ""}
        with pytest.raises(ModuleNotFoundError, match="not_there_1"):
            run("transreid", tree, tmp_path, monkeypatch, capsys)


@pytest.fixture
def pictures(rng):
    """Four people's images, and two generated ones of each."""
    many = [Image.fromarray(x) for x in rng.integers(0, 256, (12, 32, 16, 3), dtype=np.uint8)]
    return SimpleNamespace(images=many[:4], generated=[many[4 + 2 * i : 6 + 2 * i] for i in range(4)])


def inputs_of(preset, pictures):
    """(4, 3, H, W) and (8, 3, H, W)."""
    transform = PRESETS[preset]
    generated = [transform(picture) for of_one in pictures.generated for picture in of_one]
    return torch.stack([transform(image) for image in pictures.images]), torch.stack(generated)


def fused(extractor, pictures, **inputs):
    return Centralizer(extractor, lambda _: pictures.generated)(pictures.images, progress=False, **inputs)


class TestModels:
    """What a model is asked for, and eq. 9 of what it says."""

    CAMS = torch.tensor([3, 0, 2, 1])

    @pytest.mark.parametrize(
        ("name", "preset", "given", "same"),
        [
            ("TransReID", "transreid", 0, torch.zeros(8, dtype=torch.int64)),
            ("TransReID", "transreid", CAMS.flip(0), CAMS.flip(0).repeat_interleave(2)),
            ("CLIPReID", "clip-reid", None, None),
        ],
    )
    def test_camera_of_generated_images(self, name, preset, given, same, pictures):
        model = getattr(stand_in_transreid, name)().train()
        extractor = example("transreid").extractor_of(model, preset)
        found = fused(extractor, pictures, cam_label=self.CAMS, generated_inputs={"cam_label": given})
        own, generated = inputs_of(preset, pictures)
        with torch.no_grad():
            model.eval()
            raw, of_generated = model(own, cam_label=self.CAMS), model(generated, cam_label=same).unflatten(0, (4, 2))
        torch.testing.assert_close(found, fuse(raw, of_generated, 2.0), atol=1e-5, rtol=0)
        kept = fused(extractor, pictures, cam_label=self.CAMS)
        assert (found - kept).abs().max() > 0.01

    def test_solider_returns_a_tuple(self, pictures):
        model = stand_in_transreid.SOLIDER()
        found = fused(example("transreid").extractor_of(model, "solider-reid"), pictures)
        own, generated = inputs_of("solider-reid", pictures)
        with torch.no_grad():
            expected = fuse(model.eval()(own)[0], model(generated)[0].unflatten(0, (4, 2)), 2.0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    def test_fast_reid_normalises_in_place(self, pictures):
        model = stand_in_fastreid.Baseline().train()
        found = fused(example("fast_reid").extractor_of(model), pictures)
        assert model.training
        own, generated = inputs_of("fast-reid", pictures)
        assert own.max() > 200
        with torch.no_grad():
            raw, of_generated = (model.eval()({"images": x}) for x in (own, generated))
        torch.testing.assert_close(found, fuse(raw, of_generated.unflatten(0, (4, 2)), 2.0), atol=1e-5, rtol=0)

    def test_torchreids_extractor_takes_paths(self, pictures, tmp_path):
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 8, stride=8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        published = stand_in_torchreid.FeatureExtractor(network)
        module = example("deep_person_reid")
        paths = []
        for i, image in enumerate(pictures.images):
            paths.append(str(tmp_path / f"{i}.png"))
            image.save(paths[-1])
        data = [(path, 7 + i, i % 2, 0) for i, path in enumerate(paths)]
        columns = module.columns(data)
        assert columns[0] == paths
        assert [column.tolist() for column in columns[1:]] == [[7, 8, 9, 10], [0, 1, 0, 1]]
        assert module.columns([row[:3] for row in data])[0] == paths
        centralizer = Centralizer(module.extractor_of(published), lambda _: pictures.generated)
        generated = [np.array(picture) for of_one in pictures.generated for picture in of_one]
        expected = fuse(published(paths), published(generated).unflatten(0, (4, 2)), 2.0)
        torch.testing.assert_close(centralizer(columns[0], progress=False), expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("embeddings", [("bn_foreg", "parts"), ("globl", "parts"), ("parts",)])
    def test_parts_of_bpbreid(self, embeddings, pictures):
        model = stand_in_bpbreid.BPBReID()
        extractor = example("bpbreid").extractor_of(model, embeddings=embeddings)
        masks = torch.rand(4, 1, 48, 16)
        parts, shown = extractor(pictures.images, return_visibility=True, progress=False, external_parts_masks=masks)
        with torch.no_grad():
            of_parts, visible, *_ = model.eval()(inputs_of("bpbreid", pictures)[0], external_parts_masks=masks)
        assert parts.shape == (4, 2 + len(embeddings), 8)
        np.testing.assert_allclose(parts[:, -3:], unit(of_parts["parts"]), atol=1e-5)
        if len(embeddings) > 1:
            np.testing.assert_allclose(parts[:, 0], unit(of_parts[embeddings[0]]), atol=1e-5)
            assert shown[:, 0].tolist() == visible[embeddings[0].replace("bn_", "")].tolist()
        assert shown[:, -3:].tolist() == visible["parts"].tolist()

    def test_prompts_of_kpr(self, pictures):
        model = stand_in_bpbreid.KPR()
        extractor = example("bpbreid").extractor_of(model, "kpr-imagenet")
        prompts = torch.rand(4, 5, 32, 16)
        found = fused(extractor, pictures, prompt_masks=prompts, generated_inputs={"prompt_masks": None})
        own, generated = inputs_of("kpr-imagenet", pictures)
        outputs = []
        with torch.no_grad():
            for images, prompt in ((own, prompts), (generated, None)):
                embeddings, shown, *_ = model.eval()(images, prompt_masks=prompt)
                parts = torch.cat([embeddings["bn_foreg"][:, None], embeddings["parts"]], 1)
                outputs.append((parts, torch.cat([shown["foreg"][:, None], shown["parts"]], 1)))
        (raw, _), (of_generated, visible) = outputs
        of_generated, visible = of_generated.unflatten(0, (4, 2)), visible.unflatten(0, (4, 2))
        torch.testing.assert_close(found, fuse(raw, of_generated, 2.0, visibility=visible), atol=1e-5, rtol=0)
        assert (found - fused(extractor, pictures, prompt_masks=prompts)).abs().max() > 1e-3

    @pytest.mark.parametrize("visible", [True, False])
    def test_the_neck_of_saai_is_the_cameras(self, visible, pictures):
        model = stand_in_saai.Baseline()
        cams = torch.tensor([3, 1, 6, 2])
        given = {"cam_ids": torch.ones_like(cams)} if visible else None
        found = fused(example("saai").extractor_of(model), pictures, cam_ids=cams, generated_inputs=given)
        own, generated = inputs_of("saai", pictures)
        of_generated = torch.ones(8) if visible else cams.repeat_interleave(2)
        with torch.no_grad():
            raw = model.eval()(own, cam_ids=cams)
            others = model(generated, cam_ids=of_generated).unflatten(0, (4, 2))
        torch.testing.assert_close(found, fuse(raw, others, 2.0), atol=1e-5, rtol=0)

    def test_pmt_is_normalised_already(self, pictures):
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 8, stride=8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        model = lambda x: torch.nn.functional.normalize(network(x))  # noqa: E731
        found = fused(example("pmt").extractor_of(model), pictures)
        own, generated = inputs_of("pmt", pictures)
        with torch.no_grad():
            expected = fuse(model(own), model(generated).unflatten(0, (4, 2)), 2.0)
        torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=0)


class TestFastReID:
    CFG = SimpleNamespace(TEST=SimpleNamespace(METRIC="cosine"))

    def predicted(self, kind, sides):
        evaluator = kind(self.CFG, 40)
        evaluator.reset()
        for batch in rows(sides):
            feats, pids, camids = (torch.from_numpy(batch[name]) for name in ("feats", "pids", "camids"))
            evaluator.process({"targets": pids, "camids": camids}, feats)
        return evaluator

    @pytest.mark.parametrize("centralizer", METHODS, ids=["auto", "nfc"])
    def test_centralized(self, centralizer, sides):
        kind = example("fast_reid").plug_in(stand_in_fastreid.ReidEvaluator, centralizer)
        evaluator = self.predicted(kind, sides)
        expected = evaluate(*centralizer.enhance(sides.q["feats"], sides.g["feats"], **cameras(sides)), *sides.labels)
        for _ in range(2):
            results = evaluator.evaluate()
            assert results["mAP"] == pytest.approx(100 * expected.mAP, abs=100 * tied(centralizer))
        before = self.predicted(stand_in_fastreid.ReidEvaluator, sides).evaluate()
        plain = evaluate(sides.q["feats"], sides.g["feats"], *sides.labels)
        assert before["mAP"] == pytest.approx(100 * plain.mAP, abs=1e-9)
        assert abs(before["mAP"] - results["mAP"]) > 1

    def test_several_processes_are_refused(self, sides, monkeypatch):
        evaluator = self.predicted(example("fast_reid").plug_in(stand_in_fastreid.ReidEvaluator), sides)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(RuntimeError, match="one process"):
            evaluator.evaluate()

    def test_its_own_script(self, tmp_path, monkeypatch, capsys, imported):
        tree = {
            "fastreid/__init__.py": "",
            "fastreid/engine/__init__.py": "",
            "fastreid/engine/defaults.py": "from stand_ins.fastreid import ReidEvaluator\n",
            "test.py": "from fastreid.engine import defaults\nprint(defaults.ReidEvaluator.__name__)\n",
        }
        assert run("fast_reid", tree, tmp_path, monkeypatch, capsys) == ["CentralizedEvaluator"]


class TestTorchreid:
    @staticmethod
    def loaders(sides):
        def batches(side):
            tensors = {"img": side["feats"], "pid": torch.tensor(side["pids"]), "camid": torch.tensor(side["camids"])}
            return [{name: x[i : i + 9] for name, x in tensors.items()} for i in range(0, len(side["pids"]), 9)]

        return {"query": batches(sides.q), "gallery": batches(sides.g)}

    @pytest.mark.parametrize("normalize_feature", [True, False])
    @pytest.mark.parametrize("centralizer", METHODS, ids=["auto", "nfc"])
    def test_centralized(self, centralizer, normalize_feature, sides):
        class Engine(stand_in_torchreid.Engine):
            pass

        class ImageSoftmaxEngine(Engine):
            pass

        engine, loaders = ImageSoftmaxEngine(torch.nn.Linear(16, 12)), self.loaders(sides)
        with torch.no_grad():
            feats = [engine.model(side["feats"]) for side in (sides.q, sides.g)]
        metric = "cosine" if normalize_feature else "euclidean"
        plain = evaluate(*feats, *sides.labels, metric=metric)
        assert engine.test(loaders, normalize_feature=normalize_feature)[1] == pytest.approx(plain.mAP, abs=1e-9)
        assert example("deep_person_reid").plug_in(Engine, centralizer) is Engine
        expected = evaluate(*centralizer.enhance(*feats, **cameras(sides)), *sides.labels)
        for _ in range(2):
            rank1, mean = engine.test(loaders, normalize_feature=normalize_feature)
            assert mean == pytest.approx(expected.mAP, abs=tied(centralizer))
            assert rank1 == pytest.approx(expected.rank(1), abs=10 * tied(centralizer))
        assert abs(plain.mAP - mean) > 2 * TIES
        assert "extract_features" not in vars(engine)

    def test_its_own_script(self, tmp_path, monkeypatch, capsys, imported):
        tree = {
            "torchreid/__init__.py": "",
            "torchreid/engine.py": "from stand_ins.deep_person_reid import Engine as E\nclass Engine(E):\n    pass\n",
            "test.py": "from torchreid.engine import Engine\nprint(Engine._evaluate.__module__)\n",
        }
        assert run("deep_person_reid", tree, tmp_path, monkeypatch, capsys) == ["example_deep_person_reid"]


class TestParts:
    """BPBReID's and KPR's engine."""

    @pytest.mark.parametrize("with_visibility", [True, False])
    @pytest.mark.parametrize("centralizer", METHODS, ids=["auto", "nfc"])
    @pytest.mark.parametrize("kind", [stand_in_bpbreid.BPBReID, stand_in_bpbreid.KPR])
    def test_centralized(self, kind, centralizer, with_visibility, rng):
        class Engine(stand_in_bpbreid.ImagePartBasedEngine):
            pass

        model = kind().eval()
        engine = Engine(model, ["bn_foreg", "parts"], mask_filtering_testing=with_visibility)
        pids = np.repeat(np.arange(6), 4)
        images = rng.standard_normal((6, 3, 24, 16))[pids] + rng.standard_normal((24, 3, 24, 16))
        images = torch.from_numpy(images).float()
        is_query = np.arange(24) % 4 == 0
        loaders = [
            [{"image": images[m], "pid": torch.tensor(pids[m]), "camid": torch.full((int(m.sum()),), c)}]
            for c, m in enumerate((is_query, ~is_query))
        ]
        arguments = {"query_loader": loaders[0], "gallery_loader": loaders[1], "normalize_feature": True}
        with torch.no_grad():
            feats, seen = zip(*(engine._feature_extraction(loader)[:4:3] for loader in loaders), strict=True)
        assert seen[0] is None or not (seen[0].all() and seen[1].all())
        labels = pids[is_query], pids[~is_query]
        shown = {"q_visibility": seen[0], "g_visibility": seen[1]}
        before = engine._evaluate(0, "occluded", **arguments)[1]
        assert before == pytest.approx(evaluate(*feats, *labels, **shown).mAP, abs=1e-9)

        example("bpbreid").plug_in(Engine, centralizer)
        new = centralizer.enhance(*feats, query_visibility=seen[0], gallery_visibility=seen[1])
        for _ in range(2):
            after = engine._evaluate(0, "occluded", **arguments)[1]
            assert after == pytest.approx(evaluate(*new, *labels, **shown).mAP, abs=1e-9)
        assert new[0].shape == (6, 4, 8)
        assert "_feature_extraction" not in vars(engine)
        if centralizer.method == "nfc":
            assert (new[1] - torch.nn.functional.normalize(feats[1], dim=-1)).abs().max() > 0.01


class TestSAAI:
    @pytest.mark.parametrize("aim", [True, False])
    @pytest.mark.parametrize("centralizer", METHODS, ids=["auto", "nfc"])
    def test_within_each_trial(self, centralizer, aim, sides, monkeypatch):
        for name in ("pairwise_distance", "AIM"):
            monkeypatch.setattr(stand_in_saai, name, getattr(stand_in_saai, name))  # put back afterwards
        query_cams, gallery_cams = np.where(sides.q["camids"] == 0, 3, 6), np.where(sides.g["camids"] == 0, 1, 2)
        trials = [np.arange(80)[t::2] for t in range(2)]

        def run():
            q, g = sides.q, sides.g
            paths = np.full(80, "cam1/0001/0001.jpg")
            given = (q["feats"], q["pids"], query_cams.copy(), g["feats"], g["pids"], gallery_cams, paths, trials)
            return stand_in_saai.eval_sysu(*given, mode="all", num_shots=1, num_trials=2, aim=aim)

        def expected(enhance):
            # Query cameras are of no identity's gallery camera, but 3 (as 2).
            means = []
            for trial in trials:
                qf, gf = enhance(sides.q["feats"], sides.g["feats"][trial])
                distances = (2 - 2 * unit(qf) @ unit(gf).T)[:, :]
                same = np.where(query_cams == 3, 2, query_cams)[:, None] == gallery_cams[trial]
                distances[same] = 1e3
                of_query = []
                for i, pid in enumerate(sides.q["pids"]):
                    keep = ~same[i]
                    right = (sides.g["pids"][trial][keep] == pid)[np.argsort(distances[i][keep], kind="stable")]
                    if right.any():
                        where = np.flatnonzero(right) + 1
                        of_query.append(np.mean(np.arange(1, len(where) + 1) / where))
                means.append(np.mean(of_query))
            return 100 * np.mean(means)

        before = run()
        assert before == pytest.approx(expected(lambda q, g: (q, g)), abs=1e-9)
        example("saai").plug_in(stand_in_saai, centralizer)
        assert run() == pytest.approx(expected(centralizer.enhance), abs=100 * TIES)
        if centralizer.method == "nfc":  # the safe default finds no evidence in so small a gallery without cameras
            assert abs(run() - before) > 200 * TIES

    def test_its_own_script(self, tmp_path, monkeypatch, capsys, imported):
        module = "from stand_ins.saai import AIM, pairwise_distance\n"
        tree = {
            "utils/__init__.py": "",
            "utils/eval_sysu.py": module,
            "utils/eval_regdb.py": module,
            "test.py": (
                "from utils import eval_regdb, eval_sysu\n"
                "print(*(f.__module__ for m in (eval_regdb, eval_sysu) for f in (m.AIM, m.pairwise_distance)))\n"
            ),
        }
        assert run("saai", tree, tmp_path, monkeypatch, capsys) == ["example_saai"] * 4


@pytest.mark.parametrize("with_cameras", [True, False])
@pytest.mark.parametrize("centralizer", METHODS, ids=["auto", "nfc"])
def test_pmt_stays_in_float64(centralizer, with_cameras, sides):
    qf, gf = (unit(side["feats"]) for side in (sides.q, sides.g))
    before = qf.copy()
    cams = (sides.q["camids"], sides.g["camids"]) if with_cameras else (None, None)
    distances = example("pmt").plug_in(qf, gf, *cams, centralizer)
    assert distances.dtype == np.float64
    np.testing.assert_array_equal(qf, before)
    new = centralizer.enhance(qf, gf, query_camids=cams[0], gallery_camids=cams[1])
    np.testing.assert_allclose(distances, -(new[0] @ new[1].T), atol=1e-12)
    found = np.mean(ranked(distances, *sides.labels)[0])
    assert found == pytest.approx(evaluate(*new, *sides.labels).mAP, abs=1e-9)


class TestRoboflow:
    @pytest.fixture
    def splits(self, rng, tmp_path):
        pids, cams = np.repeat(np.arange(12), 6), np.tile([0, 0, 0, 1, 1, 1], 12)
        pixels = rng.uniform(0, 1, (12, 8, 4, 3))[pids] + 0.5 * rng.standard_normal((72, 8, 4, 3))
        paths = []
        for i, x in enumerate(np.clip(255 * x, 0, 255).astype(np.uint8) for x in pixels):
            paths.append(str(tmp_path / f"{i}.png"))
            Image.fromarray(x).save(paths[-1])
        is_query = np.arange(72) % 6 == 0
        return [
            stand_in_roboflow.ReIDSplit(tuple(np.array(paths)[m].tolist()), pids[m], cams[m])
            for m in (is_query, ~is_query)
        ]

    @pytest.mark.parametrize("centralizer", METHODS, ids=["auto", "nfc"])
    def test_centralized(self, centralizer, splits):
        model, (query, gallery) = stand_in_roboflow.ReIDModel(), splits
        feats = [model.extract_embeddings_from_paths(split.image_paths) for split in splits]
        labels = query.pids, gallery.pids, query.camids, gallery.camids
        assert model.evaluate(query, gallery) == pytest.approx(100 * evaluate(*feats, *labels).mAP, abs=1e-6)
        expected = centralizer.enhance(*feats, query_camids=query.camids, gallery_camids=gallery.camids)
        found = example("roboflow_reid").plug_in(model, query, gallery, centralizer, batch_size=7)
        assert found == pytest.approx(100 * evaluate(*expected, *labels).mAP, abs=1e-6)
        assert "extract_embeddings_from_paths" not in vars(model)

    def test_shared_images_are_refused(self, splits):
        with pytest.raises(ValueError, match="query and gallery must not share images"):
            example("roboflow_reid").plug_in(stand_in_roboflow.ReIDModel(), splits[0], splits[0])

    def test_generated_images_on_disk(self, splits, rng, tmp_path):
        paths = splits[0].image_paths[:3]
        for m in (1, 2):
            (tmp_path / f"new/pose{m}").mkdir(parents=True)
            for path in paths:
                picture = Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8))
                picture.save(tmp_path / f"new/pose{m}" / path.rsplit("/", 1)[-1])
        model = stand_in_roboflow.ReIDModel()
        found = example("roboflow_reid").with_generated(model, paths, tmp_path / "new", eta=1.0)
        places = [place for of_one in PictureFolder(tmp_path / "new")(paths) for place in of_one]
        generated = model.extract_embeddings_from_paths(list(map(str, places))).reshape(3, 2, -1)
        expected = fuse(model.extract_embeddings_from_paths(paths), generated, 1.0)
        np.testing.assert_allclose(found, expected, atol=1e-6)


class TestBoxmot:
    def test_crops_are_blue_first(self, pictures, tmp_path):
        found = example("boxmot_reid").extractor_of(ReID(Backend()))(pictures.images, progress=False)
        np.testing.assert_allclose(
            found, Backend.of_crops([np.array(x)[:, :, ::-1] for x in pictures.images]), atol=1e-6
        )
        pictures.images[0].save(tmp_path / "0.png")
        of_path = example("boxmot_reid").extractor_of(ReID(Backend()))([str(tmp_path / "0.png")], progress=False)
        np.testing.assert_allclose(of_path, found[:1], atol=1e-6)

    @pytest.mark.parametrize("boxes", [3, 0])
    def test_a_backend_for_trackers(self, boxes, rng):
        frame = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        xyxys = np.array([[0, 0, 16, 32], [20, 8, 40, 60], [30, 2, 50, 50]], np.float32)[:boxes]
        people = rng.standard_normal((10, 6))[np.repeat(np.arange(10), 5)]
        gallery = unit(people + 0.1 * rng.standard_normal((50, 6))).astype(np.float32)
        if boxes:
            gallery[:15] = np.repeat(Backend().get_features(xyxys, frame), 5, axis=0)
            gallery += 0.02 * rng.standard_normal(gallery.shape).astype(np.float32)
        backend = example("boxmot_reid").CentralizedBackend(Backend(), gallery)
        found = ReID(backend)(frame, boxes=xyxys)
        assert len(found) == boxes
        if boxes:
            plain = Backend().get_features(xyxys, frame)
            expected = Centralizer().enhance(plain, gallery, camera_statistics="gallery")[0]
            np.testing.assert_allclose(found, expected, atol=1e-6)
            assert np.abs(found - plain).max() > 1e-3


def test_examples_import_nothing_of_the_code_bases(monkeypatch):
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert len(names) >= 8
    for name in ("torchreid", "fastreid", "boxmot", "reid", "utils", "processor"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
    for name in names:
        assert any(callable(value) for value in vars(example(name)).values())
