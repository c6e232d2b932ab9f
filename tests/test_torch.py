"""Proves the whole: outputs and every gradient equal PyTorch's autograd in float64.

tinycea.lab.twin is the public architecture under its public names, (B,C,H,W) throughout; it calls none of tinycea's arithmetic.
"""
from dataclasses import replace

import numpy as np
import pytest

from tinycea import ablations, nafnet, optim
from tinycea.ablations import CEAConfig
from tinycea.nafnet import NAFNetConfig
from tinycea.ops import backend, reference
from tinycea.params import Params, copy_into, under
from tinycea.runtime import InputError
from tinycea.zoo import ADAPTERS, network

torch = pytest.importorskip("torch")
from tinycea.lab.twin import CEA as FastCEA  # noqa: E402  needs torch
from tinycea.lab.twin import NAFBlock, NAFNet, named  # noqa: E402

nn, F = torch.nn, torch.nn.functional
torch.set_num_threads(1)                                        # the images are small: threads would only wait for each other

RTOL = {"output": 1e-9, "gradient": 1e-9, "loss": 1e-12, "optimizer": 1e-12}   # largest difference over largest value, per tensor
EVERY_BACKEND = pytest.mark.parametrize("room", ("reference", "cpu"))


class Adapter(nn.Module):
    """`torch_cea` as a module, its parameters under tinycea's names."""

    def __init__(self, p, config):
        super().__init__()
        self.p, self.config = p, config

    def forward(self, x):
        return torch_cea(x, self.p, self.config)


def torch_cea(x, p, config):
    """The layer on features (B,C,H,W), parameters by name, one einsum per equation."""
    B, C, H, W = x.shape
    X = x.flatten(2).transpose(1, 2)
    if config.norm == "token":
        Xhat = F.layer_norm(X, (C,), p["norm.weight"], p["norm.bias"], 1e-6)
    else:
        Xhat = F.group_norm(x, 1, p["norm.weight"], p["norm.bias"], 1e-6).flatten(2).transpose(1, 2)
    if config.static != "AU":
        d = p["Q"].shape[1] // config.heads
        K, V, Q = (t.unflatten(-1, (config.heads, d)) for t in (Xhat @ p["W_K"], Xhat @ p["W_V"], p["Q"]))
        P = (torch.einsum("rhd,bnhd->bhrn", Q, K) / d**0.5).softmax(-1)
        Z = torch.einsum("bhrn,bnhd->brhd", P, V).flatten(2)
    A = p["A"].expand(B, -1, -1) if "A" in config.static else torch.einsum("brd,dc->brc", Z, p["W_A"])
    U = p["U"].expand(B, -1, -1) if "U" in config.static else torch.einsum("brd,dc->brc", Z, p["W_U"])
    S = torch.einsum("bnc,brc->bnr", X if config.tokens == "X" else Xhat, A) / C**0.5
    if config.affinity == "softmax":
        S = S.softmax(-1)
    if config.affinity == "topk":
        values, places = S.topk(config.topk, -1)
        S = torch.zeros_like(S).scatter(-1, places, values.softmax(-1))
    if config.level == "image":
        S = S.mean(1, keepdim=True).expand_as(S)
    Y = X + torch.einsum("bnr,brc->bnc", S, U) / config.rank**0.5
    return Y.transpose(1, 2).reshape(x.shape)


# ---- the comparison ----------------------------------------------------------------------------------------------------

def tensor(array, grad=True):
    return torch.tensor(np.ascontiguousarray(array), dtype=torch.float64, requires_grad=grad)


def nchw(array):
    return tensor(array.transpose(0, 3, 1, 2))


def nhwc(t):
    return t.detach().permute(0, 2, 3, 1).numpy()


def close(mine, right, kind):
    mine, right = np.asarray(mine), np.asarray(right)
    assert mine.shape == right.shape and np.abs(mine - right).max() <= RTOL[kind] * np.abs(right).max()


def random_params(shapes, rng):
    p = Params(shapes, np.float64)
    for name, value in p.items():                               # never the zeros and ones of an initialization
        scale = 0.5 if value.ndim == 1 or value.shape[0] == 1 else value[0].size**-0.5
        value[...] = rng.normal(float(name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))), scale, value.shape)
    return p


def agree(room, x, p, mine, theirs, parameters):
    """mine(x, p) -> y, cache and backward(dy, cache, g), against theirs(x) and its named parameters: y, dx and every gradient."""
    forward, backward = mine
    y, cache = forward(x, p, backend(room))
    dy = np.random.default_rng(9).normal(size=y.shape)
    g = p.zeros_like()
    dx = backward(dy, cache, g)
    x_torch = nchw(x)
    y_torch = theirs(x_torch)
    y_torch.backward(nchw(dy))
    close(y, nhwc(y_torch), "output")
    close(dx, nhwc(x_torch.grad), "gradient")
    assert parameters.keys() == g.keys()
    for name, value in parameters.items():
        assert value.grad.any(), name
        close(g[name], value.grad, "gradient")


CEA = [CEAConfig(rank=5, heads=3, probe_channels=12, topk=2, affinity=affinity, level=level, static=static,
                 tokens="Xhat" if "U" in static else "X")
       for affinity in ("signed", "softmax", "topk") for level in ("token", "image") for static in ("", "A", "U", "AU")]
CEA += [replace(CEA[0], norm=norm, tokens=tokens) for norm, tokens in (("token", "Xhat"), ("image", "Xhat"), ("token", "X"))]
CEA += [CEAConfig(rank=1, heads=1), CEAConfig(rank=11, heads=6), CEAConfig(rank=5, heads=2, affinity="topk", topk=5)]


@EVERY_BACKEND
@pytest.mark.parametrize(
    "config", CEA, ids=lambda c: f"R{c.rank}-{c.affinity}-{c.level}-{c.static or 'written'}-{c.norm}-{c.tokens}")
def test_cea_layer(room, config):
    rng = np.random.default_rng(0)
    p = random_params(ablations.shapes(6, config), rng)
    parameters = {name: tensor(value) for name, value in p.items()}
    agree(room, rng.normal(size=(2, 9, 7, 6)), p, (lambda x, p, ops: ablations.forward(x, p, config, ops), ablations.backward),
          lambda x: torch_cea(x, parameters, config), parameters)


@EVERY_BACKEND
def test_the_layer_that_bench_races_against(room):
    rng, config = np.random.default_rng(0), CEAConfig(rank=5, heads=3, probe_channels=12)
    p = random_params(ablations.shapes(6, config), rng)
    theirs = FastCEA(p, config.heads)
    agree(room, rng.normal(size=(2, 9, 7, 6)), p, (lambda x, p, ops: ablations.forward(x, p, config, ops), ablations.backward),
          theirs, named(theirs))


@EVERY_BACKEND
def test_nafblock(room):
    rng = np.random.default_rng(0)
    p, theirs = random_params(nafnet.block_shapes(6), rng), NAFBlock(6).double()
    theirs.load_state_dict({name: tensor(value) for name, value in p.items()})
    agree(room, rng.normal(size=(3, 5, 7, 6)), p, (nafnet.nafblock, nafnet.nafblock_backward),
          theirs, dict(theirs.named_parameters()))


def random_network(config, size, room, seed=0):
    """A whole network, its adapters too, at random weights."""
    rng = np.random.default_rng(seed)
    p = random_params(nafnet.shapes(config), rng)
    adapters = {name: tensor(value) for name, value in p.items() if name.startswith("adapters.")}
    layers = {stage: Adapter(under(adapters, f"adapters.{stage}"), config.adapter) for stage in config.adapted()}
    theirs = NAFNet(config, layers).double()
    theirs.load_state_dict({name: tensor(value) for name, value in p.items() if name not in adapters}, strict=True)
    agree(room, rng.random((2, *size, 3)), p, (lambda x, p, ops: nafnet.nafnet(x, p, config, ops), nafnet.nafnet_backward),
          theirs, dict(theirs.named_parameters()) | adapters)


NETWORKS = {"NAFNet, two levels": (NAFNetConfig(6, (2, 1), 3, (1, 2), 1, None), (13, 21)),
            "NAFNet, three levels": (NAFNetConfig(3, (1, 2, 1), 1, (2, 1, 1), 1, None), (13, 21)),
            "NAFNet, no middle": (NAFNetConfig(3, (1, 0), 0, (0, 1), 1, None), (6, 5)),
            "NAFNet, no levels": (NAFNetConfig(5, (), 2, (), 1, None), (5, 3)),
            "a row of pixels": (NAFNetConfig(4, (1,), 1, (1,), 2), (1, 5)),
            "no padding": (NAFNetConfig(4, (1,), 1, (1,), 2), (8, 12)),
            "the default": (NAFNetConfig(), (13, 21)),
            "unshuffled by 3, two levels": (NAFNetConfig(4, (1, 1), 1, (1, 1), 3), (13, 25)),
            "CEA and unshuffle 1": (NAFNetConfig(4, (1, 1), 1, (1, 1), 1), (7, 10)),
            "no channel attention": (NAFNetConfig(4, (1,), 1, (1,), 2, sca=False), (9, 14)),
            "unshuffled, no adapter": (NAFNetConfig(5, (1,), 1, (1,), 2, None), (13, 21))}
NETWORKS |= {f"slots {' '.join(slots) or 'none'}": (NAFNetConfig(4, (1, 1), 1, (1, 1), 2, slots=slots), (9, 14))
             for slots in ((), ("encoders.0",), ("middle_blks",), ("decoders.1", "encoders.1"))}
NETWORKS |= {f"adapter {name}": (replace(network(name), width=8, middle=1), (9, 14))
             for name in ADAPTERS if name.startswith("cea-")}


@EVERY_BACKEND
@pytest.mark.parametrize("name", NETWORKS)
def test_network(room, name):
    random_network(*NETWORKS[name], room)


# ---- official weights --------------------------------------------------------------------------------------------------

def trained(config, seed=0):
    """A torch NAFNet with random weights, random beta, gamma and norms among them."""
    torch.manual_seed(seed)
    theirs = NAFNet(replace(config, adapter=None)).double()
    for value in theirs.parameters():
        nn.init.normal_(value, std=0.3)
    return theirs


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith("NAFNet")])
def test_official_weights_give_the_official_image(name):
    config, size = NETWORKS[name]
    theirs, p = trained(config), Params(nafnet.shapes(config), np.float64)
    copy_into(p, theirs.state_dict(), "NAFNet")
    image = np.random.default_rng(0).random((2, *size, 3))
    close(nafnet.nafnet(image, p, config)[0], nhwc(theirs(nchw(image))), "output")


def official(p):
    """The part of the parameters that NAFNet has too."""
    return {name: value for name, value in p.items() if not name.startswith("adapters.")}


def test_official_weights_leave_adapters_alone():
    config = NAFNetConfig(4, (1,), 1, (1,), 1)
    p = nafnet.init(config, np.random.default_rng(0), np.float64)
    before = {name: value.copy() for name, value in p.items()}
    state = trained(config).state_dict()
    copy_into(official(p), {name: value.numpy() for name, value in state.items()}, "NAFNet")
    for name, value in p.items():
        assert np.array_equal(value, before[name] if name.startswith("adapters.") else state[name])


@pytest.mark.parametrize("spoil, named", [
    (lambda s: s.pop("middle_blks.0.beta"), "middle_blks.0.beta is missing"),
    (lambda s: s.pop("ending.bias"), "ending.bias is missing"),
    (lambda s: s.update({"ups.0.0.bias": torch.zeros(16)}), "ups.0.0.bias is unknown"),
    (lambda s: s.update({"adapters.middle_blks.W_U": torch.zeros(8, 8)}), "adapters.middle_blks.W_U is unknown"),
    (lambda s: s.update({"intro.weight": torch.zeros(3, 4, 3, 3)}), r"intro.weight .*\(3, 4, 3, 3\).*\(4, 3, 3, 3\)"),
    (lambda s: s.update({"encoders.0.0.beta": torch.zeros(4)}), r"encoders.0.0.beta .*\(4,\).*\(1, 4, 1, 1\)"),
    (lambda s: s["decoders.0.0.gamma"].fill_(torch.nan), "decoders.0.0.gamma .*not finite")])
def test_foreign_weights_are_refused_by_name(spoil, named):
    config = NAFNetConfig(4, (1,), 1, (1,), 1)
    p = nafnet.init(config, np.random.default_rng(0))
    before, state = p.flat.copy(), trained(config).state_dict()
    spoil(state)
    with pytest.raises(InputError, match=named):
        copy_into(official(p), state, "NAFNet")
    assert np.array_equal(p.flat, before)


# ---- losses and the optimizer ------------------------------------------------------------------------------------------

@EVERY_BACKEND
def test_psnr_loss(room):
    rng = np.random.default_rng(0)
    pred, target = rng.random((3, 5, 7, 3)), rng.random((3, 5, 7, 3))
    y, cache = backend(room).psnr_loss(pred, target)
    gradients = backend(room).psnr_loss_backward(0.7, cache)
    a, b = nchw(pred), nchw(target)
    y_torch = (10 * torch.log10(((a - b)**2).mean((1, 2, 3)) + 1e-8)).mean()
    (0.7 * y_torch).backward()
    close(y, y_torch.item(), "loss")
    for mine, right in zip(gradients, (a, b), strict=True):
        close(mine, nhwc(right.grad), "loss")


@pytest.mark.parametrize("betas, eps", [((0.9, 0.99), 1e-8), ((0.8, 0.95), 1e-3)])
def test_adamw_steps(betas, eps):
    """Five steps with a changing rate; decay for weights and none for biases, norms, beta and gamma."""
    config, rng, decay = NAFNetConfig(4, (1,), 1, (1,), 2, adapter=CEAConfig(rank=3, heads=2)), np.random.default_rng(0), 0.3
    p = random_params(nafnet.shapes(config), rng)
    theirs = {name: nn.Parameter(tensor(value)) for name, value in p.items()}

    def free(name):
        return name.split(".")[-1] in ("bias", "beta", "gamma") or "norm" in name
    groups = [{"params": [v for n, v in theirs.items() if not free(n)], "weight_decay": decay},
              {"params": [v for n, v in theirs.items() if free(n)], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps)
    m, v = p.zeros_like(), p.zeros_like()
    for step, lr in enumerate((1e-3, 3e-2, 1e-2, 1e-4, 5e-2), 1):
        g = p.zeros_like()
        g.flat[...] = rng.normal(size=g.flat.shape) * 10.0**rng.integers(-4, 3, g.flat.shape)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        for name, value in theirs.items():
            value.grad = tensor(g[name], False)
        optimizer.step()
        before = g.flat.copy()
        reference.adamw(p.flat, g.flat, m.flat, v.flat, step, lr, decay * optim.decay_mask(p), betas, eps)
        assert np.array_equal(g.flat, before)
        for name, value in theirs.items():
            close(p[name], value.detach(), "optimizer")


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e6])
def test_clipping(limit):
    g = np.random.default_rng(0).normal(size=1001)
    right = nn.Parameter(torch.zeros(1001, dtype=torch.float64))
    right.grad = tensor(g, False)
    norm = nn.utils.clip_grad_norm_([right], limit)
    assert optim.clip_by_norm(g, limit) == pytest.approx(float(norm), rel=RTOL["optimizer"])
    if limit < norm:
        right.grad *= (norm + 1e-6) / norm                      # PyTorch divides by norm + 1e-6
    close(g, right.grad, "optimizer")
