"""Features from your own model, with side inputs; then centralization, and eq. 9 with pictures in other poses.

python examples/own_model.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pose2id import Centralizer, Extractor
from pose2id.demo.people import SyntheticPedestrians
from pose2id.extractor import Preprocess


class CameraAwareModel(nn.Module):
    """Stands for your ReID model: it takes a batch and camera labels and returns a tuple (features, feature maps)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 1)))
        self.camera = nn.Embedding(4, 64)

    def forward(self, images: Tensor, cam_label: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 64) and their maps."""
        maps = self.backbone(images)
        return maps.flatten(1) + 0.01 * self.camera(cam_label), maps


def main() -> None:
    """Extract, enhance and fuse."""
    torch.manual_seed(0)
    people = SyntheticPedestrians(10)
    q, g = people.query_gallery()
    cameras = torch.tensor(people.camids) - 1
    # transform= takes any callable from a PIL picture to a tensor, such as your torchvision transform.
    transform = Preprocess(size=(128, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    extractor = Extractor(CameraAwareModel(), transform=transform)

    # A keyword with one entry per image goes to the model with its image.
    query_feats, gallery_feats = (
        extractor([people[int(i)].image for i in index], cam_label=cameras[index]) for index in (q, g)
    )
    # The default method is safe: neighbours are added only where people appear more than once. Camera ids help most.
    query_feats, gallery_feats = Centralizer().enhance(
        query_feats, gallery_feats, query_camids=cameras[q], gallery_camids=cameras[g]
    )
    print("enhanced:", tuple(query_feats.shape), tuple(gallery_feats.shape))

    # Eq. 9 with a source of your own: pictures of the person on each image, here drawn from 8 sides.
    images = [people.render(pid, 1, 0).image for pid in (1, 2, 3)]
    sides = [[people.render(pid, 1, 0, yaw=45.0 * turn).image for turn in range(8)] for pid in (1, 2, 3)]
    fused = Centralizer(extractor, lambda images: sides, eta=2.0)(images, cam_label=cameras[:3])
    print("fused:", tuple(fused.shape))


if __name__ == "__main__":
    main()
