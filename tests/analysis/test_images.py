"""Figures of merit: checked against closed forms, plain references and a peer's formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fallow.analysis.features import GarmentNet
from fallow.analysis.images import alignment, frechet_distance, kernel_distance, to_tensor, vlhi


def reference_frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """As defined, with the square root of the product of the covariances by its eigenvalues."""
    x, y = a.double(), b.double()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    cx, cy = torch.cov(x.T), torch.cov(y.T)
    roots = torch.linalg.eigvals(cx @ cy).real.clamp(min=0).sqrt().sum()
    return float(gap + cx.trace() + cy.trace() - 2 * roots)


def sample(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, width, generator=rng) @ mix + shift


def test_frechet_distance_equals_the_definition():
    a, b = sample(200, 8, 0), sample(150, 8, 1, shift=0.7) * 1.3
    assert frechet_distance(a, b) == pytest.approx(reference_frechet(a, b), rel=1e-6)


def test_frechet_distance_of_gaussians_of_known_moments_is_the_closed_form():
    """Rows made so that mean and covariance are exact: (1 - 0)^2 * 4 + 4 (3 - 2)^2 over four equal dimensions."""
    basis = torch.cat([torch.eye(4), -torch.eye(4)]).double() * (7 / 2) ** 0.5  # covariance exactly the identity
    assert frechet_distance(basis * 3 + 1, basis * 2) == pytest.approx(4 * 1 + 4 * (3 - 2) ** 2, rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero_also_with_fewer_pictures_than_features():
    few = sample(10, 64, 0)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(few, few.flip(0)) == pytest.approx(0, abs=1e-8)


def test_few_pictures_bias_the_frechet_distance_but_not_the_kernel_distance():
    frechet_few = np.mean([frechet_distance(sample(20, 8, i), sample(20, 8, 100 + i)) for i in range(20)])
    frechet_many = np.mean([frechet_distance(sample(500, 8, i), sample(500, 8, 100 + i)) for i in range(20)])
    assert frechet_few > 10 * frechet_many
    kernel_few = [kernel_distance(sample(20, 8, i), sample(20, 8, 100 + i)) for i in range(60)]
    assert abs(np.mean(kernel_few)) < 3 * np.std(kernel_few) / 60**0.5
    assert kernel_distance(sample(20, 8, 0, shift=3.0), sample(20, 8, 1)) > 3 * max(kernel_few)


def test_kernel_distance_equals_the_double_sum():
    a, b = sample(6, 3, 0).double(), sample(5, 3, 1).double()
    scale = b.square().mean().sqrt()

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / scale**2 / 3 + 1) ** 3)

    within_a = sum(k(a[i], a[j]) for i in range(6) for j in range(6) if i != j) / 30
    within_b = sum(k(b[i], b[j]) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(k(x, y) for x in a for y in b) / 30
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-9)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize("shapes", [((1, 4), (9, 4)), ((9, 4), (9, 5)), ((9,), (9, 4))])
def test_distances_refuse_what_they_cannot_compare(distance, shapes):
    with pytest.raises(ValueError, match="equal D"):
        distance(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_vlhi_reproduces_the_papers_table():
    """SD 1.5, mean over the five sets (arXiv 2409.06633, main table): FID, CLIP -> VLHI, to two decimals."""
    table = {
        "LoRA 50M": (150.74, 27.96, 1.45), "LoRA 20M": (148.77, 27.97, 1.52), "LoRA 5M": (151.58, 28.00, 1.44),
        "AdaptFormer 50M": (146.62, 27.06, 1.18), "AdaptFormer 20M": (150.24, 27.39, 1.21),
        "AdaptFormer 5M": (156.88, 27.67, 1.13), "LT-SFT 50M": (150.18, 25.76, 0.49),
        "LT-SFT 20M": (155.48, 25.99, 0.42), "LT-SFT 5M": (165.72, 26.37, 0.27), "SaRA 50M": (134.96, 27.08, 1.55),
        "SaRA 20M": (136.92, 27.53, 1.69), "SaRA 5M": (147.80, 27.73, 1.44), "full": (133.69, 26.42, 1.30),
    }  # fmt: skip
    found = vlhi([row[0] for row in table.values()], [row[1] for row in table.values()])
    assert found == pytest.approx([row[2] for row in table.values()], abs=0.011)


def test_vlhi_counts_one_for_a_measure_in_which_all_are_equal():
    assert vlhi([3.0, 3.0], [0.1, 0.2]) == pytest.approx([1.0, 2.0])
    assert vlhi([3.0], [0.4]) == [2.0]


@pytest.mark.parametrize(
    ("distances", "alignments"), [([], []), ([1.0], [1.0, 2.0]), ([float("nan"), 1.0], [1.0, 2.0])]
)
def test_vlhi_refuses_groups_it_cannot_score(distances, alignments):
    with pytest.raises(ValueError, match="vlhi needs"):
        vlhi(distances, alignments)


def test_alignment_is_the_mean_probability_and_the_share_of_best_logits():
    torch.manual_seed(0)
    net = GarmentNet().eval()
    pictures, wanted = torch.rand(12, 3, 32, 32), torch.arange(12) % 10
    with torch.no_grad():
        logits = net(pictures)[0]
    found = alignment(net, pictures, wanted)
    assert found["alignment"] == pytest.approx(
        float(np.mean([logits.softmax(1)[i, w].item() for i, w in enumerate(wanted)])), rel=1e-5
    )
    assert found["recognised"] == pytest.approx((logits.argmax(1) == wanted).float().mean().item())


def test_garment_net_round_trips_through_its_folder(tmp_path):
    torch.manual_seed(0)
    net = GarmentNet(3, 2).eval()
    net.save_pretrained(tmp_path / "net", ["a", "b", "c"], ["x", "y"])
    again = GarmentNet.from_pretrained(tmp_path / "net")
    pictures = torch.rand(2, 3, 32, 32)
    assert torch.equal(net.features(pictures), again.features(pictures))
    assert again.garment_names == ["a", "b", "c"]
    assert net.features(pictures).shape == (2, 64)


def test_pictures_of_the_judges_size_come_through_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tensor = to_tensor([Image.fromarray(pixels)], 32)
    assert torch.equal(tensor[0].mul(255).round().byte().permute(1, 2, 0), torch.from_numpy(pixels))


def test_large_pictures_are_averaged_not_picked_at():
    """A one-pixel chequerboard of 512 px is grey at 32 px; every 16th pixel of it would be all black."""
    board = np.indices((512, 512)).sum(0) % 2 * 255
    picture = Image.fromarray(board.astype(np.uint8)).convert("RGB")
    tensor = to_tensor([picture], 32)
    assert (tensor - 0.5).abs().max() < 0.02


def test_wide_pictures_are_cut_to_their_central_square():
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    assert to_tensor([Image.fromarray(pixels)], 32).min() == 1.0
    assert to_tensor([Image.fromarray(pixels).convert("L"), Image.new("RGBA", (5, 9))], 32).shape == (2, 3, 32, 32)
