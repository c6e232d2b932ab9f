"""Prints data/kernels.txt: what the compiler makes of each GPU kernel, and the least it has to move and compute. Needs no GPU.

    pip install -e ".[emulator]" && PYTHONPATH=tests python -m tinycea.lab.kernels > data/kernels.txt
"""
import importlib
from importlib.metadata import version

import numpy as np
from cudacpu import cupy, nvrtc

from .bench import least_work

N, C, R, HEADS = 2**20, 128, 16, 4                        # tokens of a megapixel, channels, rank components, heads of the probe
M = R * HEADS
WIDE = 32                                                 # rank components from which on tensor cores do the assembly
SINGLE = np.dtype(np.float32)

WORK = least_work(N, C, R, HEADS) | {f"assembly_tf32{end}": least_work(N, C, WIDE)[f"assembly{end}"] for end in ("", "_backward")}

if __name__ == "__main__":
    with cupy.installed():
        cuda = importlib.import_module("tinycea.ops.cuda")
        norm, probe, own = f", {C}", f", {C}, {M}, {cuda._tile(M, SINGLE)}", f", {C}, {R}, {cuda._tile(R, SINGLE)}"
        files = {"layernorm": {"layernorm": norm, "layernorm_backward": norm},             # file -> kernel -> its template
                 "probe": {"probe": probe, "probe_combine": norm, "probe_backward": probe},
                 "assembly": {"assembly": own, "assembly_backward": own,
                              "assembly, float16": f"{own}, __half", "assembly_backward, float16": f"{own}, __half"},
                 "depthwise": {"depthwise": "", "gated_depthwise": "", "gated_depthwise_backward": ""},
                 "assembly_tf32": {"assembly_tf32": f", {C}, {WIDE}, 64", "assembly_tf32_backward": f", {C}, {WIDE}, 32"},
                 "scale": {"scale": "", "scale_backward": ""}, "column_sum": {"column_sum": ""}, "adamw": {"adamw": ""}}
        print(f"{'':26s} {'registers':>11s} {'shared':>7s} {'spills':>7s} {'moves':>9s} {'computes':>11s} {'FLOP/byte':>9s}")
        print(f"{'':26s} {'80/90/100':>11s} {'bytes':>7s} {'bytes':>7s}")
        for file, kernels in files.items():
            names = [f"{kernel.split(',')[0]}<float{template}>" for kernel, template in kernels.items()]
            costs = [nvrtc.compile("#include <cuda_fp16.h>\n" + cuda.source(file), names, arch) for arch in nvrtc.ARCHITECTURES]
            for kernel, name in zip(kernels, names):
                registers = "/".join(str(cost[name]["registers"]) for cost in costs)
                shared, spills = (max(cost[name][what] for cost in costs) for what in ("shared", "spills"))
                line = f"{kernel:26s} {registers:>11s} {shared:7d} {spills:7d}"
                if kernel.split(",")[0] in WORK:
                    (numbers, flops), size = WORK[kernel.split(",")[0]], 2 if "float16" in kernel else 4
                    line += f" {size * numbers / 1e6:6.0f} MB {flops / 1e9:6.1f} GFLOP {flops / (size * numbers):9.1f}"
                print(line)
    print(f"float32, N {N}, C {C}, R {R} (tf32: {WIDE}), {HEADS} heads (adamw: {N} parameters); "
          f"NVRTC {version('nvidia-cuda-nvrtc')} for sm_80, sm_90, sm_100")
