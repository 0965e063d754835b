"""query, key [T, heads * head_size], rotated in place: (a, b) -> (a cos - b sin, b cos + a sin)."""

import torch


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox):
    """is_neox: a and b are the halves of the rotated part of a head, else its even and odd elements."""
    cos, sin = cos_sin_cache[positions.flatten()].float()[:, None].chunk(2, dim=-1)
    width = 2 * cos.shape[-1]
    for tensor in (query, key):
        rotated = tensor.view(positions.numel(), -1, head_size)[..., :width]
        x = rotated.float()
        a, b = x.chunk(2, dim=-1) if is_neox else (x[..., 0::2], x[..., 1::2])
        parts = (a * cos - b * sin, b * cos + a * sin)
        rotated.copy_(torch.cat(parts, dim=-1) if is_neox else torch.stack(parts, dim=-1).flatten(-2))
