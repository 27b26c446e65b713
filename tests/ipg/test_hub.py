"""Weights from a Hub that runs here, with the real client: what is fetched, kept, refused, and said."""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import constants
from huggingface_hub.utils import HfHubHTTPError
from safetensors.torch import save

from pose2id.ipg import IdentityGenerator, PoseEncoder
from pose2id.ipg.weights import PARTS, VAE_REPO, convert, open_weights

REPO = "user/weights"
OWN = ["pose2id.json", *(f"{name}.safetensors" for name in PARTS)]
PUBLISHED = [part.published_file for part in PARTS.values() if part.config is not None]
LONG = "denoising_unet.safetensors"
SHAPES = Path(__file__).parent.parent / "golden" / "published_shapes.json"
CLIENT_ERRORS = ConnectionError


@pytest.fixture(autouse=True)
def waits(monkeypatch, hub):
    """Seconds that the client would have slept between its attempts; half a minute when nobody answers."""
    assert hub.endpoint == constants.ENDPOINT
    slept = []
    for module in ("file_download", "utils._http"):
        fake = SimpleNamespace(**{**vars(time), "sleep": slept.append})
        monkeypatch.setattr(f"huggingface_hub.{module}.time", fake)
    return slept


@pytest.fixture(scope="module")
def original():
    return tiny.generator()


@pytest.fixture(scope="module")
def expected(original):
    return pictures(original)


@pytest.fixture(scope="module")
def own_directory(original, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub") / "own"
    original.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def own(own_directory):
    return contents(own_directory)


@pytest.fixture(scope="module")
def long(own_directory, tmp_path_factory):
    """The same weights, with files longer than the 10 MiB that the client writes at a time."""
    directory = tmp_path_factory.mktemp("hub") / "long"
    convert(own_directory, directory, dtype=torch.float64)
    return contents(directory)


@pytest.fixture(scope="module")
def published():
    """Files of the published names, keys and shapes; small, because each tensor repeats one stored number."""
    shapes = json.loads(SHAPES.read_text())
    files = {}
    for name in PUBLISHED:
        buffer = io.BytesIO()
        torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes[name].items()}, buffer)
        files[name] = buffer.getvalue()
    return files


@pytest.fixture(scope="module")
def vae(original):
    return {
        "config.json": json.dumps(tiny.VAE).encode(),
        "diffusion_pytorch_model.safetensors": save(original.vae.state_dict()),
    }


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def pictures(generator):
    person = np.random.default_rng(0).integers(0, 256, (128, 64, 3), np.uint8)
    noise = torch.Generator().manual_seed(0)
    ((picture,),) = generator.generate([person], [person], num_inference_steps=2, generator=noise, progress=False)
    return np.asarray(picture).tolist()


def same_weights(generator, other):
    pairs = [(part.state_dict(), other.parts[name].state_dict()) for name, part in generator.parts.items()]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def load(cache, repo=REPO, **options):
    return IdentityGenerator.from_pretrained(repo, cache_dir=cache, device="cpu", **options)


def downloads(hub):
    return Counter(request.path.rpartition("/")[2] for request in hub.requests if request.method == "GET")


def snapshots(cache):
    """Names of the files that a later call takes for whole."""
    return sorted(path.name for path in cache.glob("models--*/snapshots/*/*"))


def test_first_download(hub, own, expected, tmp_path, monkeypatch):
    commit = hub.add(REPO, own)
    elsewhere = [tmp_path / "working", tmp_path / "temporary"]
    for directory in elsewhere:
        directory.mkdir()
    monkeypatch.chdir(elsewhere[0])
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere[1]))
    elsewhere.append(Path(constants.HF_HOME))
    before = [path for directory in elsewhere for path in directory.rglob("*")]  # diffusers writes on import
    generator = load(tmp_path / "cache")
    assert pictures(generator) == expected
    assert generator.sources == {REPO: commit}
    assert downloads(hub) == dict.fromkeys(OWN, 1)

    repo = tmp_path / "cache" / "models--user--weights"
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {repo.name, ".locks", "CACHEDIR.TAG"}
    assert {path.name for path in repo.iterdir()} == {"blobs", "refs", "snapshots"}
    assert [path.name for path in (repo / "snapshots").iterdir()] == [commit]
    assert snapshots(tmp_path / "cache") == sorted(OWN)
    assert [path for directory in elsewhere for path in directory.rglob("*")] == before


def test_second_use_downloads_nothing(hub, own, tmp_path):
    hub.add(REPO, own)
    load(tmp_path)
    hub.requests.clear()
    load(tmp_path)
    assert downloads(hub) == {}


@pytest.mark.parametrize("offline", ["no connection", "local_files_only"])
def test_cached_weights_need_no_connection(hub, own, original, tmp_path, offline):
    sources = {REPO: hub.add(REPO, own)}
    load(tmp_path)
    hub.requests.clear()
    if offline == "no connection":
        hub.stop()
    generator = load(tmp_path, local_files_only=offline == "local_files_only")
    assert same_weights(generator, original)
    assert generator.sources == sources
    assert hub.requests == []


@pytest.mark.parametrize("offline", ["no connection", "local_files_only"])
def test_cached_published_weights_need_no_connection(hub, published, vae, tmp_path, waits, offline):
    sources = {REPO: hub.add(REPO, published), VAE_REPO: hub.add(VAE_REPO, vae)}
    first = open_weights(REPO, cache_dir=tmp_path)
    hub.requests.clear()
    if offline == "no connection":
        hub.stop()
    second = open_weights(REPO, cache_dir=tmp_path, local_files_only=offline == "local_files_only")
    assert second == first
    assert second.sources == sources
    assert hub.requests == []
    assert waits == []


@pytest.mark.parametrize(
    ("local_files_only", "why"), [(False, "the Hub cannot be reached"), (True, "local_files_only=True")]
)
def test_neither_cache_nor_connection(hub, tmp_path, waits, local_files_only, why):
    hub.stop()
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path, local_files_only=local_files_only)
    for part in [REPO, "'main'", *PUBLISHED, "pose2id.json", f"(not in the cache, and {why})"]:
        assert part in str(caught.value)
    assert hub.requests == []
    assert sum(waits) < 30  # the client's own patience, once


@pytest.mark.parametrize("status", [403, 503])
def test_a_hub_that_refuses(hub, own, tmp_path, status):
    hub.add(REPO, own)
    hub.refusal = status
    with pytest.raises(FileNotFoundError, match=f"not in the cache, and the Hub answers {status}"):
        load(tmp_path)


def test_neither_cache_nor_connection_for_the_vae(hub, published, vae, tmp_path):
    hub.add(REPO, published)
    hub.add("user/vae", vae)
    with pytest.raises(FileNotFoundError, match=f"vae must be .*no directory '{VAE_REPO}'"):
        open_weights(REPO, cache_dir=tmp_path)
    hub.stop()
    with pytest.raises(FileNotFoundError, match=r"user/vae at 'main' lacks config\.json, diffusion_pytorch_model"):
        open_weights(REPO, vae="user/vae", cache_dir=tmp_path)


@pytest.mark.parametrize("offline", ["no connection", "local_files_only"])
@pytest.mark.parametrize("file", ["IFR.pth", "vae.safetensors"])
def test_partial_cache_names_the_file(hub, own, published, vae, tmp_path, file, offline):
    hub.add(REPO, own if file in own else published)
    hub.add(VAE_REPO, vae)
    open_weights(REPO, cache_dir=tmp_path)
    (path,) = tmp_path.glob(f"models--user--weights/snapshots/*/{file}")
    path.resolve().unlink()
    path.unlink()
    if offline == "no connection":
        hub.stop()
    with pytest.raises(FileNotFoundError) as caught:
        open_weights(REPO, cache_dir=tmp_path, local_files_only=offline == "local_files_only")
    assert f"{REPO} at 'main' lacks {file} (not in the cache, and " in str(caught.value)


@pytest.mark.parametrize("token", [None, "hf_secret"])
@pytest.mark.parametrize("argument", ["repo_or_dir", "vae"])
def test_no_such_repository(hub, own, tmp_path, argument, token):
    hub.add(REPO, own)
    arguments = {"repo_or_dir": REPO, argument: "user/nowhere"}
    with pytest.raises(FileNotFoundError, match=f"^{argument} must be .*no directory 'user/nowhere' and no repository"):
        open_weights(**arguments, cache_dir=tmp_path, token=token)


@pytest.mark.parametrize("argument", ["repo_or_dir", "vae"])
@pytest.mark.parametrize(
    "name", ["a/b/c", "./nowhere", "/nowhere", "no where", "user/a--b", "weights-", "weights.git", ""]
)
def test_name_of_no_repository(hub, own, tmp_path, argument, name):
    hub.add(REPO, own)
    with pytest.raises(FileNotFoundError, match=f"^{argument} must be a directory or a repository .*'{name}'"):
        open_weights(**{"repo_or_dir": REPO, argument: name}, cache_dir=tmp_path)
    assert not [request for request in hub.requests if REPO not in request.path]


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1", "0" * 40])
def test_no_such_revision(hub, own, tmp_path, revision):
    hub.add(REPO, own)
    with pytest.raises(FileNotFoundError, match=f"^revision must be .* of {REPO}, got '{revision}'"):
        load(tmp_path, revision=revision)


@pytest.mark.parametrize("missing", [["IFR.pth"], ["IFR.pth", "transformer_20.pth"]])
def test_repository_without_published_files(hub, published, tmp_path, missing):
    hub.add(REPO, {name: content for name, content in published.items() if name not in missing})
    with pytest.raises(FileNotFoundError) as caught:
        open_weights(REPO, cache_dir=tmp_path)
    named = [name for name in OWN + PUBLISHED if name in str(caught.value).partition(" Weights are ")[0]]
    assert sorted(named) == missing
    assert f"{REPO} at 'main'" in str(caught.value)
    assert "no such file in the repository" in str(caught.value)


@pytest.mark.parametrize("missing", [["vae.safetensors"], ["pose_encoder.safetensors", "vae.safetensors"]])
def test_repository_without_own_files(hub, own, tmp_path, missing):
    hub.add(REPO, {name: content for name, content in own.items() if name not in missing})
    with pytest.raises(FileNotFoundError) as caught:
        open_weights(REPO, cache_dir=tmp_path)
    assert sorted(name for name in OWN + PUBLISHED if name in str(caught.value)) == missing


def test_published_layout(hub, published, vae, tmp_path):
    sources = {REPO: hub.add(REPO, published), VAE_REPO: hub.add(VAE_REPO, vae)}
    weights = open_weights(REPO, cache_dir=tmp_path)
    assert list(weights.files) == list(PARTS)
    assert weights.sources == sources
    assert downloads(hub) == dict.fromkeys([*PUBLISHED, *vae], 1)


@pytest.mark.parametrize("name", ["v1", "a commit"])
def test_pinned_revision(hub, own, original, tmp_path, name):
    commit = hub.add(REPO, own, "main" if name == "a commit" else name)
    hub.add(REPO, {**own, "pose2id.json": b"{}"})
    generator = load(tmp_path, revision=commit if name == "a commit" else name)
    assert same_weights(generator, original)
    assert generator.sources == {REPO: commit}


def test_pinned_vae(hub, published, vae, tmp_path):
    hub.add(REPO, published)
    commit = hub.add(VAE_REPO, vae)
    hub.add(VAE_REPO, {"config.json": b"{}"})
    weights = open_weights(REPO, vae=f"{VAE_REPO}@{commit}", cache_dir=tmp_path)
    assert weights.sources[VAE_REPO] == commit
    assert weights.configs["vae"]["latent_channels"] == 4


def test_a_configuration_is_no_address(hub, own, tmp_path):
    content = json.loads(own["pose2id.json"])
    content["parts"]["denoising_unet"] = "somebody/else"
    directory = tmp_path / "own"
    directory.mkdir()
    for name, data in own.items():
        (directory / name).write_bytes(data)
    (directory / "pose2id.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must hold an object 'denoising_unet'"):
        load(tmp_path / "cache", directory)
    assert hub.requests == []


def test_errors_do_not_quote_the_token(hub, own, tmp_path):
    hub.add(REPO, own)
    with pytest.raises((OSError, ValueError)) as caught:
        load(tmp_path, token="hf_se\ncret")
    assert "cret" not in str(caught.value)


def test_main_is_followed(hub, own, tmp_path):
    old = hub.add(REPO, own)
    assert open_weights(REPO, cache_dir=tmp_path).sources == {REPO: old}
    new = hub.add(REPO, {"README.md": b"more to read"})
    hub.requests.clear()
    assert open_weights(REPO, cache_dir=tmp_path).sources == {REPO: new}
    assert downloads(hub) == {}  # the same contents


@pytest.mark.parametrize("layout", ["own", "published"])
def test_push_between_two_downloads(hub, own, published, vae, tmp_path, layout):
    files = own if layout == "own" else published
    commit = hub.add(REPO, files)
    hub.add(VAE_REPO, vae)
    hub.on_get = lambda path: hub.add(REPO, dict.fromkeys(files, b"of another commit"))
    weights = open_weights(REPO, cache_dir=tmp_path)
    assert weights.sources[REPO] == commit != hub.commit(REPO)
    assert {path.parent.name for path in weights.files.values() if REPO.split("/")[1] in str(path)} == {commit}
    assert all(weights.files[name].read_bytes() == files[weights.files[name].name] for name in list(PARTS)[:-1])


@pytest.mark.parametrize("how", ["closed", "reset", "short"])
def test_interrupted_download_is_finished(hub, long, original, tmp_path, how):
    hub.add(REPO, long)
    hub.truncate(REPO, LONG, 12 << 20, how=how)
    try:
        generator = load(tmp_path)
    except CLIENT_ERRORS:
        assert LONG not in snapshots(tmp_path)
        generator = load(tmp_path)
    assert same_weights(generator, original)
    (path,) = tmp_path.glob(f"models--*/snapshots/*/{LONG}")
    assert path.read_bytes() == long[LONG]
    if how == "closed":  # after the others only older clients resume
        assert [request.headers["Range"] for request in hub.requests if "Range" in request.headers]
    assert downloads(hub) == {**dict.fromkeys(OWN, 1), LONG: 2}


@pytest.mark.parametrize("how", ["closed", "reset", "short"])
def test_download_that_never_ends_well(hub, own, original, tmp_path, how):
    hub.add(REPO, own)
    hub.truncate(REPO, LONG, 1 << 20, how=how, times=20)
    for _ in range(2):
        with pytest.raises(ConnectionError, match=f"{LONG} of repository {REPO} at 'main' could not be downloaded"):
            load(tmp_path)
        assert LONG not in snapshots(tmp_path)
    hub.truncate(REPO, LONG, 0, times=0)
    assert same_weights(load(tmp_path), original)


@pytest.mark.parametrize(
    ("token", "logged_in", "sent"),
    [
        (None, None, None),
        (None, "hf_environment", "Bearer hf_environment"),
        ("hf_secret", None, "Bearer hf_secret"),
        ("hf_secret", "hf_environment", "Bearer hf_secret"),
        (False, "hf_environment", None),
    ],
)
def test_token(hub, published, vae, tmp_path, monkeypatch, token, logged_in, sent):
    if logged_in:
        monkeypatch.setenv("HF_TOKEN", logged_in)
    hub.add(REPO, published)
    hub.add(VAE_REPO, vae)
    open_weights(REPO, cache_dir=tmp_path, token=token)
    assert {request.headers["Authorization"] for request in hub.requests} == {sent}
    assert {request.method for request in hub.requests} == {"HEAD", "GET"}


def test_push(hub, original, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    address = original.push_to_hub("user/pushed", token="hf_secret")
    commit = hub.commit("user/pushed")
    assert type(address) is str
    assert address == f"{hub.endpoint}/user/pushed/commit/{commit}"
    assert {request.headers["Authorization"] for request in hub.requests} == {"Bearer hf_secret"}
    assert os.listdir(tmp_path) == []
    files = hub.files("user/pushed")
    assert {*OWN, "README.md"} <= {*files}
    assert b"\nlicense: creativeml-openrail-m\n" in files["README.md"]

    generator = load(tmp_path, "user/pushed")
    assert pictures(generator) == expected
    assert generator.sources == {"user/pushed": commit}


def test_push_to_a_repository_that_is_there(hub, original, own):
    before = hub.add(REPO, {"notes.txt": b"kept"})
    address = original.push_to_hub(REPO, token="hf_secret")
    assert before not in address
    assert address.endswith(hub.commit(REPO))
    assert hub.files(REPO) == {"notes.txt": b"kept", **own}


def test_push_of_parts_that_cannot_be_saved(hub, original):
    class Foreign(PoseEncoder):
        pass

    generator = tiny.generator(pose_encoder=Foreign(32))
    with pytest.raises(TypeError, match="pose_encoder must be a PoseEncoder to be saved, got Foreign"):
        generator.push_to_hub("user/pushed", token="hf_secret")
    assert hub.requests == []


def test_push_to_what_is_no_name(hub, original, monkeypatch):
    monkeypatch.setattr(IdentityGenerator, "save_pretrained", None)
    with pytest.raises(ValueError, match="a/b/c"):
        original.push_to_hub("a/b/c", token="hf_secret")
    assert hub.requests == []


def test_push_without_a_token(hub, original):
    with pytest.raises(HfHubHTTPError, match="401"):
        original.push_to_hub("user/pushed")
    assert not hub.has("user/pushed")


def test_offline_by_the_environment_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        IdentityGenerator.from_pretrained("user/name", cache_dir=tmp_path)
