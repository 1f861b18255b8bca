"""Inputs of layers: covariances as of one stack of rows, each shared input taken once, components as of an SVD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.probe import probe
from fallow.core.probing.components import Convergence, Principal
from fallow.core.probing.inputs import Inputs
from fallow.core.probing.layers import layers_of
from fallow.core.probing.options import Options


class Heads(nn.Module):
    """Query, key, value of the same tensor; `other` of an equal one that is not the same."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, 4), nn.Linear(width, 3), nn.Linear(width, width)
        self.other, self.out = nn.Linear(width, 2), nn.Linear(4 + 3 + width + 2, 5)
        self.stray = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = input_ids
        parts = [self.q(x), self.k(x.clone() if self.stray else x), self.v(x), self.other(x.clone())]
        return self.out(torch.cat(parts, -1))


def covariance(stacks: list[Tensor], scale: str = "official") -> Tensor:
    """The equation, of the flattened inputs of each call."""
    total = torch.zeros(stacks[0].shape[1], stacks[0].shape[1], dtype=torch.float64)
    for x in stacks:
        divisor = {"official": x.max().abs(), "max_abs": x.abs().max(), "none": torch.tensor(1.0)}[scale]
        total += (x / divisor).double().T @ (x / divisor).double()
    return (total / len(stacks)).float()


# -- covariance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["official", "max_abs", "none"])
def test_covariance_of_batches_of_sequences_is_that_of_the_flattened_stack(scale: str) -> None:
    model, data = Heads(), [torch.randn(size, 7, 6) - 0.3 for size in (3, 1, 2)]
    stats = probe(model, data, "input_covariance", scale=scale)
    assert torch.allclose(stats["q"].covariance, covariance([x.flatten(0, 1) for x in data], scale), atol=1e-6)
    assert stats["q"].covariance is stats["k"].covariance is stats["v"].covariance
    assert (stats["q"].tokens, stats["q"].calls) == (42, 3)


@pytest.mark.parametrize("scale", ["official", "max_abs", "none"])
def test_covariance_by_sample_is_the_same_whatever_the_batches(scale: str) -> None:
    model, x = Heads(), torch.randn(6, 5, 6) * torch.arange(1.0, 7.0)[:, None, None]
    mask = torch.rand(6, 5) > 0.3
    mask[:, 0] = True
    expected = covariance([one[kept] for one, kept in zip(x, mask, strict=True)], scale)
    for cuts in ([6], [1] * 6, [4, 2]):
        data = [
            {"input_ids": part, "attention_mask": kept}
            for part, kept in zip(x.split(cuts), mask.split(cuts), strict=True)
        ]
        stats = probe(model, data, "input_covariance", scale=scale, scale_by="sample")
        assert torch.allclose(stats["q"].covariance, expected, rtol=1e-4, atol=1e-6)
    conv, images = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, groups=1)), torch.randn(4, 3, 5, 5)
    together, apart = (
        probe(conv, data, "input_covariance", targets=["0"], scale=scale, scale_by="sample")["0"].covariance
        for data in ([images], list(images.split(1)))
    )
    assert torch.allclose(together, apart, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_one_layer_has_an_empty_name() -> None:
    model, data = nn.Linear(5, 3), [(torch.randn(4, 5), torch.randint(3, (4,)))]
    stats = probe(model, data, {"input_covariance", "gradient", "activation"})
    assert list(stats) == [""]
    assert (stats[""].covariance.shape, stats[""].gradient.shape) == ((5, 5), (3, 5))


def test_inputs_of_zero_are_not_divided_by_their_maximum() -> None:
    for scale in ("official", "max_abs", "none"):
        stats = probe(Heads(), [torch.zeros(2, 3, 6)], "input_covariance", scale=scale)
        assert not stats["q"].covariance.any()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 3, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(2, 1), padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same", groups=2),
        nn.Conv1d(4, 3, 3, padding=1),
        nn.Conv3d(4, 2, (1, 3, 2), stride=(1, 2, 1)),
    ],
    ids=["stride", "dilated", "grouped", "1d", "3d"],
)
def test_covariance_of_a_convolution_is_that_of_the_patches_its_kernel_sees(conv: Any) -> None:
    model = nn.Sequential(conv)
    x = torch.randn(2, 4, *[7, 8, 9][: conv.weight.dim() - 2])
    layer = layers_of(model, ["0"], None)[0]
    rows = layer.rows(x, (), None, torch.Generator()).values
    # what the layer makes of its patches is what it makes of its input
    y = conv(x)
    groups = conv.groups
    weight = conv.weight.flatten(1).unflatten(0, (groups, -1))
    made = torch.einsum("ngpi,goi->ngop", rows.unflatten(0, (len(x), groups, -1)), weight)
    expected = y - conv.bias.view(-1, *[1] * (y.dim() - 2))
    assert torch.allclose(made.flatten(1, 2), expected.flatten(2), atol=1e-5)
    stats = probe(model, [x], "input_covariance", targets=["0"], scale="none", positions=None)
    assert torch.allclose(stats["0"].covariance, covariance([rows], "none"), rtol=1e-4, atol=1e-4)


def test_positions_of_a_convolution_are_a_sample_that_the_seed_decides() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1)), torch.randn(2, 3, 16, 16)
    few = [probe(model, [x], "input_covariance", targets=["0"], positions=50, seed=seed)["0"] for seed in (1, 1, 2)]
    assert [one.tokens for one in few] == [100, 100, 100]
    assert torch.equal(few[0].covariance, few[1].covariance)
    assert not torch.allclose(few[0].covariance, few[2].covariance)
    many = probe(model, [x], "input_covariance", targets=["0"], positions=250)["0"].covariance / 500
    full = probe(model, [x], "input_covariance", targets=["0"], positions=None)["0"].covariance / 512
    assert (many - full).norm() / full.norm() < 0.05


@pytest.mark.parametrize("want", ["input_covariance", "activation"])
def test_padding_does_not_matter(want: str) -> None:
    model, x, mask = Heads(), torch.randn(2, 5, 6), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    other = torch.where(mask[..., None] > 0, x, torch.randn_like(x) * 100)
    plain, padded = (probe(model, [{"input_ids": value, "attention_mask": mask}], want) for value in (x, other))
    assert plain["q"].tokens == padded["q"].tokens == 7
    kept = x[mask > 0]
    if want == "input_covariance":
        assert torch.equal(plain["q"].covariance, padded["q"].covariance)
        assert torch.allclose(plain["q"].covariance, covariance([kept]), atol=1e-6)
    else:
        assert torch.equal(plain["q"].activation.directions, padded["q"].activation.directions)
        assert torch.allclose(plain["q"].activation.mean, kept.mean(0), atol=1e-6)
    unmasked = probe(model, [{"input_ids": x, "attention_mask": mask}], want, mask=None)
    assert unmasked["q"].tokens == 10
    own = probe(
        model,
        [{"input_ids": x, "attention_mask": mask}],
        want,
        mask=lambda batch: [batch["attention_mask"][:, :3], mask],
    )
    assert own["q"].tokens == 7


def test_a_batch_that_is_all_padding_adds_nothing() -> None:
    model, x = Heads(), torch.randn(2, 5, 6)
    full = {"input_ids": x, "attention_mask": torch.ones(2, 5)}
    none = {"input_ids": x, "attention_mask": torch.zeros(2, 5)}
    stats = probe(model, [full, none], {"activation", "input_covariance"})
    assert stats["q"].tokens == 10
    assert torch.allclose(stats["q"].covariance, covariance([x.flatten(0, 1)]), atol=1e-6)


# -- sharing ----------------------------------------------------------------------------------------------------------


def _gathered(model: nn.Module, data: list[Tensor], **options: Any) -> Inputs:
    inputs = Inputs(
        layers_of(model, "all-linear", None), frozenset({"input_covariance", "activation"}), Options(**options)
    )
    inputs.watch()
    for x in data:
        inputs.begin(())
        model(x)
        inputs.end()
    inputs.leave()
    return inputs


def test_query_key_and_value_share_one_computation() -> None:
    model, data = Heads(), [torch.randn(2, 4, 6) for _ in range(3)]
    inputs = _gathered(model, data)
    assert inputs.steps == 3 * 3  # q with k and v, other, out; for each of three batches
    assert inputs.at["q"] is inputs.at["k"] is inputs.at["v"]
    assert inputs.at["other"] is not inputs.at["q"]
    assert [stand.layers for stand in inputs.stands()] == [{"q", "k", "v"}, {"other"}, {"out"}]
    stats = probe(model, data, "activation")
    assert [stats[name].input_of for name in stats] == ["q", "q", "q", "other", "out"]


def test_layers_that_part_have_sums_of_their_own_from_then_on() -> None:
    model, data = Heads(), [torch.randn(2, 4, 6) for _ in range(4)]
    stray = [False, False, True, True]
    inputs = Inputs(layers_of(model, "all-linear", None), frozenset({"input_covariance"}), Options())
    inputs.watch()
    for x, model.stray in zip(data, stray, strict=True):
        inputs.begin(())
        model(x)
        inputs.end()
    inputs.leave()
    assert inputs.at["q"] is inputs.at["v"]
    assert inputs.at["k"] is not inputs.at["q"]
    expected = covariance([x.flatten(0, 1) for x in data]) * 4
    assert torch.allclose(inputs.at["k"].covariance.total, expected, atol=1e-5)
    assert torch.allclose(inputs.at["q"].covariance.total, expected, atol=1e-5)
    assert inputs.steps == 2 * 3 + 2 * 4


def test_a_tensor_that_is_written_to_between_two_layers_is_not_shared() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.a(x)
            x.mul_(2)
            return y + self.b(x)

    x = torch.randn(5, 4)
    stats = probe(Writes(), [x], "input_covariance", scale="none")
    assert torch.allclose(stats["b"].covariance, 4 * stats["a"].covariance, atol=1e-5)


def test_a_layer_that_is_called_twice_counts_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(x)) + self.b(x)

    model, x = Twice(), torch.randn(5, 4)
    stats = probe(model, [x, x + 1], "input_covariance")
    assert (stats["a"].calls, stats["b"].calls) == (4, 2)
    with torch.no_grad():
        stacks = [x, model.a(x), x + 1, model.a(x + 1)]
    assert torch.allclose(stats["a"].covariance, covariance(stacks), atol=1e-6)
    assert torch.allclose(stats["b"].covariance, covariance([x, x + 1]), atol=1e-6)


def test_what_is_computed_again_for_the_backward_does_not_count() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=False)
            return self.b(h)

    data = [(torch.randn(5, 4), torch.randint(3, (5,)))]
    stats = probe(Checkpointed(), data, {"input_covariance", "gradient"})
    assert stats["a"].calls == 1


def test_torchs_fast_path_does_not_hide_the_layers_of_an_encoder() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])  # with which it would pack its tokens
    stats = probe(
        encoder, [torch.randn(2, 5, 8)], "input_covariance", lambda m, x: m(x, src_key_padding_mask=padding).sum(),
        mask=lambda batch: ~padding,
    )  # fmt: skip
    assert (stats["layers.0.linear1"].calls, stats["layers.0.linear1"].tokens) == (1, 8)
    assert stats.missing == ("layers.0.self_attn.out_proj",)
    assert not stats["layers.0.self_attn.out_proj"].shows_input


def test_the_first_projections_of_attention_show_what_they_are_given() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.MultiheadAttention(6, 2, batch_first=True)
            self.cross = nn.MultiheadAttention(6, 2, batch_first=True)
            self.apart = nn.MultiheadAttention(6, 2, kdim=4, vdim=5, batch_first=True)
            self.same = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.own(x, x, value=x)[0] + self.same(x)
            h = h + self.cross(h, x, x)[0]
            return self.apart(query=h, key=x[..., :4], value=x[..., 1:])[0]

    model, x = Two(), torch.randn(2, 7, 6)
    stats = probe(model, [x], {"input_covariance", "activation"})
    assert torch.allclose(stats["own.in_proj_weight"].covariance, covariance([x.flatten(0, 1)]), atol=1e-5)
    assert stats["same"].input_of == "own.in_proj_weight"
    key, value = (part.flatten(0, 1) for part in (x[..., :4], x[..., 1:]))
    assert torch.allclose(stats["apart.k_proj_weight"].covariance, covariance([key]), atol=1e-5)
    assert torch.allclose(stats["apart.v_proj_weight"].covariance, covariance([value]), atol=1e-5)
    assert stats["apart.q_proj_weight"].tokens == 14
    outputs = ("own.out_proj", "cross.out_proj", "apart.out_proj")
    assert set(stats.missing) == {"cross.in_proj_weight", *outputs}


def test_a_quantised_base_shows_its_inputs_and_its_gradients() -> None:
    from fallow.core.quantized import quantize_

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(80, 96), nn.GELU(), nn.Linear(96, 80))
    data = [(torch.randn(6, 80), torch.randint(80, (6,)))]
    want = {"gradient", "input_covariance", "activation"}
    expected = probe(plain, data, want, components=3)
    quantize_(plain, "int8")
    stats = probe(plain, data, want, components=3)
    assert torch.equal(stats["0"].covariance, expected["0"].covariance)
    assert torch.equal(stats["0"].activation.directions, expected["0"].activation.directions)
    assert (stats["0"].gradient - expected["0"].gradient).norm() / expected["0"].gradient.norm() < 0.05


# -- components -------------------------------------------------------------------------------------------------------


def decaying(count: int, width: int, mean: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    scales = 0.6 ** torch.arange(width).float()
    return (torch.randn(count, width, generator=generator) * scales) @ basis.T + mean


def exact(x: Tensor, q: int, center: bool) -> tuple[Tensor, Tensor]:
    x = x.double() - (x.double().mean(0) if center else 0)
    _, s, vt = torch.linalg.svd(x, full_matrices=False)
    return vt[:q].float(), (s[:q] ** 2 / s.square().sum()).float()


@pytest.mark.parametrize("center", [True, False])
def test_incremental_components_are_those_of_the_exact_svd_whatever_the_order(center: bool) -> None:
    x = decaying(240, 20, mean=0.5)
    directions, ratios = exact(x, 4, center)
    for order in (range(6), (5, 3, 1, 0, 2, 4)):
        known = Principal(8, center)
        for number in order:
            known = known.added(x[40 * number : 40 * (number + 1)])
        angles = torch.linalg.svdvals(known.known.directions[:4].double() @ directions.double().T).clamp(max=1).acos()
        assert angles.max() < 1e-2
        assert torch.allclose(known.known.ratios[:4], ratios, atol=1e-3)
        assert torch.allclose(known.known.directions @ known.known.directions.T, torch.eye(8), atol=1e-5)


def test_components_of_two_halves_merge_into_those_of_the_whole() -> None:
    x = decaying(200, 12, mean=1.0)
    halves = [Principal(12).added(part) for part in (x[:70], x[70:])]
    merged, whole = halves[0].merged(halves[1]).known, Principal(12).added(x).known
    assert torch.allclose(merged.singular, whole.singular, atol=1e-3)
    assert torch.allclose(merged.mean, whole.mean, atol=1e-6)
    assert torch.allclose(merged.directions[:5], whole.directions[:5], atol=1e-3)


def test_batches_of_fewer_rows_than_components_count_too() -> None:
    x = decaying(30, 8)
    known = Principal(5)
    for number in range(15):
        known = known.added(x[2 * number : 2 * number + 2])
    assert torch.allclose(known.known.ratios[:3], exact(x, 3, True)[1], atol=1e-2)


def test_inputs_that_do_not_vary_have_shares_of_zero() -> None:
    x = torch.full((20, 6), 3.3)
    known = Principal(4).added(x[:10]).added(x[10:]).known
    assert torch.equal(known.ratios, torch.zeros(4))
    assert torch.isfinite(known.directions).all()


def test_settled_layers_are_left_alone_and_the_pass_ends() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20))
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    rows = decaying(2000, 20)
    data = [rows[100 * i : 100 * (i + 1)] for i in range(20)]
    stats = probe(model, data, "activation", components=3)
    assert len(runs) < 20
    assert stats["0"].activation.converged.all()
    assert stats["0"].calls == len(runs) == stats.batches


def test_equal_singular_values_end_by_the_subspace_and_by_the_number_of_passes() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    generator = torch.Generator().manual_seed(0)
    data = [torch.linalg.qr(torch.randn(40, 16, generator=generator))[0] for _ in range(4)]
    options: dict[str, Any] = {"passes": 3, "center": False, "tolerance": 0.9999}
    by_component = probe(model, data, "activation", components=16, **options)
    assert by_component["0"].activation.tokens == 3 * 160  # never settled, and over nevertheless
    assert not by_component["0"].activation.converged.all()
    assert by_component.batches == 4
    whole = probe(model, data, "activation", components=16, converged="subspace", **options)
    assert whole["0"].activation.tokens == 80  # all directions there are span the same from the second batch on
    assert whole["0"].activation.converged.all()


def test_a_direction_counts_as_settled_by_its_cosine_or_by_the_subspace() -> None:
    before, turned = torch.eye(5)[:2], torch.eye(5)[[1, 0]]
    assert Convergence(0.99, "component").of(before, -before).tolist() == [True, True]
    assert Convergence(0.99, "component").of(before, turned).tolist() == [False, False]
    assert Convergence(0.99, "subspace").of(before, turned).tolist() == [True, True]
    assert Convergence(0.99, "subspace").of(before, torch.eye(5)[1:3]).tolist() == [False, False]
    assert Convergence(0.99).of(before, torch.eye(5)[:3]).tolist() == [True, True, False]


def test_ranks_tell_how_many_components_must_settle() -> None:
    """A layer of white inputs, whose components do not settle, and one of two directions, which get all of the rank."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sharp, self.white = nn.Linear(12, 3), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.sharp(x[..., :12]) + self.white(x[..., 12:])

    sharp = torch.zeros(20, 12)
    sharp[:10, 0], sharp[10:, 1] = 1.5, 1.0
    data = [torch.cat([sharp, torch.randn(20, 12)], 1) for _ in range(10)]
    every = probe(Two(), data, "activation", components=2, center=False, tolerance=0.999)
    assert every["white"].activation.tokens == 200  # waited for in vain
    assert every["sharp"].activation.tokens == 40
    some = probe(Two(), data, "activation", components=2, center=False, tolerance=0.999, rank=1)
    assert some["sharp"].activation.tokens == some["white"].activation.tokens == 40
    ratios = torch.cat([some["sharp"].activation.ratios, some["white"].activation.ratios])
    assert ratios[2:].max() < ratios[1]  # one rank on average: both for the sharp one


def test_not_finite_inputs_are_refused_by_the_layer() -> None:
    from fallow.core.errors import DataError

    x = torch.randn(4, 5, 6)
    x[0, 0, 0] = float("inf")
    for want in ("input_covariance", "activation"):
        with pytest.raises(DataError, match="'q'"):
            probe(Heads(), [x], want)


def test_statistics_come_of_a_diffusion_network_and_a_language_model(
    tiny_unet: Callable[[], nn.Module], tiny_gpt2: Callable[[], nn.Module]
) -> None:
    unet = tiny_unet()

    def denoise(model: nn.Module, batch: Tensor) -> Tensor:
        return F.mse_loss(model(batch, 10, torch.ones(2, 5, 16)).sample, batch)

    stats = probe(
        unet, [torch.randn(2, 4, 8, 8)], {"gradient", "activation", "input_covariance"}, denoise, "all-layers"
    )
    keys = [name for name in stats if name.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v"))]
    assert len({id(stats[name].covariance) for name in keys}) * 3 == len(keys)
    assert stats["conv_in"].covariance.shape == (36, 36)
    assert stats.missing == ()
    ids = torch.randint(64, (2, 8))
    text = probe(tiny_gpt2(), [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], "input_covariance")
    assert text["transformer.h.0.attn.c_attn"].covariance.shape == (32, 32)
    assert text["transformer.h.0.attn.c_attn"].tokens == 16


def test_a_shared_covariance_is_kept_once_and_changed_with_one_copy(
    peak_bytes: Callable[[Callable[[], object]], int],
) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(512, 4) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            return sum(layer(x) for layer in self.layers)

    model, data = Wide(), [torch.randn(2, 512) for _ in range(3)]
    one = 4 * 512 * 512
    assert one <= peak_bytes(lambda: probe(model, data, "input_covariance")) < 2.2 * one  # six layers, one sum
    alone = nn.Sequential(nn.Linear(512, 512))
    assert peak_bytes(lambda: probe(alone, data, "input_covariance")) < 1.2 * one  # changed in place
