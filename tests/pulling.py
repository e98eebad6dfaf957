"""The files of a small folder of weights, and helpers to pull them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from llama import ROOT
from llama.weights.retry import RetryPolicy

TOKEN = "hf_secret0123456789"
QUICK = RetryPolicy(attempts=3, first_delay=0.01, timeout=2)

SHARDS = [
    save({f"model.layers.{n}.weight": np.full((64, 500), n, dtype=np.float32)}, {"format": "pt"})
    for n in range(2)
]
NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"weight_map": {f"model.layers.{n}.weight": name for n, name in enumerate(NAMES)}}
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.model": bytes(range(256)) * 8,
    "LICENSE.txt": b"You may.\n",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    **dict(zip(NAMES, SHARDS, strict=True)),
}
SHARD = f"/{NAMES[0]}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_manifest(path: Path, url: str, hashes: bool = False, names: tuple[str, ...] = tuple(FILES)) -> Path:
    lines = [f"{url}/{n}{f'#sha256={sha256(FILES[n])}' if hashes else ''} {n}" for n in names]
    path.write_text("\n".join([*lines, ""]), "utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama", "weights", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
