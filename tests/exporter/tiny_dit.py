"""A tiny causal diffusion transformer over latent frames, and what attention over time means for it, in float64.

As Wan and the models that were made of it (arXiv:2503.20314, arXiv:2509.22622): patches of a frame are tokens, rotation
over time, height and width has its own dimensions, the noise level modulates each layer, and the prompt comes in by
cross attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sinkexport.frames import FrameCache, FrameGeometry
from torch import nn

HEIGHT, WIDTH, CHANNELS, PROMPT_TOKENS = 2, 3, 4, 5
LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 12
TIME_DIMS = 4
"""Leading dimensions of a head that turn with time; then 4 with height and 4 with width."""
INV_FREQ = (1.0, 0.13)
EMBED = Q_HEADS * HEAD_DIM

torch.set_num_threads(1)  # tiny matrices are faster without handing work around

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q [B, Hq, T, D], k, v [B, Hkv, T, D], rotated over space) -> [B, Hq, T, D], called layer by layer."""


class TinyDit(nn.Module):
    """One block of frames. x: latents [B, F, H, W, C]. time: [B], the noise level. prompt: [B, P, E]. -> velocity."""

    def __init__(self, frames_per_block: int, geometry: FrameGeometry) -> None:
        super().__init__()
        self.frames, self.geometry = frames_per_block, geometry
        self.patch, self.out = nn.Linear(CHANNELS, EMBED), nn.Linear(EMBED, CHANNELS)
        self.time = nn.Sequential(nn.Linear(1, EMBED), nn.SiLU(), nn.Linear(EMBED, EMBED))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
        where = torch.stack((y, x), dim=-1).reshape(-1, 2).repeat(frames_per_block, 1)  # [T, 2]
        # Frames of one block share their place in the rotation over time, so it is here that they differ.
        within = torch.arange(frames_per_block).repeat_interleave(HEIGHT * WIDTH)[:, None] * 0.3
        y, x = where[:, :1], where[:, 1:]
        angles = torch.cat((y + within, 0.2 * y, x - within, 0.2 * x), dim=1)
        self.register_buffer("angles", angles.double(), persistent=False)  # [T, 4]: pairs of the last 8 dimensions

    def forward(
        self,
        position: torch.Tensor,
        oldest: torch.Tensor,
        states: list[torch.Tensor],
        x: torch.Tensor,
        time: torch.Tensor,
        prompt: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = FrameCache(self.geometry, position, oldest, states, INV_FREQ)
        return self.velocity(x, time, prompt, cache.attend), cache.next_states

    def velocity(self, x: torch.Tensor, time: torch.Tensor, prompt: torch.Tensor, attend: Attend) -> torch.Tensor:
        hidden = self.patch(x.flatten(1, 3))  # [B, T, E]
        level = self.time(time[:, None])[:, None]  # [B, 1, E]
        for layer in self.layers:
            hidden = layer(hidden, level, prompt, self.angles.to(hidden.dtype), attend)
        return self.out(hidden).reshape(x.shape)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(EMBED, elementwise_affine=False) for _ in range(3))
        self.modulation = nn.Linear(EMBED, 4 * EMBED)
        self.q, self.o = nn.Linear(EMBED, EMBED), nn.Linear(EMBED, EMBED)
        self.k, self.v = (nn.Linear(EMBED, KV_HEADS * HEAD_DIM) for _ in range(2))
        self.cross_q, self.cross_o = nn.Linear(EMBED, EMBED), nn.Linear(EMBED, EMBED)
        self.cross_kv = nn.Linear(EMBED, 2 * EMBED)
        self.mlp = nn.Sequential(nn.Linear(EMBED, 2 * EMBED), nn.GELU(), nn.Linear(2 * EMBED, EMBED))

    def forward(
        self, x: torch.Tensor, level: torch.Tensor, prompt: torch.Tensor, angles: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        scale1, shift1, scale2, shift2 = self.modulation(level).chunk(4, dim=-1)
        h = self.norms[0](x) * (1 + scale1) + shift1
        q, k, v = (split(project(h)) for project in (self.q, self.k, self.v))
        x = x + self.o(join(attend(in_space(q, angles), in_space(k, angles), v)))
        q, (k, v) = split(self.cross_q(self.norms[1](x))), map(split, self.cross_kv(prompt).chunk(2, dim=-1))
        x = x + self.cross_o(join((q @ k.mT * HEAD_DIM**-0.5).softmax(dim=-1) @ v))
        return x + self.mlp(self.norms[2](x) * (1 + scale2) + shift2)


def split(x: torch.Tensor) -> torch.Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def join(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def in_space(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs of the last 8 dimensions turn by angles [T, 4]."""
    still, turned = x[..., :TIME_DIMS], x[..., TIME_DIMS:]
    a, b = turned[..., 0::2], turned[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((still, torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)), dim=-1)


def in_time(x: torch.Tensor, place: int) -> torch.Tensor:
    """The first TIME_DIMS dimensions turn by `place` blocks; pairs are halves."""
    a, b, still = x[..., :2], x[..., 2:TIME_DIMS], x[..., TIME_DIMS:]
    angles = place * torch.tensor(INV_FREQ, dtype=x.dtype)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin, still), dim=-1)


class Reference:
    """The definition: keys and values of every block, not rotated over time; the first S and the last W of them are
    rotated by their place in that list. Without ring, shift or buffer."""

    def __init__(self, model: TinyDit) -> None:
        self.model = model
        self.blocks: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in range(LAYERS)]

    def run(
        self, position: int, x: torch.Tensor, time: torch.Tensor, prompt: torch.Tensor, oldest: int = 0
    ) -> torch.Tensor:
        """Velocity of block `position`, whose keys replace those of an earlier run. oldest: as in FrameSession."""
        layers = iter(self.blocks)
        return self.model.velocity(
            x, time, prompt, lambda q, k, v: self._attend(next(layers), position, oldest, q, k, v)
        )

    def _attend(
        self,
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]],
        position: int,
        oldest: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        geometry = self.model.geometry
        kept[position] = (k, v)
        sinks = list(range(min(position + 1, geometry.num_sink_blocks)))
        window = [u for u in range(position + 1) if u >= geometry.num_sink_blocks][-geometry.window_blocks :]
        cached = [*sinks, *window]
        # A block that a recache hides keeps its place in the list.
        seen = [(place, u) for place, u in enumerate(cached) if u in sinks or u >= oldest]
        keys = torch.cat([in_time(kept[u][0], place) for place, u in seen], dim=2)
        values = torch.cat([kept[u][1] for _, u in seen], dim=2)
        query = in_time(q, len(cached) - 1)
        return nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
