"""HAT and HMANet in their plain form, to compare with: what a straightforward reading of the papers gives.

Tokens (B, H W, C) between blocks, windows cut with copies, all scores materialised, the position bias gathered
and the shift mask rebuilt in every forward pass, overlapping windows by `unfold`. No caches, no fused kernels.
The parameters have the published names, so `plain_form(network)` takes over the weights of ours.

Axes in tensor names: b batch, h height, w width, l = h w, c channels, v windows of all images, n/m tokens of a
window, a heads, d channels of a head, g windows of one image.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.blocks import UpscalingNetwork, upsampler
from model.hmanet import EXPANSION, SQUEEZE


def plain_form(network: UpscalingNetwork) -> nn.Module:
    """The same network with the same weights, in plain form, in the same mode."""
    plain = PlainNetwork(network.config)
    plain.load_state_dict(network.state_dict())
    return plain.train(network.training)


def cut(x_bhwc: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (V, N, C)."""
    b, h, w, c = x_bhwc.shape
    x = x_bhwc.view(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, c)


def join(x_vnc: Tensor, window: int, h: int, w: int) -> Tensor:
    """(V, N, C) -> (B, H, W, C)."""
    x = x_vnc.view(-1, h // window, w // window, window, window, x_vnc.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h, w, x_vnc.shape[-1])


def rebuilt_mask(h: int, w: int, window: int) -> Tensor:
    """(G, N, N): regions of the shifted image numbered, pairs of different regions forbidden by -100."""
    region = torch.zeros(1, h, w, 1)
    parts = (slice(0, -window), slice(-window, -(window // 2)), slice(-(window // 2), None))
    for number in range(9):
        region[:, parts[number // 3], parts[number % 3]] = number
    region_gn = cut(region, window).squeeze(-1)
    difference_gnn = region_gn[:, None] - region_gn[:, :, None]
    return difference_gnn.masked_fill(difference_gnn != 0, -100.0)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias_anm: Tensor, mask_gnm: Tensor | None = None) -> Tensor:
    """(V, A, N, D), twice (V, A, M, D) -> (V, N, A D)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias_anm[None]
    if mask_gnm is not None:
        scores = scores.view(-1, len(mask_gnm), *scores.shape[1:]) + mask_gnm[None, :, None]
        scores = scores.flatten(0, 1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def split(x_vnc: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(V, N, parts A D) -> `parts` times (V, A, N, D)."""
    v, n, c = x_vnc.shape
    return tuple(x_vnc.reshape(v, n, parts, num_heads, c // parts // num_heads).permute(2, 0, 3, 1, 4))


class PlainMlp(nn.Sequential):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim)


class PlainScores(nn.Module):
    def __init__(self, dim: int, window: int, num_heads: int, with_qkv: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim) if with_qkv else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_vnc: Tensor, index_nn: Tensor, mask_gnn: Tensor | None) -> Tensor:
        bias_nna = self.relative_position_bias_table[index_nn.view(-1)].view(*index_nn.shape, -1)
        q, k, v = split(self.qkv(x_vnc), 3, self.num_heads)
        return self.proj(plain_attention(q, k, v, bias_nna.permute(2, 0, 1).contiguous(), mask_gnn))


class PlainChannelAttention(nn.Module):
    def __init__(self, dim: int, squeeze_factor: int) -> None:
        super().__init__()
        narrow = dim // squeeze_factor
        layers = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, narrow, 1), nn.ReLU(), nn.Conv2d(narrow, dim, 1))
        self.attention = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, x_bchw: Tensor) -> Tensor:
        return x_bchw * self.attention(x_bchw)


class PlainConvBlock(nn.Module):
    def __init__(self, dim: int, compress_ratio: int, squeeze_factor: int) -> None:
        super().__init__()
        first = nn.Conv2d(dim, dim // compress_ratio, 3, padding=1)
        second = nn.Conv2d(dim // compress_ratio, dim, 3, padding=1)
        self.cab = nn.Sequential(first, nn.GELU(), second, PlainChannelAttention(dim, squeeze_factor))

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.cab(x_bchw)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    if not training or rate == 0:
        return x
    return x.div(1 - rate) * (torch.rand((len(x),) + (1,) * (x.ndim - 1)) >= rate)


class PlainWindowBlock(nn.Module):
    """HAT's hybrid block, or without `conv_block` HMANet's fused attention block."""

    def __init__(self, config: dict[str, Any], num_heads: int, shift: int, rate: float) -> None:
        super().__init__()
        dim, self.window, self.shift, self.rate = config["embed_dim"], config["window_size"], shift, rate
        self.conv_scale = config.get("conv_scale")
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = PlainScores(dim, self.window, num_heads, with_qkv=self.conv_scale is not None)
        if self.conv_scale is None:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.conv_block = PlainConvBlock(dim, config["compress_ratio"], config["squeeze_factor"])
        self.mlp = PlainMlp(dim, int(dim * config["mlp_ratio"]))

    def forward(self, x_blc: Tensor, size: tuple[int, int], index: dict[str, Tensor], mask_gnn: Tensor) -> Tensor:
        normed_bhwc = self.norm1(x_blc).view(-1, *size, x_blc.shape[-1])
        shifted = normed_bhwc.roll((-self.shift, -self.shift), (1, 2)) if self.shift else normed_bhwc
        windows_vnc = cut(shifted, self.window)
        windows_vnc = windows_vnc if self.conv_scale is not None else self.qkv(windows_vnc)
        attended = join(self.attn(windows_vnc, index["SA"], mask_gnn if self.shift else None), self.window, *size)
        attended = attended.roll((self.shift, self.shift), (1, 2)) if self.shift else attended
        out_blc = x_blc + drop_path(attended.view(x_blc.shape), self.rate, self.training)
        if self.conv_scale is not None:
            conv_bchw = self.conv_block(normed_bhwc.permute(0, 3, 1, 2))
            out_blc = out_blc + conv_bchw.permute(0, 2, 3, 1).contiguous().view(x_blc.shape) * self.conv_scale
        return out_blc + drop_path(self.mlp(self.norm2(out_blc)), self.rate, self.training)


class PlainOverlapBlock(nn.Module):
    def __init__(self, config: dict[str, Any], num_heads: int) -> None:
        super().__init__()
        dim, self.window, self.num_heads = config["embed_dim"], config["window_size"], num_heads
        self.overlap = self.window + int(self.window * config["overlap_ratio"])
        offsets = (self.window + self.overlap - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        rim = (self.overlap - self.window) // 2
        self.unfold = nn.Unfold((self.overlap, self.overlap), stride=self.window, padding=rim)
        self.mlp = PlainMlp(dim, int(dim * config["mlp_ratio"]))

    def forward(self, x_blc: Tensor, size: tuple[int, int], index: dict[str, Tensor], mask_gnn: Tensor) -> Tensor:
        c = x_blc.shape[-1]
        qkv_bhwc = self.qkv(self.norm1(x_blc)).view(-1, *size, 3 * c)
        q_vnc = cut(qkv_bhwc[..., :c].contiguous(), self.window)
        patches = self.unfold(qkv_bhwc[..., c:].permute(0, 3, 1, 2))
        kv_vmc = patches.view(len(x_blc), 2 * c, self.overlap**2, -1).permute(0, 3, 2, 1).contiguous().flatten(0, 1)
        (q,), (k, v) = split(q_vnc, 1, self.num_heads), split(kv_vmc, 2, self.num_heads)
        bias = self.relative_position_bias_table[index["OCA"].view(-1)].view(*index["OCA"].shape, -1)
        attended_vnc = plain_attention(q, k, v, bias.permute(2, 0, 1).contiguous())
        x_blc = self.proj(join(attended_vnc, self.window, *size).view(x_blc.shape)) + x_blc
        return x_blc + self.mlp(self.norm2(x_blc))


class PlainFusedConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        wide = dim * EXPANSION
        self.pre_norm, self.norm1 = nn.LayerNorm(dim), nn.LayerNorm(wide)
        self.fused_conv, self.conv3_1x1 = nn.Conv2d(dim, wide, 3, padding=1), nn.Conv2d(wide, dim, 1)
        self.se = nn.Module()
        self.se.fc1, self.se.fc2 = nn.Conv2d(wide, wide // SQUEEZE, 1), nn.Conv2d(wide // SQUEEZE, wide, 1)

    def forward(self, x_blc: Tensor, size: tuple[int, int], index: dict[str, Tensor], mask_gnn: Tensor) -> Tensor:
        x_bchw = self.pre_norm(x_blc.view(-1, *size, x_blc.shape[-1])).permute(0, 3, 1, 2)
        x_bhwc = self.fused_conv(x_bchw).permute(0, 2, 3, 1).contiguous()
        x_bchw = F.gelu(self.norm1(x_bhwc).permute(0, 3, 1, 2).contiguous())
        gate = self.se.fc2(F.silu(self.se.fc1(x_bchw.mean((2, 3), keepdim=True)))).sigmoid()
        out_bhwc = self.conv3_1x1(x_bchw * gate).permute(0, 2, 3, 1).contiguous()
        return out_bhwc.view(x_blc.shape) + x_blc


class PlainPositionedAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        narrow = dim // 16
        self.pos = nn.Module()
        self.pos.pos_proj = nn.Linear(2, narrow)
        for name, out in (("pos1", narrow), ("pos2", narrow), ("pos3", num_heads)):
            self.pos.add_module(name, nn.Sequential(nn.LayerNorm(narrow), nn.ReLU(), nn.Linear(narrow, out)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        axes = [torch.arange(length) for length in size]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        offsets = (places[:, :, None] - places[:, None]).permute(1, 2, 0).to(q)
        bias_nna = self.pos.pos3(self.pos.pos2(self.pos.pos1(self.pos.pos_proj(offsets))))
        return plain_attention(q, k, v, bias_nna.permute(2, 0, 1))


class PlainGridBlock(nn.Module):
    def __init__(self, config: dict[str, Any], num_heads: int) -> None:
        super().__init__()
        dim, self.window, self.interval = config["embed_dim"], config["window_size"], config["interval_size"]
        self.num_heads = num_heads // 2
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.grid_proj, self.fc = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim // 2), nn.Linear(dim, dim)
        self.grid_attn = nn.Module()
        self.grid_attn.attn_transform1 = PlainPositionedAttention(dim // 2, self.num_heads)
        self.grid_attn.attn_transform2 = PlainPositionedAttention(dim // 2, self.num_heads)
        self.window_attn = PlainScores(dim // 4, self.window, self.num_heads, with_qkv=False)
        self.window_attn_s = PlainScores(dim // 4, self.window, self.num_heads, with_qkv=False)
        self.mlp = PlainMlp(dim, int(dim * config["mlp_ratio"]))

    def _shuffle(self, x_bhwc: Tensor) -> Tensor:
        b, h, w, c = x_bhwc.shape
        x = x_bhwc.view(b, h // self.interval, self.interval, w // self.interval, self.interval, c)
        return x.permute(0, 2, 4, 1, 3, 5).contiguous().view(b * self.interval**2, -1, c)

    def _unshuffle(self, x_vnc: Tensor, h: int, w: int) -> Tensor:
        i = self.interval
        x = x_vnc.view(-1, i, i, h // i, w // i, x_vnc.shape[-1])
        return x.permute(0, 3, 1, 4, 2, 5).contiguous().view(-1, h * w, x_vnc.shape[-1])

    def forward(self, x_blc: Tensor, size: tuple[int, int], index: dict[str, Tensor], mask_gnn: Tensor) -> Tensor:
        b, length, c = x_blc.shape
        window_blc, grid_blc = self.qkv(x_blc).split(3 * c // 2, dim=-1)
        grid_size = (size[0] // self.interval, size[1] // self.interval)
        q, k, v = split(self._shuffle(grid_blc.reshape(b, *size, -1)), 3, self.num_heads)
        (grid,) = split(self.grid_proj(self._shuffle(x_blc.view(b, *size, c))), 1, self.num_heads)
        gathered = self.grid_attn.attn_transform1(grid, k, v, grid_size)
        gathered = gathered.view(*gathered.shape[:2], self.num_heads, -1).transpose(1, 2)
        grid_out = self._unshuffle(self.grid_attn.attn_transform2(q, grid, gathered, grid_size), *size)
        square_bhwc, strip_bhwc = window_blc.reshape(b, *size, -1).split(3 * c // 4, dim=-1)
        square = self.window_attn(cut(square_bhwc.contiguous(), self.window), index["SA"], None)
        strip_bhwc = strip_bhwc.roll((-(self.window // 2), -(self.window // 2)), (1, 2)).contiguous()
        strip = self.window_attn_s(strip_bhwc.view(-1, self.window**2, 3 * c // 4), index["SA"], mask_gnn)
        square_out, strip_out = (join(x, self.window, *size).view(b, length, -1) for x in (square, strip))
        strip_out = strip_out.roll((self.window // 2, self.window // 2), (1, 2))
        x_blc = x_blc + self.norm1(self.fc(torch.cat([square_out, strip_out, grid_out], dim=-1)))
        return x_blc + self.norm2(self.mlp(x_blc))


class PlainBlocks(nn.Module):
    def __init__(self, config: dict[str, Any], num_heads: int, rates: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.is_hat = config["arch"] == "hat"
        for position, rate in enumerate(rates):
            if not self.is_hat and position % 2 == 0:
                self.blocks.append(PlainFusedConv(config["embed_dim"]))
            self.blocks.append(PlainWindowBlock(config, num_heads, config["window_size"] // 2 * (position % 2), rate))
        if self.is_hat:
            self.overlap_attn = PlainOverlapBlock(config, num_heads)
        else:
            self.gab = PlainGridBlock(config, num_heads)
            self.scale = nn.Parameter(torch.zeros(config["embed_dim"]))

    def forward(self, x_blc: Tensor, *args: Any) -> Tensor:
        for block in self.blocks:
            x_blc = block(x_blc, *args)
        return self.overlap_attn(x_blc, *args) if self.is_hat else x_blc + self.gab(x_blc, *args) * self.scale


class PlainGroup(nn.Module):
    def __init__(self, config: dict[str, Any], num_heads: int, rates: list[float]) -> None:
        super().__init__()
        self.residual_group = PlainBlocks(config, num_heads, rates)
        self.conv = nn.Conv2d(config["embed_dim"], config["embed_dim"], 3, padding=1)

    def forward(self, x_blc: Tensor, size: tuple[int, int], *args: Any) -> Tensor:
        y_blc = self.residual_group(x_blc, size, *args)
        y_bchw = self.conv(y_blc.transpose(1, 2).contiguous().view(len(x_blc), -1, *size))
        return y_bchw.flatten(2).transpose(1, 2) + x_blc


class PlainNetwork(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        dim, self.window, self.img_range = config["embed_dim"], config["window_size"], config["img_range"]
        n = self.window**2
        self.register_buffer("relative_position_index_SA", torch.zeros(n, n, dtype=torch.int64))
        if config["arch"] == "hat":
            m = (self.window + int(self.window * config["overlap_ratio"])) ** 2
            self.register_buffer("relative_position_index_OCA", torch.zeros(n, m, dtype=torch.int64))
        self.register_buffer("mean", torch.tensor((0.4488, 0.4371, 0.4040)).view(1, 3, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(3, dim, 3, padding=1)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(dim)})
        rates = torch.linspace(0, config["drop_path_rate"], sum(config["depths"])).split(config["depths"])
        groups = zip(config["num_heads"], rates, strict=True)
        self.layers = nn.ModuleList(PlainGroup(config, heads, group.tolist()) for heads, group in groups)
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(dim, 64, 3, padding=1), nn.LeakyReLU())
        self.upsample = upsampler(config["scale"])
        self.conv_last = nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw = (x_bchw - self.mean) * self.img_range
        shallow_bchw = self.conv_first(x_bchw)
        size = shallow_bchw.shape[2:]
        index = {key.split("_")[-1]: value for key, value in self.named_buffers() if key != "mean"}
        mask_gnn = rebuilt_mask(*size, self.window).to(x_bchw.device)
        x_blc = self.patch_embed["norm"](shallow_bchw.flatten(2).transpose(1, 2))
        for group in self.layers:
            x_blc = group(x_blc, size, index, mask_gnn)
        body_bchw = self.norm(x_blc).transpose(1, 2).contiguous().view(shallow_bchw.shape)
        features_bchw = self.conv_after_body(body_bchw) + shallow_bchw
        out_bchw = self.conv_last(self.upsample(self.conv_before_upsample(features_bchw)))
        return out_bchw / self.img_range + self.mean
