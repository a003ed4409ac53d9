"""Compile the kernels for a CUDA capability without a device: `compile_kernels.py 90 few|all`; print their sizes.

What they are called with is recorded on the meta device. Not under TRITON_INTERPRET.
"""

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effnet_train.models.efficientnet import MBConv
from effnet_train.models.fused import launch
from effnet_train.models.layers import ConvNorm, Style
from effnet_train.models.scaling import Stage
from effnet_train.optim import one_pass_kernel

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Shape, squeeze-excite, activation and resolution. A number that is 1 is built into a kernel.
FEW = [(Stage(5, 1, 6, 24, 24, 1), 0.25, "swish", 28), (Stage(3, 1, 1, 32, 160, 1), 0.25, "swish", 28)]
MORE = [
    (Stage(5, 2, 6, 24, 40, 1), 0.25, "swish", 28),
    (Stage(3, 1, 6, 24, 24, 1), 0.25, "swish", 28),
    (Stage(3, 1, 1, 32, 16, 1), 0.25, "swish", 28),
    (Stage(3, 2, 6, 16, 24, 1), 0.25, "swish", 28),
    (Stage(5, 1, 6, 40, 40, 1), 0.25, "swish", 28),
    (Stage(3, 1, 6, 32, 32, 1), 0.25, "swish", 28),
    (Stage(5, 1, 6, 192, 192, 1), 0.25, "swish", 28),
    (Stage(3, 1, 6, 24, 24, 1), 0.0, "relu6", 28),
    (Stage(3, 2, 6, 16, 24, 1), 0.25, "swish", 2),
    (Stage(5, 1, 6, 16, 16, 1), 0.25, "swish", 1),
]


Call = tuple[ASTSource, dict[str, int]]


def record(calls: dict[str, Call], kernel: Any, *arguments: Any, **constants: Any) -> None:
    """Note how a kernel was called as Triton's own launcher would."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    options.setdefault("num_warps", launch._WARPS)
    signature, attributes = {}, {}
    known = {**constants, "ACC": launch.tl.float32}
    arguments = launch._specialised(kernel, arguments)
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif value is None or isinstance(value, tl.constexpr) or (isinstance(value, int) and value == 1):
            signature[name], known[name] = "constexpr", value
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys([*constants, "ACC"], "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)
    calls[f"{kernel.__name__} {sorted(signature.items())} {known} {attributes} {options}"] = source, options


def main(capability: int, kinds: str) -> None:
    calls: dict[str, Call] = {}
    launch._launch = lambda kernel, grid, *arguments, **constants: record(calls, kernel, *arguments, **constants)
    for shape, se_ratio, activation, size in FEW if kinds == "few" else [*FEW, *MORE]:
        style = Style(activation=activation, fused=True)
        with torch.device("meta"):
            block = MBConv(shape, se_ratio=se_ratio, rate=0.2, style=style).train()
            for part in (block.expand, block.project):
                if not isinstance(part, torch.nn.Identity):
                    part.conv.to(torch.bfloat16)
            x = torch.empty(8, shape.in_channels, size, size, dtype=torch.bfloat16, requires_grad=True)
            block(x, torch.empty(8)).sum().backward()
    with torch.device("meta"):
        stem = ConvNorm(3, 40, kernel=3, stride=2, style=Style(fused=True)).train()
        stem.conv.to(torch.bfloat16)
        stem(torch.empty(8, 3, 29, 29, dtype=torch.bfloat16)).sum().backward()
    pointers = {"addresses": "*i64", "sizes": "*i64", "decays": "*fp32", "owners": "*i32", "starts": "*i32"}
    scalars = {"rate": "*fp32", "follow": "*fp32", "alpha": "fp32", "momentum": "fp32", "eps": "fp32"}
    signature = {**pointers, **scalars, "BLOCK": "constexpr"}
    calls["update"] = ASTSource(fn=one_pass_kernel.update, signature=signature, constexprs={"BLOCK": 1024}), {}
    target = GPUTarget("cuda", capability, 32)
    compiled = {name: triton.compile(source, target, options=options) for name, (source, options) in calls.items()}
    print(json.dumps({name: len(kernel.asm["cubin"]) for name, kernel in compiled.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
