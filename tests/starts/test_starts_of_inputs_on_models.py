"""CorDA, EVA and its ranks from `fallow.probe`, on a language model with padding and a UNet, on both hosts."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import fallow
from fallow.core.quantized import quantize_
from fallow.core.views import view_of
from observed import components_of, covariance_of, layer_inputs, observed

pytestmark = pytest.mark.filterwarnings("ignore:.*seen fewer tokens than inputs")
hosts = pytest.mark.parametrize("host", ["own", "peft"])


def attached(host, model, targets, **given):
    if host == "own":
        return fallow.attach(model, "lora", targets, **given)
    return get_peft_model(model, fallow.LoRAConfig(target_modules=targets, **given))


def deltas(model):
    return [module for module in model.modules() if isinstance(module, fallow.Delta)]


def text(pad, count=4):
    """Batches of 3 sequences of 12, of which the last ends at 7; what stands after it is `pad`."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        ids, mask = torch.randint(1, 60, (3, 12), generator=generator), torch.ones(3, 12).long()
        ids[2, 7:], mask[2, 7:] = pad, 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def language_model(make):
    torch.manual_seed(0)
    return make().eval()


STARTS = {
    "corda": ({"input_covariance"}, lambda found: {"start": fallow.CorDA(found)}),
    "corda kpa": ({"input_covariance"}, lambda found: {"start": fallow.CorDA(found, mode="kpa")}),
    "eva": ({"activation"}, lambda found: {"start": fallow.EVA(found), "budget": fallow.EVARanks(found)}),
}
starts = pytest.mark.parametrize("start", STARTS)


@hosts
@starts
def test_a_language_model_starts_as_the_base_and_padding_does_not_matter(host, start, tiny_gpt2, tmp_path):
    want, options = STARTS[start]
    factors = []
    for pad in (0, 61):
        found = fallow.probe(language_model(tiny_gpt2), text(pad), want=want)
        model = attached(host, language_model(tiny_gpt2), ["c_attn", "c_fc"], rank=4, **options(found))
        factors.append([(delta.A.detach(), delta.B.detach()) for delta in deltas(model)])
    for one, two in zip(*factors, strict=True):
        torch.testing.assert_close(one[0], two[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one[1], two[1], atol=1e-5, rtol=1e-4)
    ids = text(0)[0]["input_ids"]
    base = language_model(tiny_gpt2)(ids).logits
    torch.testing.assert_close(model.eval()(ids).logits, base, atol=1e-4, rtol=1e-4)
    ranks = [delta.A.shape[0] for delta in deltas(model)]
    assert sum(ranks) == 16  # four layers
    for delta in deltas(model):
        delta.B.data += 0.1 * torch.randn_like(delta.B)
    said = model(ids).logits
    fallow.to_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(language_model(tiny_gpt2), tmp_path).eval()
    torch.testing.assert_close(plain(ids).logits, said, atol=1e-4, rtol=1e-4)


@hosts
def test_layers_of_a_unet_start_where_their_own_inputs_say(host, tiny_unet):
    torch.manual_seed(0)
    base = tiny_unet().eval()
    state = base.state_dict()

    def fresh():
        model = tiny_unet().eval()
        model.load_state_dict(state)
        return model

    def batch():
        latents, words = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
        return {"sample": latents, "timestep": torch.tensor([5, 300]), "encoder_hidden_states": words}

    batches = [batch() for _ in range(3)]
    targets = ["to_q", "to_k", "conv1"]
    found = fallow.probe(fresh(), batches, want={"activation", "input_covariance"}, targets=targets)
    for start in (fallow.EVA(found), fallow.CorDA(found)):
        model = attached(host, fresh(), targets, rank=3, start=start)
        torch.testing.assert_close(model(**batches[0]).sample, base(**batches[0]).sample, atol=1e-4, rtol=1e-4)
        assert len(deltas(model)) == len(found) > 8
        if isinstance(start, fallow.EVA):
            for delta in deltas(model):
                torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(3), atol=1e-5, rtol=0)
        else:
            assert all(delta.B.abs().max() > 0 for delta in deltas(model))
    crossed = {name: one for name, one in found.items() if "attn2.to_k" in name}
    assert crossed  # what text gives, 16 wide; the query's input is another
    assert {one.shape[1] for one in crossed.values()} == {16}


def test_what_the_probe_finds_gives_the_starts_of_the_equations():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Flatten(1), nn.Linear(96, 20))
    images = [torch.randn(30, 2, 4, 4) + 0.2 for _ in range(4)]
    seen = layer_inputs(net, images)
    found = fallow.probe(
        net, images, want={"input_covariance", "activation"}, targets=["0", "2"], components=8, center=False
    )
    wanted = observed(net, images, 8, center=False)
    for name in ("0", "2"):
        torch.testing.assert_close(found[name].covariance, covariance_of(seen[name]), atol=1e-5, rtol=1e-4)
        exact = components_of(seen[name], 3, center=False)
        cosines = (found[name].activation.directions[:1] * exact.directions[:1]).sum(1).abs()
        assert cosines.min() > 0.99
    ours = fallow.attach(net, "lora", ["0", "2"], rank=3, start=fallow.CorDA(found))
    for delta, name in zip(deltas(ours), ("0", "2"), strict=True):
        w = view_of(net.get_submodule(name)).read(net.get_submodule(name).weight.detach())
        c = wanted[name].covariance
        u = torch.linalg.svd((w @ (c + 0.01 * c.diagonal().mean() * torch.eye(len(c)))).double())[0][:, :3]
        torch.testing.assert_close(delta.B @ delta.A, (u @ u.T @ w.double()).float(), atol=1e-4, rtol=1e-3)


METHODS = {
    "dora": {"rank": 4},
    "sora": {"rank": 4, "threshold": 0.0},
    "codyra": {"rank": 4, "max_kappa": 0.0},
    "dylora": {"rank": 4, "update": "full"},
    "pego": {"rank": 2, "group": 2},
}


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 20))


@pytest.mark.parametrize("method", METHODS)
@starts
def test_other_methods_with_a_pair_start_as_the_base_and_come_back_from_their_file(method, start, tmp_path):
    want, options = STARTS[start]
    x = torch.randn(80, 16)
    given = options(fallow.probe(small(), x.split(20), want=want))
    if method == "pego":
        given.pop("budget", None)  # whose rank is one of a group
    model = fallow.attach(small(), method, ["0", "2"], **METHODS[method], **given).eval()
    torch.testing.assert_close(model(x), small()(x), atol=1e-5, rtol=1e-4)
    for delta in deltas(model):
        delta.randomize()
    said = model(x)
    assert (said - small()(x)).abs().max() > 1e-3
    fallow.save(model, tmp_path / "it")
    assert torch.equal(fallow.load(small(), tmp_path / "it").eval()(x), said)


@pytest.mark.parametrize("mode", ["int8", "nf4"])
@starts
def test_quantised_bases_need_forward_passes_alone(mode, start):
    def base():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        quantize_(net, mode)
        return net

    want, options = STARTS[start]
    x = torch.randn(200, 64)
    model = fallow.attach(base(), "lora", rank=4, **options(fallow.probe(base(), x.split(100), want=want)))
    torch.testing.assert_close(model(x), base()(x), atol=1e-4, rtol=1e-4)
    first = deltas(model)[0]
    if "eva" not in start:
        u = torch.linalg.qr(first.B)[0]
        w = first.B @ first.A
        torch.testing.assert_close(u @ u.T @ w, w, atol=1e-5, rtol=1e-4)
        assert w.norm() > 0.01


def test_layers_without_inputs_in_numbers_are_refused_by_name(tiny_gpt2):
    found = fallow.probe(language_model(tiny_gpt2), text(0), want={"activation", "input_covariance"})
    for start in (fallow.EVA(found), fallow.CorDA(found)):
        with pytest.raises(fallow.DataError, match=r"'transformer\.wte' is not among the 8 layers of these statistics"):
            attached("own", language_model(tiny_gpt2), ["wte"], rank=4, start=start)
