"""The CPU kernels of a step: Python functions that numba compiles (`cpu_compiler.py`).

Arrays hold 16-bit numbers as `cpu_arithmetic.py` describes. Sums are computed in float32, and each result is
rounded once. N is the number of tokens in a step, B the number of rows of the batch, and D the head
dimension. The rotary tables `cos` and `sin` are [positions, D], and `cache` is [2 (keys, values), rows, KV
heads, length, D]. Knows arrays; knows nothing about tensors, modules or compilers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from llama.torch_engine.cpu_arithmetic import exp, inlined, lower, narrowed, upper, widened
from llama.torch_engine.linears import PANEL

Array = Any  # a numpy array; its type is in the signatures of `cpu_compiler.py`

_ZERO, _ONE, _LOWEST = np.float32(0), np.float32(1), np.float32(-np.inf)


def attend_rows(
    qkv: Array,
    cos: Array,
    sin: Array,
    angles: Array,
    cache: Array,
    positions: Array,
    scale: float,
    attended: Array,
) -> None:
    """Decode: write one new token into each of the first B rows, and attend to the positions of that row.

    `qkv` [B, (heads + 2 x KV heads) x D] are the projections of the new tokens, `angles` [B] their indices in
    the rotary tables, and `positions` [B] their positions in the cache. The result is written to `attended`
    [B, heads x D]. A row whose position is the last one of the cache is not decoding: its result is zero,
    and its keys and values are unchanged.
    """
    batch_size, kv_heads, length, size = len(qkv), cache.shape[2], cache.shape[3], cache.shape[4]
    group = qkv.shape[1] // size // kv_heads - 2
    # The order is by head, not by row, so that all threads work on a row that is much longer than the others.
    for index in prange(kv_heads * batch_size):
        row, kv_head = index % batch_size, index // batch_size
        position, first = positions[row], kv_head * group
        if position == length - 1:
            attended[row, first * size : (first + group) * size] = 0
            continue
        keys, values = cache[0, row, kv_head], cache[1, row, kv_head]
        row_cos, row_sin = cos[angles[row]], sin[angles[row]]
        _store(qkv[row], row_cos, row_sin, kv_head, kv_heads, keys[position], values[position])
        query, sums = np.empty(size, np.float32), np.empty(size, np.float32)
        weights = np.empty(position + 1, np.float32)
        for head in range(first, first + group):
            here = slice(head * size, (head + 1) * size)
            _rotate(qkv[row, here], row_cos, row_sin, scale, query)
            _scores(query, keys, weights)
            total = _exponentials(weights, _highest(weights, _LOWEST))
            _weighted_sum(weights, values, sums)
            _divide(sums, total, attended[row, here])


def store_chunk(
    qkv: Array,
    cos: Array,
    sin: Array,
    angle: int,
    cache: Array,
    row: int,
    start: int,
    queries: Array,
) -> None:
    """Prefill: write the keys and values of a chunk of a prompt into a row, from position `start` on.

    `qkv` [N, (heads + 2 x KV heads) x D] are the projections of the chunk, and `angle` is the index of
    the first token in the rotary tables. The rotated queries are written to `queries` [N, heads x D].
    """
    kv_heads, size = cache.shape[2], cache.shape[4]
    for token in prange(len(qkv)):
        token_cos, token_sin = cos[angle + token], sin[angle + token]
        for head in range(queries.shape[1] // size):
            here = slice(head * size, (head + 1) * size)
            _rotate(qkv[token, here], token_cos, token_sin, _ONE, queries[token, here])
        for kv_head in range(kv_heads):
            keys, values = cache[0, row, kv_head, start + token], cache[1, row, kv_head, start + token]
            _store(qkv[token], token_cos, token_sin, kv_head, kv_heads, keys, values)


def add_and_norm(x: Array, delta: Array, weight: Array, epsilon: float, normed: Array) -> None:
    """Add `delta` [N, width] to `x`, and write the root-mean-square norm of the sum to `normed`."""
    for row in range(len(x)):
        squares = _ZERO
        for column in range(x.shape[1]):
            total = narrowed(widened(x[row, column]) + widened(delta[row, column]), x[row, column])
            x[row, column] = total
            squares += widened(total) * widened(total)
        factor = _ONE / np.sqrt(squares / np.float32(x.shape[1]) + epsilon)
        for column in range(x.shape[1]):
            value = widened(x[row, column]) * factor * widened(weight[column])
            normed[row, column] = narrowed(value, normed[row, column])


def swiglu(gate_up: Array, gated: Array) -> None:
    """Write silu(gate) x up to `gated` [N, width]. `gate_up` [N, 2 x width] has the gates first."""
    width = gated.shape[1]
    for row in range(len(gated)):
        for column in range(width):
            gate, up = widened(gate_up[row, column]), widened(gate_up[row, width + column])
            gated[row, column] = narrowed(gate / (_ONE + exp(-gate)) * up, gated[row, column])


def linear_rows(panels: Array, x: Array, result: Array) -> None:
    """Multiply a few rows `x` [N, inputs] in bfloat16 by a packed weight, into `result` [N, outputs].

    `panels` [outputs / PANEL, inputs / 2, PANEL] has the weights of two neighbouring inputs in one uint32,
    the first one in the lower half. A panel is read once, from its first byte to its last.
    """
    for panel in prange(len(panels)):
        sums = np.zeros((len(x), PANEL), np.float32)
        for pair in range(panels.shape[1]):
            weights = panels[panel, pair]
            for row in range(len(x)):
                first, second, mine = widened(x[row, 2 * pair]), widened(x[row, 2 * pair + 1]), sums[row]
                for output in range(PANEL):
                    mine[output] += first * lower(weights[output]) + second * upper(weights[output])
        for row in range(len(x)):
            _divide(sums[row], _ONE, result[row, panel * PANEL : (panel + 1) * PANEL])


@inlined
def _rotate(head: Array, cos: Array, sin: Array, factor: Any, rotated: Array) -> None:
    """Apply rotary position embedding to one head [D], in the half-split layout, times `factor`."""
    half = len(head) // 2
    for d in range(half):
        first, second = widened(head[d]), widened(head[d + half])
        turned = first * widened(cos[d]) - second * widened(sin[d])
        rotated[d] = narrowed(turned * factor, rotated[d])
        turned = second * widened(cos[d + half]) + first * widened(sin[d + half])
        rotated[d + half] = narrowed(turned * factor, rotated[d + half])


@inlined
def _store(qkv: Array, cos: Array, sin: Array, kv_head: int, kv_heads: int, key: Array, value: Array) -> None:
    """Write the key and the value [D] of one token and KV head from the token's projections."""
    size = len(key)
    first = len(qkv) + (kv_head - 2 * kv_heads) * size
    _rotate(qkv[first : first + size], cos, sin, _ONE, key)
    first += kv_heads * size
    for d in range(size):
        value[d] = narrowed(widened(qkv[first + d]), value[d])


@inlined
def _scores(query: Array, keys: Array, scores: Array) -> None:
    """Write the products of a query [D] with the first keys [positions, D].

    The query is read once for every four keys.
    """
    fours = len(scores) // 4 * 4
    for p in range(0, fours, 4):
        k0, k1, k2, k3 = keys[p], keys[p + 1], keys[p + 2], keys[p + 3]
        s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
        for d in range(len(query)):
            q = query[d]
            s0 += q * widened(k0[d])
            s1 += q * widened(k1[d])
            s2 += q * widened(k2[d])
            s3 += q * widened(k3[d])
        scores[p], scores[p + 1], scores[p + 2], scores[p + 3] = s0, s1, s2, s3
    for p in range(fours, len(scores)):
        s0 = _ZERO
        for d in range(len(query)):
            s0 += query[d] * widened(keys[p, d])
        scores[p] = s0


@inlined
def _highest(scores: Array, highest: Any) -> Any:
    for p in range(len(scores)):
        highest = max(highest, scores[p])
    return highest


@inlined
def _exponentials(scores: Array, highest: Any) -> Any:
    """Replace every score by e to the power of (score - highest), and return the sum of the results."""
    total = _ZERO
    for p in range(len(scores)):
        scores[p] = exp(scores[p] - highest)
        total += scores[p]
    return total


@inlined
def _weighted_sum(weights: Array, values: Array, sums: Array) -> None:
    """Write the weighted sum of the first values [positions, D]. Sums are read once for every four values."""
    sums[:] = 0
    fours = len(weights) // 4 * 4
    for p in range(0, fours, 4):
        v0, v1, v2, v3 = values[p], values[p + 1], values[p + 2], values[p + 3]
        w0, w1, w2, w3 = weights[p], weights[p + 1], weights[p + 2], weights[p + 3]
        for d in range(len(sums)):
            sums[d] += w0 * widened(v0[d]) + w1 * widened(v1[d]) + w2 * widened(v2[d]) + w3 * widened(v3[d])
    for p in range(fours, len(weights)):
        for d in range(len(sums)):
            sums[d] += weights[p] * widened(values[p, d])


@inlined
def _divide(sums: Array, total: Any, result: Array) -> None:
    """Write sums / total to `result`."""
    for d in range(len(sums)):
        result[d] = narrowed(sums[d] / total, result[d])
