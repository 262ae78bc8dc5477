"""Compute LAVT in float64 numpy from its formulas, one window, head and sample at a time.

Shares no code with fastkd. The attention mask of shifted windows follows from coordinates, padding is a larger array of
zeros, and bilinear resizing uses corner-aligned coordinates.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from math import erf

import numpy as np

_erf = np.vectorize(erf, otypes=[np.float64])


def gelu(x):
    return 0.5 * x * (1 + _erf(x / np.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def instance_norm(x):  # (N, C), over N
    centred = x - x.mean(0)
    return centred / np.sqrt((centred**2).mean(0) + 1e-5)


def resize(x, height, width):  # (H, W, C), aligned corners
    def axis(old, new):
        at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0)
        low = np.minimum(np.floor(at).astype(int), old - 1)
        return low, np.minimum(low + 1, old - 1), at - low

    (y0, y1, fy), (x0, x1, fx) = axis(x.shape[0], height), axis(x.shape[1], width)
    rows = x[y0] * (1 - fy)[:, None, None] + x[y1] * fy[:, None, None]
    return rows[:, x0] * (1 - fx)[:, None] + rows[:, x1] * fx[:, None]


def convolve(x, weight):  # (H, W, C) with (O, C, 3, 3), zero padding
    h, w, _ = x.shape
    padded = np.zeros((h + 2, w + 2, x.shape[2]))
    padded[1:-1, 1:-1] = x
    return sum(padded[i : i + h, j : j + w] @ weight[:, :, i, j].T for i in range(3) for j in range(3))


@dataclass
class Oracle:
    """LAVT for one sample: ``run(image (3, H, W), words (T, D), valid (T,))``."""

    state: dict[str, np.ndarray]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    fusion_heads: tuple[int, ...]
    stages: list = field(default_factory=list)
    logits: list = field(default_factory=list)

    def p(self, name):
        return self.state[name].astype(np.float64)

    def affine(self, x, name):
        weight = self.p(f"{name}.weight")
        return x @ weight.reshape(weight.shape[0], -1).T + self.p(f"{name}.bias")

    def norm(self, x, name):
        return layer_norm(x, self.p(f"{name}.weight"), self.p(f"{name}.bias"))

    def attend(self, tokens, where, shifted_where, name, heads):
        """Attend within a window: tokens (N, C) with their coordinates in the image and in the shifted map."""
        n, c = tokens.shape
        table = self.p(f"{name}.relative_position_bias_table")
        q, k, v = np.split(self.affine(tokens, f"{name}.qkv"), 3, axis=1)
        offset = shifted_where[:, None] - shifted_where[None]  # (N, N, 2)
        rows = (offset[..., 0] + self.window - 1) * (2 * self.window - 1) + offset[..., 1] + self.window - 1
        # Tokens that are not at the same offset in the image must not attend to each other.
        masked = (offset != where[:, None] - where[None]).any(-1)
        out = np.zeros((n, c))
        d = c // heads
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = q[:, part] @ k[:, part].T / np.sqrt(d) + table[rows, h]
            scores[masked] = -np.inf
            out[:, part] = softmax(scores) @ v[:, part]
        return self.affine(out, f"{name}.proj")

    def block(self, x, name, heads, shift):  # x: (H, W, C)
        height, width, c = x.shape
        w = self.window
        tall, wide = -(-height // w) * w, -(-width // w) * w
        padded = np.zeros((tall, wide, c))
        padded[:height, :width] = self.norm(x, f"{name}.norm1")
        out = np.zeros_like(padded)
        for top in range(0, tall, w):
            for left in range(0, wide, w):
                at = np.array([(y, z) for y in range(top, top + w) for z in range(left, left + w)])
                image_at = (at + shift) % (tall, wide)
                tokens = padded[image_at[:, 0], image_at[:, 1]]
                out[image_at[:, 0], image_at[:, 1]] = self.attend(tokens, image_at, at, f"{name}.attn", heads)
        x = x + out[:height, :width]
        mlp = self.affine(gelu(self.affine(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        return x + mlp

    def fuse(self, x, words, valid, name, heads):  # x: (N, C), words: (T, D), valid: (T,)
        n, c = x.shape
        att = f"{name}.image_lang_att"
        query = instance_norm(self.affine(x, f"{att}.f_query.0"))
        key = self.affine(words, f"{att}.f_key.0") * valid[:, None]
        value = self.affine(words, f"{att}.f_value.0") * valid[:, None]
        read, logits = np.zeros((n, c)), []
        for h in range(heads):
            part = slice(h * c // heads, (h + 1) * c // heads)
            score = query[:, part] @ key[:, part].T / np.sqrt(c)
            logits.append(score)
            read[:, part] = softmax(score + (1e4 * valid - 1e4)) @ value[:, part]
        lang = instance_norm(self.affine(read, f"{att}.W.0"))
        visual = gelu(self.affine(x, f"{name}.vis_project.0"))
        return gelu(self.affine(visual * lang, f"{name}.project_mm.0")), np.stack(logits)

    def merge(self, x, name):  # (H, W, C) -> (H/2, W/2, 2C)
        height, width, c = x.shape
        even = np.zeros((height + height % 2, width + width % 2, c))
        even[:height, :width] = x
        four = [even[0::2, 0::2], even[1::2, 0::2], even[0::2, 1::2], even[1::2, 1::2]]
        return self.norm(np.concatenate(four, -1), f"{name}.norm") @ self.p(f"{name}.reduction.weight").T

    def embed(self, image):  # (3, H, W) -> (H/4, W/4, C)
        height, width = image.shape[1:]
        padded = np.zeros((3, -(-height // 4) * 4, -(-width // 4) * 4))
        padded[:, :height, :width] = image
        _, tall, wide = padded.shape
        patches = padded.reshape(3, tall // 4, 4, wide // 4, 4).transpose(1, 3, 0, 2, 4)
        x = self.affine(patches.reshape(tall // 4, wide // 4, 48), "backbone.patch_embed.proj")
        return self.norm(x, "backbone.patch_embed.norm")

    def decode(self):
        y = self.stages[3]
        for level in (4, 3, 2):
            finer = self.stages[level - 2]
            y = np.concatenate([resize(y, *finer.shape[:2]), finer], -1)
            for half in (1, 2):
                bn = f"classifier.bn{half}_{level}"
                y = convolve(y, self.p(f"classifier.conv{half}_{level}.weight"))
                y = (y - self.p(f"{bn}.running_mean")) / np.sqrt(self.p(f"{bn}.running_var") + 1e-5)
                y = np.maximum(y * self.p(f"{bn}.weight") + self.p(f"{bn}.bias"), 0)
        return self.affine(y, "classifier.conv1_1")

    def run(self, image, words, valid):
        """Return logits (H, W, 2) and those of the decoder (h, w, 2); store stages and pixel–word logits on self."""
        image, words, valid = (np.asarray(a, np.float64) for a in (image, words, valid))
        x = self.embed(image)
        for i in range(4):
            layer = f"backbone.layers.{i}"
            for j in range(self.depths[i]):
                x = self.block(x, f"{layer}.blocks.{j}", self.heads[i], self.window // 2 if j % 2 else 0)
            height, width, c = x.shape
            fused, logits = self.fuse(x.reshape(-1, c), words, valid, f"{layer}.fusion", self.fusion_heads[i])
            fused = fused.reshape(height, width, c)
            self.logits.append(logits)
            self.stages.append(self.norm(fused, f"backbone.norm{i}"))
            if i < 3:
                hidden = np.maximum(fused @ self.p(f"{layer}.res_gate.0.weight").T, 0)
                gate = np.tanh(hidden @ self.p(f"{layer}.res_gate.2.weight").T)
                x = self.merge(x + gate * fused, f"{layer}.downsample")
        low = self.decode()
        return resize(low, *image.shape[1:]), low


def lavt_names(embed, depths, heads, window, word_width=768, hidden=None):
    """Return the name and shape of every vision and decoder weight of a published checkpoint."""
    hidden = hidden or 4 * embed
    widths = [embed * 2**i for i in range(4)]
    names = {"backbone.patch_embed.proj": [(embed, 3, 4, 4), (embed,)]}
    layer_norms = {"backbone.patch_embed.norm": embed}
    for i, c in enumerate(widths):
        layer = f"backbone.layers.{i}"
        for j in range(depths[i]):
            block = f"{layer}.blocks.{j}"
            layer_norms |= {f"{block}.norm1": c, f"{block}.norm2": c}
            names[f"{block}.attn.relative_position_bias_table"] = [((2 * window - 1) ** 2, heads[i])]
            names[f"{block}.attn.relative_position_index"] = [(window**2, window**2)]
            for part, (out, into) in {
                "attn.qkv": (3 * c, c), "attn.proj": (c, c), "mlp.fc1": (4 * c, c), "mlp.fc2": (c, 4 * c)
            }.items():  # fmt: skip
                names[f"{block}.{part}"] = [(out, into), (out,)]
        for part in ("vis_project.0", "project_mm.0", "image_lang_att.f_query.0", "image_lang_att.W.0"):
            names[f"{layer}.fusion.{part}"] = [(c, c, 1), (c,)]
        for part in ("f_key.0", "f_value.0"):
            names[f"{layer}.fusion.image_lang_att.{part}"] = [(c, word_width, 1), (c,)]
        names |= {f"{layer}.res_gate.{k}.weight": [(c, c)] for k in (0, 2)}
        if i < 3:
            layer_norms[f"{layer}.downsample.norm"] = 4 * c
            names[f"{layer}.downsample.reduction.weight"] = [(2 * c, 4 * c)]
        layer_norms[f"backbone.norm{i}"] = c
    for level, into in ((4, widths[3] + widths[2]), (3, hidden + widths[1]), (2, hidden + widths[0])):
        for half, inputs in ((1, into), (2, hidden)):
            names[f"classifier.conv{half}_{level}.weight"] = [(hidden, inputs, 3, 3)]
            bn = f"classifier.bn{half}_{level}"
            layer_norms[bn] = hidden
            names |= {f"{bn}.running_mean": [(hidden,)], f"{bn}.running_var": [(hidden,)]}
            names[f"{bn}.num_batches_tracked"] = [()]
    names["classifier.conv1_1"] = [(2, hidden, 1, 1), (2,)]
    names |= {name: [(c,), (c,)] for name, c in layer_norms.items()}
    shapes = {}
    for name, found in names.items():
        if len(found) == 2:
            shapes |= {f"{name}.weight": found[0], f"{name}.bias": found[1]}
        else:
            shapes[name] = found[0]
    return shapes


def lavt_weights(shapes):
    """Draw every weight, seeded by its name: norms near 1, biases near 0.1, others scaled by the fan-in."""
    state = {}
    for name, shape in shapes.items():
        x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith(("num_batches_tracked", "relative_position_index")):
            state[name] = np.zeros(shape, np.int64)
            continue
        if name.endswith("running_var"):
            x = 1 + 0.1 * abs(x)
        elif name.endswith("weight") and any(part in name for part in ("norm", ".bn", "bn1_", "bn2_")):
            x = 1 + 0.1 * x
        elif name.endswith(("bias", "running_mean")) or "bias_table" in name:
            x = 0.1 * x
        else:
            x = x / np.sqrt(np.prod(shape[1:]))
        state[name] = np.asarray(x, np.float32)
    return state
