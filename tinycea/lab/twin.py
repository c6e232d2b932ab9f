"""The twin: the same network in PyTorch under the same parameter names, which `bench` races against and tests compare with."""
import torch
from torch import nn

F = torch.nn.functional


class LayerNorm2d(nn.Module):
    """Over the channels of (B,C,H,W); permuted, it is PyTorch's own kernel, in either memory layout its fastest form."""

    def __init__(self, C):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


class NAFBlock(nn.Module):
    def __init__(self, C, sca=True):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C)
        self.conv3 = nn.Conv2d(C, C, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1)) if sca else None
        self.conv4, self.conv5 = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(C, C, 1)
        self.norm1, self.norm2 = LayerNorm2d(C), LayerNorm2d(C)
        self.beta, self.gamma = nn.Parameter(torch.zeros(1, C, 1, 1)), nn.Parameter(torch.zeros(1, C, 1, 1))

    def forward(self, x):
        u = gate(self.conv2(self.conv1(self.norm1(x))))
        y = x + self.beta * self.conv3(u * self.sca(u) if self.sca else u)
        return y + self.gamma * self.conv5(gate(self.conv4(self.norm2(y))))


def gate(x):
    return torch.mul(*x.chunk(2, 1))


class CEA(nn.Module):
    """The layer without its switches on features (B,C,H,W); `parameters` are arrays under tinycea's names."""

    def __init__(self, parameters, heads):
        super().__init__()
        self.heads = heads
        for name, value in parameters.items():
            self.register_parameter(name.replace("norm.", "norm_"), nn.Parameter(torch.as_tensor(value).clone()))

    def forward(self, x):
        B, C, H, W = x.shape
        (R, D), h = self.Q.shape, self.heads
        X, Xhat = (t.permute(0, 2, 3, 1).reshape(B, H * W, C)
                   for t in (x, F.group_norm(x, 1, self.norm_weight, self.norm_bias, 1e-6)))
        K, V = ((Xhat @ weight).view(B, H * W, h, D // h).transpose(1, 2) for weight in (self.W_K, self.W_V))
        Q = self.Q.view(R, h, D // h).transpose(0, 1).expand(B, -1, -1, -1)
        Z = F.scaled_dot_product_attention(Q, K, V).transpose(1, 2).reshape(B, R, D)
        A, U = Z @ self.W_A, Z @ self.W_U
        S = X @ A.transpose(1, 2) * C**-0.5
        Y = X + S @ U * R**-0.5
        return Y.view(B, H, W, C).permute(0, 3, 1, 2)


class NAFNet(nn.Module):
    """NAFNet of a tinycea NAFNetConfig; `adapters` maps a stage's name to the module that follows it."""

    def __init__(self, config, adapters={}):
        super().__init__()
        width, levels, image = config.width, len(config.encoders), 3 * config.unshuffle**2
        self.unshuffle, self.multiple = config.unshuffle, config.multiple()
        self.adapters = nn.ModuleDict({stage.replace(".", "/"): module for stage, module in adapters.items()})
        self.intro, self.ending = nn.Conv2d(image, width, 3, padding=1), nn.Conv2d(width, image, 3, padding=1)
        stages = {name: nn.Sequential(*(NAFBlock(C, config.sca) for _ in range(n))) for name, (C, n) in config.stages().items()}
        self.encoders = nn.ModuleList(stages[f"encoders.{i}"] for i in range(levels))
        self.decoders = nn.ModuleList(stages[f"decoders.{i}"] for i in range(levels))
        self.middle_blks = stages["middle_blks"]
        self.downs = nn.ModuleList(nn.Conv2d(width * 2**i, width * 2**(i + 1), 2, 2) for i in range(levels))
        widths = [width * 2**i for i in reversed(range(levels))]
        self.ups = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * w, 4 * w, 1, bias=False), nn.PixelShuffle(2)) for w in widths)

    def forward(self, image):
        H, W = image.shape[2:]
        x = F.pixel_unshuffle(F.pad(image, (0, -W % self.multiple, 0, -H % self.multiple)), self.unshuffle)
        y, skips = self.intro(x), []
        for i, (encoder, down) in enumerate(zip(self.encoders, self.downs)):
            skips.append(self.adapt(f"encoders.{i}", encoder(y)))
            y = down(skips[-1])
        y = self.adapt("middle_blks", self.middle_blks(y))
        for i, (up, decoder) in enumerate(zip(self.ups, self.decoders)):
            y = self.adapt(f"decoders.{i}", decoder(up(y) + skips.pop()))
        return F.pixel_shuffle(self.ending(y) + x, self.unshuffle)[:, :, :H, :W]

    def adapt(self, stage, y):
        stage = stage.replace(".", "/")
        return self.adapters[stage](y) if stage in self.adapters else y


def named(module):
    """The parameters of any of these modules under tinycea's names."""
    return {name.replace("/", ".").replace("norm_", "norm."): value for name, value in module.named_parameters()}
