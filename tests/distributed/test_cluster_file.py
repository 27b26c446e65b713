"""examples/cluster.yaml by the checks of Ray's launcher; no machine is started."""

from __future__ import annotations

import pytest
from conftest import ROOT


def test_rays_launcher_accepts_the_file():
    util = pytest.importorskip("ray.autoscaler._private.util", reason='Ray is in the extra "distributed"')
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / "examples" / "cluster.yaml").read_text(encoding="utf-8"))
    util.validate_config({**config, "cluster_synced_files": []})  # which the launcher fills in
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}  # no worker beside the driver
    assert config["max_workers"] == config["available_node_types"]["gpu"]["min_workers"]
