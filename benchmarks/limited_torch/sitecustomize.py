"""Python imports this module when it starts with this folder in PYTHONPATH: see `benchmarks.isa`.

torch.cpu then reports only the vector instructions that ATEN_CPU_CAPABILITY allows. vLLM selects its compiled
library by what torch.cpu reports, and our engine selects its kernels in the same way.
"""

import os
from contextlib import suppress

_HIDDEN = {
    "avx512": ("amx", "avx512_bf16", "avx512_fp16", "avx10", "avx_ne"),
    "avx2": ("amx", "avx512", "avx10", "avx_"),
}

with suppress(ImportError):  # a Python without torch has nothing to restrict
    import torch.cpu

    _hidden = _HIDDEN[os.environ["ATEN_CPU_CAPABILITY"]]
    _all = torch.cpu.get_capabilities()
    _limited = {**_all, **{name: False for name in _all if name.startswith(_hidden)}}
    setattr(torch.cpu, "get_capabilities", lambda: _limited)  # noqa: B010
    for _name in ("amx_fp16", "amx_tile", "avx512_bf16", "avx512"):
        if _name.startswith(_hidden):
            setattr(torch.cpu, f"_is_{_name}_supported", lambda: False)
